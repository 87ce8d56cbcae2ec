"""Seconds of a step, from a step that is really executed here: of a model with two layers, each of them timed apart.

    engine with the run's sizes, 2 layers -> forward, backward, step, a few times -> median seconds
        of each layer (both ways) | of the rest (inputs, head, loss) | of the optimizer's step
    seconds of the run's step = rest + each of its layers + optimizer x parameters / parameters of two layers
                                                            (of Muon, which takes most of its time for them: hidden matrices alone)
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from t2v_ds.config import TransformerRunConfig, VQVAERunConfig
from t2v_ds.errors import ConfigError
from t2v_ds.training.distributed import Collectives, connect
from t2v_ds.training.engine import Engine
from t2v_ds.training.loop import Objective
from t2v_ds.training.objectives import TransformerObjective
from t2v_ds.training.optimizer import parameter_groups
from t2v_ds.training.planning.subject import (
    stand_in_tokenizer,
    transformer_batch,
    transformer_objective,
    vqvae_batch,
    vqvae_objective,
)

STEPS = 3  # after one that is not counted
GIB = 2**30


@dataclass
class Timing:
    """Median seconds on one process."""

    layers: tuple[float, ...]  # of each kind of layer, forward and backward
    rest: float  # of the micro-batch's forward and backward pass
    optimizer: float  # of the optimizer's step
    parameters: int  # of the model that was timed; with Muon those of hidden matrices

    def passes(self, layers: int) -> float:
        """Forward and backward pass of a micro-batch through so many layers."""
        return self.rest + sum(self.layers[index % len(self.layers)] for index in range(layers) if self.layers)

    def step(self, parameters: int) -> float:
        """The optimizer's step over so many of `parameters`."""
        return self.optimizer * parameters / self.parameters


class _Clock:
    """Notes when the passes arrive at each layer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def watch(self, blocks: Sequence[nn.Module]) -> None:
        """Hook into the layers. In a backward pass a layer is done when the gradient of its input is there."""

        def entered(index: int, given: Tensor) -> None:
            if torch._C._current_graph_task_id() == -1:  # else checkpointing computes it again, which belongs to its backward pass
                self.seconds[f"in {index}"] = self.now()
                given.register_hook(lambda _: self.seconds.__setitem__(f"done {index}", self.now()))

        def left(index: int, out: Tensor) -> None:
            if torch._C._current_graph_task_id() == -1:
                self.seconds[f"out {index}"] = self.now()
                out.register_hook(lambda _: self.seconds.__setitem__(f"begun {index}", self.now()))

        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda _, args, index=index: entered(index, args[0]))
            block.register_forward_hook(lambda _, __, out, index=index: left(index, out))

    def layer(self, index: int) -> float:
        """Seconds of both passes of a layer."""
        at = self.seconds
        return at[f"out {index}"] - at[f"in {index}"] + at[f"done {index}"] - at[f"begun {index}"]


def time_transformer(run: TransformerRunConfig, lengths: Sequence[int], peak: Callable[[TransformerRunConfig], int]) -> Timing:
    """Time a micro-batch of clips of these lengths.

    Args:
        run: whose first two layers are run.
        lengths: frames of each clip.
        peak: the bytes that a run takes, asked before it is begun.

    Raises:
        ConfigError: this machine has too little memory for two layers.
    """
    collectives = connect()
    model = dataclasses.replace(run.model, layers=min(2, run.model.layers))
    small = dataclasses.replace(run, model=model, train=_alone(run.train, len(lengths)))
    _require_memory(peak(small), collectives.device)
    objective = transformer_objective(small, stand_in_tokenizer(run.model.grid_size, run.model.codebook_size))
    batch = transformer_batch(small, lengths)
    layers, rest, optimizer = _time(objective, batch, small.train, collectives)
    kinds = layers if run.model.attention == "factorised" else (statistics.fmean(layers),)
    groups = parameter_groups(objective, 0.0, muon=run.train.optimizer == "muon")
    moved = groups[:1] if run.train.optimizer == "muon" else groups
    return Timing(kinds, rest, optimizer, sum(p.numel() for group in moved for p in group["params"]))


def time_vqvae(run: VQVAERunConfig, clips: int, peak: Callable[[VQVAERunConfig], int]) -> Timing:
    """Time a micro-batch of so many clips of the whole model; see `time_transformer`."""
    collectives = connect()
    alone = dataclasses.replace(run, train=_alone(run.train, clips))
    _require_memory(peak(alone), collectives.device)
    objective = vqvae_objective(alone)
    _, rest, optimizer = _time(objective, vqvae_batch(alone, clips), alone.train, collectives)
    return Timing((), rest, optimizer, sum(p.numel() for p in objective.parameters()))


def _alone(train: Any, clips: int) -> Any:
    return dataclasses.replace(train, batch=clips, micro_batch=clips)


def _require_memory(needed: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"measuring two layers takes {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB of this machine are free: "
            "leave out --measure and give peak_tflops and mfu, or plan a smaller micro-batch"
        )


def _time(objective: Objective, batch: dict[str, Any], train: Any, collectives: Collectives) -> tuple[tuple[float, ...], float, float]:
    """Medians of (each layer, the rest of both passes, the optimizer's step)."""
    clock = _Clock(collectives.device)
    blocks = list(objective.model.blocks) if isinstance(objective, TransformerObjective) else []
    clock.watch(blocks)
    engine = Engine(objective, train, 0, collectives, STEPS + 1)
    batch = engine.to_device(batch)
    rows = []
    for step in range(STEPS + 1):
        begin = clock.now()
        loss, _ = engine.forward(batch)
        engine.backward(loss)
        passed = clock.now()
        engine.step(step)
        objective.after_step(step + 1, engine)
        layers = [clock.layer(index) for index in range(len(blocks))]
        rows.append([*layers, passed - begin - sum(layers), clock.now() - passed])
    *layers, rest, optimizer = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    return tuple(layers), rest, optimizer
