"""The curve of a run: means over ranks and steps, one JSON line each, without gaps or repeats after a restart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v_ds.files import sync, write_atomically
from t2v_ds.training.distributed import Collectives

METRICS_FILE = "metrics.jsonl"


class Window:
    """Means of metrics over the steps since the last log line; part of a checkpoint, so that lines survive a restart."""

    def __init__(self) -> None:
        self.sums: dict[str, float | Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor] | dict[str, float]) -> None:
        """Add one value by name; tensors stay on their device, without waiting for it."""
        for name, value in metrics.items():
            number = value.detach().double() if isinstance(value, Tensor) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1

    def state_dict(self, collectives: Collectives) -> dict[str, Any]:
        """Sums averaged over ranks, and counts; all ranks call."""
        names = sorted(self.sums)
        values = torch.tensor([float(self.sums[name]) for name in names], dtype=torch.float64, device=collectives.device)
        values = collectives.all_reduce_sum(values) / collectives.world_size
        return {"sums": dict(zip(names, values.tolist(), strict=True)), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved window."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])

    def take(self, collectives: Collectives) -> dict[str, float]:
        """The means over ranks and steps; empties the window; all ranks call."""
        state = self.state_dict(collectives)
        self.sums, self.counts = {}, {}
        return {name: total / state["counts"][name] for name, total in state["sums"].items()}


def append_metrics(path: Path, step: int, values: dict[str, float]) -> None:
    """Add the line of `step`."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def sync_file(path: Path) -> None:
    """Force what was written to a file to disk, where it exists."""
    if path.exists():
        sync(path)


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines beyond `step`, and a last one that was cut by a kill."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _line_step(line) <= step]
    write_atomically(path, "".join(f"{line}\n" for line in kept).encode())


def _line_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def last_metrics(path: Path) -> dict[str, float]:
    """The values of a curve's last line, without its step; empty where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    metrics: dict[str, float] = json.loads(lines[-1]) if lines else {}
    metrics.pop("step", None)
    return metrics
