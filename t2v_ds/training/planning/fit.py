"""Which changes of the settings make a run fit, found by planning the changed run.

First those that leave the result as it is, singly, in pairs, ...; then, with all of them that help, those that change the model. The search
ends with the smallest number of changes of which some set fits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from t2v_ds.config import TransformerRunConfig
from t2v_ds.errors import ConfigError
from t2v_ds.training.ds_config import complete_ds_config
from t2v_ds.training.planning.planner import TILE, Memory, Plan, Planner, stages_for
from t2v_ds.training.planning.work import RunConfig
from t2v_ds.training.planning.zero import Zero

BUCKET = 50_000_000
SHOWN = 5


@dataclass(frozen=True)
class Move:
    """A change: settings of the run, or of its DeepSpeed file."""

    kind: str  # of two moves of one kind only one is made
    text: str  # as the user writes it
    group: str = ""  # "model" or "train"
    name: str = ""
    value: object = None
    bucket: int = 0

    def apply(self, run: RunConfig) -> RunConfig:
        """The run with this setting; a bucket is no setting of the run."""
        if not self.group:
            return run
        return dataclasses.replace(run, **{self.group: dataclasses.replace(getattr(run, self.group), **{self.name: self.value})})


@dataclass
class Change:
    """Moves made together, and what the run then takes."""

    moves: tuple[Move, ...]
    memory: Memory
    seconds: float

    @property
    def text(self) -> str:
        """The settings as they are written on the command line."""
        return " ".join(move.text for move in self.moves)


def gentle_moves(plan: Plan) -> list[Move]:
    """Changes after which the run learns the same."""
    run, zero = plan.run, Zero.read(complete_ds_config(plan.run.train, plan.config.gpus))
    moves = []

    def setting(kind: str, group: str, name: str, value: object) -> None:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        moves.append(Move(kind, f"{group}.{name}={text}", group, name, value))

    if isinstance(run, TransformerRunConfig):
        if not run.model.activation_checkpointing:
            setting("checkpointing", "model", "activation_checkpointing", True)
        if not run.model.loss_tile or run.model.loss_tile > TILE:
            setting("tile", "model", "loss_tile", TILE)
    smaller = sorted({size for size in range(1, plan.work.micro) if plan.work.micro % size == 0}, reverse=True)
    for size in dict.fromkeys([*smaller[:1], *smaller[-1:]]):
        setting("micro-batch", "train", "micro_batch", size)
    for name in stages_for(run.train):  # also lower ones: a small model takes less than the buckets of stages 1 and 2
        if name != run.train.ds_config:
            setting("stage", "train", "ds_config", name)
    if zero.stage and zero.bucket > BUCKET:
        moves.append(Move("bucket", f"zero_optimization.reduce_bucket_size={BUCKET} (in the file of train.ds_config)", bucket=BUCKET))
    return moves


def harsh_moves(plan: Plan) -> list[Move]:
    """Changes of the model."""
    run = plan.run
    if not isinstance(run, TransformerRunConfig):
        return []
    moves = []
    for attention in ("window", "factorised"):
        if run.model.attention != attention:
            moves.append(Move("attention", f"model.attention={attention}", "model", "attention", attention))
    if run.model.group == 1 and run.model.grid_size % 2 == 0:
        moves.append(Move("group", "model.group=2", "model", "group", 2))
    return moves


def changes_that_fit(plan: Plan, planner: Planner) -> list[Change]:
    """The smallest sets of changes that make `plan` fit, the fastest first; empty where none of them does."""
    gentle = gentle_moves(plan)
    for count in range(1, len({move.kind for move in gentle}) + 1):
        found = [change for change in _changes(plan, planner, gentle, count) if change.memory.total <= plan.available]
        if found:
            return sorted(found, key=lambda change: (change.seconds, change.memory.total))[:SHOWN]
    strongest = _strongest(gentle)
    found = []
    for move in harsh_moves(plan):
        change = _change(plan, planner, (move, *strongest))
        if change is not None and change.memory.total <= plan.available:
            found.append(change)
    return sorted(found, key=lambda change: (change.seconds, change.memory.total))


def _strongest(moves: list[Move]) -> tuple[Move, ...]:
    """Of each kind the last, which saves most."""
    return tuple({move.kind: move for move in moves}.values())


def _changes(plan: Plan, planner: Planner, moves: list[Move], count: int) -> Iterator[Change]:
    for chosen in itertools.combinations(moves, count):
        if len({move.kind for move in chosen}) == count:
            change = _change(plan, planner, chosen)
            if change is not None:
                yield change


def _change(plan: Plan, planner: Planner, moves: tuple[Move, ...]) -> Change | None:
    """None where the settings do not go together."""
    run = plan.run
    try:
        for move in moves:
            run = move.apply(run)
        changed = planner.plan(run, like=plan)
    except ConfigError:
        return None
    memory = changed.memory
    bucket = max(move.bucket for move in moves)
    if bucket:
        zero = dataclasses.replace(Zero.read(complete_ds_config(changed.run.train, plan.config.gpus)), bucket=bucket)
        memory = planner.memory(changed.run.train, changed.trace, zero, changed.work.accumulation)
    return Change(moves, memory, changed.cost.seconds)
