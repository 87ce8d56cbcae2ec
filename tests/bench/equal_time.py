"""Validation loss after equal wall time, for each kind of attention: what a cheaper step is worth.

    python -m tests.bench.equal_time --data TOKENS --validation TOKENS [--seconds 240] [--group 1] [--decoding token]

The kinds are trained one after the other in this process, on the same clips in the same order, with the same settings (AdamW, warm-up,
then a constant learning rate); the validation loss is that of whole clips, every quarter of the time. Wall time includes loading, not
validation.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from t2v_ds.config import TextConfig, TransformerConfig, TransformerRunConfig
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.stream import ClipStream
from t2v_ds.models.text import build_text_encoder
from t2v_ds.models.transformer import VideoTransformer
from t2v_ds.training.distributed import keep_freed_memory
from t2v_ds.training.run import _Vary

TEXT = TextConfig(tokens=14, width=128)


def batches(dataset: ShardDataset, config: TransformerRunConfig, batch: int) -> Iterator[dict[str, Any]]:
    """Endless batches, as training has them."""
    text = build_text_encoder(TEXT)
    for found in ClipStream(dataset, batch, load=_Vary(config), threads=0):
        if "captions" in found:  # no text vectors are stored
            found["text"], found["mask"] = text.encode(found["captions"])
        yield found


def losses(model: VideoTransformer, one: dict[str, Any]) -> torch.Tensor:
    """Nats a code of each clip."""
    with torch.autocast("cpu", torch.bfloat16):
        found = model(one["codes"], one["lengths"], one["text"], one["mask"], one["starts"], one["context"], one["passes"])
    codes: torch.Tensor = found.codes
    return codes


@torch.no_grad()
def validate(model: VideoTransformer, dataset: ShardDataset, config: TransformerRunConfig, clips: int) -> float:
    """Bits a code."""
    stream, values = batches(dataset, config, 8), []
    for _ in range(clips // 8):
        values.append(losses(model.eval(), next(stream)).mean().item())
    model.train()
    return sum(values) / len(values) / math.log(2)


def train(kind: str, arguments: argparse.Namespace, data: ShardDataset, validation: ShardDataset) -> tuple[list[float], int]:
    """Validation losses after each quarter of the time, and steps made."""
    torch.manual_seed(0)
    manifest = data.manifest
    model_config = TransformerConfig(
        width=arguments.width, layers=arguments.layers, heads=arguments.width // 64, attention=kind, decoding=arguments.decoding,
        max_frames=int(data.lengths.max()), group=arguments.group, grid_size=manifest.grid_size, codebook_size=manifest.codebook_size,
        text_width=data.stored_text.width if data.stored_text else TEXT.width,
    )  # fmt: skip
    config = TransformerRunConfig(model=model_config, caption_dropout=0.0)
    model = VideoTransformer(model_config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    stream, spent, steps, found = batches(data, config, arguments.batch), 0.0, 0, []
    while len(found) < 4:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * min(1.0, (steps + 1) / 50)
        losses(model, next(stream)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, spent = steps + 1, spent + time.perf_counter() - start
        if spent >= arguments.seconds * (len(found) + 1) / 4:
            found.append(validate(model, validation, config, arguments.clips))
    return found, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--decoding", choices=("token", "frame"), default="token")
    parser.add_argument("--kinds", nargs="+", default=["full", "factorised"])
    arguments = parser.parse_args()
    keep_freed_memory()
    print("| attention | steps | bits a code after 1/4 | 1/2 | 3/4 | all of the time |\n|---|---:|---:|---:|---:|---:|")
    with ShardDataset(arguments.data, "tokens") as data, ShardDataset(arguments.validation, "tokens") as validation:
        for kind in arguments.kinds:
            found, steps = train(kind, arguments, data, validation)
            print(f"| {kind} | {steps} | {' | '.join(f'{bits:.4f}' for bits in found)} |", flush=True)


if __name__ == "__main__":
    main()
