"""A toy objective with everything that makes ZeRO difficult, on the real stream and loop; also a program that trains it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from t2v_ds.config import TrainConfig
from t2v_ds.config_loader import from_dict, to_dict
from t2v_ds.data.stream import ClipStream
from t2v_ds.models.exported import export_model
from t2v_ds.training.distributed import connect, finish
from t2v_ds.training.ds_config import accumulation_steps
from t2v_ds.training.engine import Engine
from t2v_ds.training.loop import Objective, train
from t2v_ds.training.monitor import Monitor


class ToyDataset:
    """48 vectors of 5 numbers, each a pure function of its index."""

    digest = "toy"

    def __len__(self) -> int:
        return 48

    def read(self, i: int) -> dict[str, Any]:
        return {"x": np.random.default_rng(i).standard_normal(5).astype(np.float32), "i": i}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "x": torch.from_numpy(np.stack([sample["x"] for sample in samples])),
        "i": torch.tensor([sample["i"] for sample in samples]),
        "names": [str(sample["i"]) for sample in samples],
    }


class Toy(Objective):
    """Embedding, norm, tied and frozen layers, odd shapes, a codebook parameter that is revived, an EMA buffer."""

    def __init__(self, sleep_s: float = 0.0, dropout: float = 0.0, poison: dict[int, str] | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.embedding = nn.Embedding(48, 7)
        self.body = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 7))
        self.tied = nn.Linear(7, 13)
        self.tied.weight = self.body[0].weight
        self.codes = nn.Parameter(torch.randn(6, 7))
        self.dropout = nn.Dropout(dropout)
        self.hidden_matrices = {"body.0": [6, 7], "body.3": []}
        self.register_buffer("average", torch.zeros(7))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.sleep_s, self.poison = sleep_s, poison or {}
        self.pending = torch.zeros(8)
        self.forwards = 0
        self.discarded = 0

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(self.sleep_s)
        hidden = self.dropout(self.body(self.frozen(batch["x"]) + self.embedding(batch["i"]))) + self.tied(self.average).mean()
        distance = torch.cdist(hidden.float(), self.codes.float()).square()
        reconstruction = (hidden - batch["x"].sum(1, keepdim=True)).square().mean()
        self.pending = self.pending.to(hidden.device) + torch.cat(
            [hidden.detach().float().sum(0), torch.tensor([len(hidden)], device=hidden.device)]
        )
        loss = reconstruction + 0.1 * distance.mean()
        self.forwards += 1
        if self.forwards in self.poison:
            loss = loss * float(self.poison[self.forwards])
        return loss, {"reconstruction": reconstruction.detach()}

    def initialise(self, batch: dict[str, Any], engine: Engine) -> None:
        engine.write_rows(self.codes, torch.arange(2), batch["x"][:2, :1].expand(2, 7))

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        total = engine.collectives.all_reduce_sum(self.pending)
        self.average.lerp_(total[:7] / total[7], 0.2)
        self.updates += 1
        self.pending = torch.zeros(8)
        if step % 6 == 0:
            engine.write_rows(self.codes, torch.tensor([step % 5]), self.average[None] * 2)
            return {"revived": 1.0}
        return {}

    def discard_step(self) -> None:
        self.pending = torch.zeros(8)
        self.discarded += 1

    def visualise(self, step: int, engine: Engine, monitor: Monitor) -> None:
        torch.rand(3)  # must not disturb the training's own random numbers
        with engine.full_parameters(), torch.no_grad():
            shade = self.body(torch.ones(1, 7, device=engine.device)).sigmoid().float().mean().item()
        monitor.image("toy", np.full((4, 4, 3), int(255 * shade), dtype=np.uint8), step)

    def export(self, folder: Path, state: dict[str, Tensor]) -> None:
        export_model(folder, {"kind": "toy"}, state)


def train_toy(run: Path, settings: dict[str, Any], sleep_s: float = 0.0, dropout: float = 0.1, seed: int = 3) -> dict[str, float]:
    config = from_dict(TrainConfig, {"learning_rate": 0.01, "warmup_steps": 4, "batch": 8, "log_every": 1, **settings})
    collectives = connect()
    micro, _ = accumulation_steps(config, collectives.world_size)
    stream = ClipStream(
        ToyDataset(), config.batch, collectives.rank, collectives.world_size, seed, threads=config.data_threads, micro_batch=micro
    )
    with stream:
        return train(Toy(sleep_s, dropout), stream, config, run, seed, {"seed": seed, "train": to_dict(config)}, collate, description="toy")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher; the environment says the same")
    arguments = parser.parse_args()
    try:
        train_toy(arguments.run, arguments.settings, arguments.sleep, arguments.dropout)
    except SystemExit as stop:
        finish(int(stop.code or 0))
    finish(0)


if __name__ == "__main__":
    sys.exit(main())
