"""What `test_sequence_parallel` runs on every rank: losses and gradients of one step, with the positions divided or not.

Usage: sequence_program.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from t2v_ds.training.distributed import connect, finish
from t2v_ds.training.engine import import_deepspeed
from t2v_ds.training.sequence_parallel import Ulysses
from tests.toy_transformer import captions, codes_of, make, some_passes

KINDS: dict[str, dict[str, Any]] = {
    "full": {"attention": "full"},
    "full, frames": {"attention": "full", "decoding": "frame", "kv_heads": 2},
    "factorised": {"attention": "factorised", "layers": 4, "activation_checkpointing": True},
    "factorised, frames": {"attention": "factorised", "decoding": "frame", "last_frame": True},
    "window": {"attention": "window", "window_frames": 2, "conditioning": "cross", "group": 1, "loss_tile": 5},
    "window, frames": {"attention": "window", "window_frames": 2, "decoding": "frame", "neighbourhood": 5, "tied_head": True},
}


def main(out: Path) -> None:
    collectives = connect()
    import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    results = {}
    for name, settings in KINDS.items():
        model = make(heads=4, **settings, std=0.2).train()
        if collectives.world_size > 1:
            model.parallel = Ulysses(collectives, collectives.world_size, model.config)
        lengths, (text, mask) = [3, 2], captions(2)
        passes = some_passes(lengths, model.config.positions) if model.config.decoding == "frame" else None
        given = [True, False] if model.config.last_frame else None
        losses = model(codes_of(5), lengths, text, mask, None, None, passes, given)
        total = (losses.codes + losses.end + losses.z).mean()
        total.backward()
        values = torch.stack(losses).detach()
        gradients = {key: p.grad if p.grad is not None else torch.zeros_like(p) for key, p in model.named_parameters()}
        for tensor in (values, *gradients.values()):  # as DeepSpeed does with gradients: the mean over the ranks
            dist.all_reduce(tensor)
            tensor /= collectives.world_size
        results[name] = {"losses": values.tolist(), "gradients": {key: value.flatten().tolist() for key, value in gradients.items()}}
    if collectives.rank == 0:
        out.write_text(json.dumps(results))
    finish(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
