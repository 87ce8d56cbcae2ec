"""What `test_engine` runs on every rank: the toy at every ZeRO stage, saved half-way, and resumed from other runs' files.

Usage: program.py OUT LABEL [CHECKPOINT_FOLDER=STAGE ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from t2v_ds.config import TrainConfig
from t2v_ds.data.stream import ClipStream
from t2v_ds.training.checkpoint import load_checkpoint, save_checkpoint
from t2v_ds.training.distributed import Collectives, connect, finish
from t2v_ds.training.ds_config import accumulation_steps
from t2v_ds.training.engine import Engine
from tests.toy import Toy, ToyDataset, collate

STEPS, SAVE_AT = 20, 10
CONFIG = {"seed": 3}


class Run:
    """Toy, stream and engine at one stage."""

    def __init__(self, collectives: Collectives, stage: str, micro: int = 0, precision: str = "fp32") -> None:
        """`stage`: a DeepSpeed file, or "muon", which works with the first of them only."""
        muon = stage == "muon"
        config = TrainConfig(
            batch=8, micro_batch=micro, ds_config="zero0" if muon else stage, precision=precision, learning_rate=0.01, warmup_steps=4,
            weight_decay=0.1, optimizer="muon" if muon else "adamw",
        )  # fmt: skip
        size, self.accumulation = accumulation_steps(config, collectives.world_size)
        self.stream = ClipStream(ToyDataset(), 8, collectives.rank, collectives.world_size, 3, threads=0, micro_batch=size)
        self.toy, self.collectives = Toy(), collectives
        self.engine = Engine(self.toy, config, 3, collectives, 2 * STEPS)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.at = 0

    def steps(self, until: int) -> None:
        for step in range(self.at, until):
            total = torch.zeros((), dtype=torch.float64)
            for micro in range(self.accumulation):
                loss, _ = self.engine.forward(collate(next(self.stream)))
                self.engine.backward(loss)
                assert self.engine.step(step, micro == self.accumulation - 1)
                total += loss.detach().double() / self.accumulation
            self.losses.append(float(self.collectives.all_reduce_sum(total)) / self.collectives.world_size)
            self.norms.append(self.engine.gradient_norm())
            self.toy.after_step(step + 1, self.engine)
        self.at = until

    def result(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "norms": list(self.norms)}


def check_write_rows(run: Run) -> dict[str, Any]:
    """Rows written on all ranks alike (rank 0's values), in every copy, with their moments gone, and still there a step later."""
    engine, codes = run.engine, run.toy.codes
    before = engine.read_parameter(codes)
    rows = torch.tensor([1, 4])
    engine.write_rows(codes, rows, torch.full((2, 7), 50.0 + run.collectives.rank))
    after = engine.read_parameter(codes)
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(after[rows], torch.full((2, 7), 50.0)), after
    assert torch.equal(after[others], before[others])
    moments = engine.read_moments(codes)
    for moment in moments.values():
        assert not moment[rows].any() and moment[others].abs().sum(1).all(), moment
    with engine.full_parameters():
        assert torch.equal(codes.detach().float(), after)
    run.steps(run.at + 1)
    later = engine.read_parameter(codes)
    assert (later[rows] - 50).abs().max() < 0.5, later  # moved by a step of Adam, from where it was put
    assert not torch.equal(later[rows], after[rows])
    copies = run.collectives.gather_object(later.tolist())
    assert all(copy == copies[0] for copy in copies)
    return {"later": later.tolist()}


def check_frozen_and_odd(run: Run) -> None:
    """A frozen parameter and one that does not divide by the ranks can be written and read as well."""
    for parameter in (run.toy.frozen.weight, run.toy.tied.bias):
        value = torch.arange(run.engine.shape(parameter).numel(), dtype=torch.float32).view(run.engine.shape(parameter))
        run.engine.write_parameter(parameter, value + run.collectives.rank)
        assert torch.equal(run.engine.read_parameter(parameter), value)


def check_skipping(collectives: Collectives, stage: str) -> None:
    """A loss that is not finite on one rank only: no rank moves, and the next step works."""
    run = Run(collectives, stage, micro=2)
    run.steps(2)
    before = run.engine.read_parameter(run.toy.codes)
    for bad, applied in ((float("inf"), False), (1.0, True)):
        for micro in range(run.accumulation):
            loss, _ = run.engine.forward(collate(next(run.stream)))
            poisoned = loss * bad if collectives.rank == 0 and micro == 0 else loss
            run.engine.backward(torch.where(torch.isfinite(poisoned), poisoned, torch.full_like(poisoned, float("nan"))))
            outcome = run.engine.step(2, micro == run.accumulation - 1)
        assert outcome is applied, (stage, bad)
        same = torch.equal(run.engine.read_parameter(run.toy.codes), before)
        assert same is not applied, (stage, bad)
    assert all(bool(value.isfinite().all()) for value in run.engine.full_state_dict().values())


def main() -> None:
    out, label, sources = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    collectives = connect()
    results: dict[str, Any] = {}
    for source in sources:
        folder, stage = source.split("=")
        run = Run(collectives, stage)
        state = load_checkpoint(run.engine, Path(folder), CONFIG)
        run.stream.load_state_dict(state["stream"])
        run.at = int(state["step"])
        run.steps(STEPS)
        results[source] = run.result()
    for stage in () if sources else ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "muon"):
        run = Run(collectives, stage, micro=2 if stage in ("zero0", "zero2", "zero3", "muon") else 0)
        run.steps(SAVE_AT)
        save_checkpoint(run.engine, out / label / stage, {"step": SAVE_AT, "stream": run.stream.state_dict(), "config": CONFIG}, keep=1)
        run.steps(STEPS)
        weights = run.engine.full_state_dict()
        if collectives.rank == 0:
            unique = {name: value for name, value in weights.items() if name != "tied.weight"}
            save_file(unique, out / f"{label}_{stage}.safetensors")
        results[stage] = run.result()
        results[stage].update(check_write_rows(run))
        check_frozen_and_odd(run)
        check_skipping(collectives, stage)
        bf16 = Run(collectives, stage, precision="bf16")
        bf16.steps(STEPS)
        results[f"{stage}_bf16"] = bf16.result()
    if collectives.rank == 0:
        (out / f"{label}.json").write_text(json.dumps(results))
    finish(0)


if __name__ == "__main__":
    main()
