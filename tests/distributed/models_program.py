"""What `test_models` runs on every rank: the product's two training stages, many times in one process group.

Usage: models_program.py SPECIFICATION.json

The file maps a label to {"stage": "vqvae" | "transformer", "config": settings as in a YAML file}; each is trained into its
`out`. After each step all ranks' codebooks and statistics are compared to the bit, and their digest is kept in
OUT/codebook.json; the captions that rank 0's text encoder was given are in OUT/encoded.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2v_ds.config import TransformerRunConfig, VQVAERunConfig
from t2v_ds.config_loader import from_dict
from t2v_ds.models.text import Embedded, HashingTextEncoder
from t2v_ds.training import run as stages
from t2v_ds.training.distributed import finish
from t2v_ds.training.engine import Engine
from t2v_ds.training.objectives import VQVAEObjective


class WatchedVQVAE(VQVAEObjective):
    """The VQ-VAE's objective, with its codebook compared over the ranks after each step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[dict[str, Any]] = []

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        values = super().after_step(step, engine)
        quantizer = self.model.quantizer
        tensors = dict(quantizer.named_buffers())
        if isinstance(quantizer.codebook, nn.Parameter):
            with engine.full_parameters():  # this rank's own copy, not the one in the optimizer
                tensors["codebook"] = quantizer.codebook.detach().clone()
        mine = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in sorted(tensors.items())}
        for rank, other in enumerate(engine.collectives.gather_object(mine)):
            assert other == mine, f"step {step}: {[name for name in mine if mine[name] != other[name]]} differ on rank {rank}"
        self.seen.append({"step": step, "revived": values.get("codebook/revived", 0.0), "usage": tensors["usage"].tolist()})
        return values

    def export(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        super().export(folder, state)
        (folder / "codebook.json").write_text(json.dumps(self.seen))


def watch_captions() -> list[str]:
    """Every caption that a text encoder computes from now on, but for the one that its identity is taken from."""
    seen: list[str] = []
    compute = HashingTextEncoder._compute

    def watched(self: HashingTextEncoder, captions: list[str]) -> list[Embedded]:
        seen.extend(caption for caption in captions if "ÉTOILES" not in caption)
        return compute(self, captions)

    HashingTextEncoder._compute = watched  # type: ignore[method-assign]
    return seen


def main() -> None:
    stages.VQVAEObjective = WatchedVQVAE  # type: ignore[misc]
    seen = watch_captions()
    for entry in json.loads(Path(sys.argv[1]).read_text()).values():
        if entry["stage"] == "vqvae":
            stages.train_vqvae(from_dict(VQVAERunConfig, entry["config"]))
        else:
            seen.clear()
            stages.train_transformer(from_dict(TransformerRunConfig, entry["config"]))
            if os.environ.get("RANK", "0") == "0":
                Path(entry["config"]["out"], "encoded.json").write_text(json.dumps(seen))
    finish(0)


if __name__ == "__main__":
    main()
