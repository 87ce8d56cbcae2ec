"""A training step on one clip of 40 x 1024 codes, each kind of attention in a process of its own: seconds and peak memory.

    python -m tests.bench.long_context [--frames 40] [--width 512] [--layers 8] [--decoding token] [--checkpointing] [--repeats 1]

Forward, backward and AdamW step of the model itself, bf16 autocast, all cores. The first step of each is not counted where there are
several. Peak memory is the most that the process had resident, less what it had before the model was made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from t2v_ds.config import TransformerConfig
from t2v_ds.models.transformer import VideoTransformer

KINDS = ("full", "window", "factorised")


def resident(what: str) -> float:
    """GiB: "VmRSS" now, or "VmHWM" at the most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 2**20


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, and GiB."""
    before = resident("VmRSS")
    torch.manual_seed(0)
    config = TransformerConfig(
        width=arguments.width, layers=arguments.layers, heads=arguments.width // 64, attention=kind, decoding=arguments.decoding,
        activation_checkpointing=arguments.checkpointing, loss_tile=4096, text_width=128,
    )  # fmt: skip
    model = VideoTransformer(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    codes = torch.randint(0, 1024, (arguments.frames, 32, 32))
    text, mask = torch.randn(1, 16, 128), torch.ones(1, 16, dtype=torch.bool)
    masked = torch.rand(arguments.frames, 1024) < 0.6 if arguments.decoding == "frame" else None
    seconds = []
    for _ in range(arguments.repeats + (arguments.repeats > 1)):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(codes, [arguments.frames], text, mask, None, None, masked)
        (losses.codes + losses.end).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[arguments.repeats > 1 :]), "gib": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--decoding", choices=("token", "frame"), default="token")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--only", choices=KINDS, help="measure this kind in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    found = {}
    for kind in arguments.kinds:
        command = [sys.executable, "-m", "tests.bench.long_context", *sys.argv[1:], "--only", kind]
        found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    base = found.get("full", next(iter(found.values())))
    print(f"{arguments.frames} x 1024 codes, width {arguments.width}, {arguments.layers} layers, decoding {arguments.decoding}\n")
    print("| attention | seconds a step | times cheaper | peak memory, GiB | times less |")
    print("|---|---:|---:|---:|---:|")
    for kind, one in found.items():
        faster, less = base["seconds"] / one["seconds"], base["gib"] / one["gib"]
        print(f"| {kind} | {one['seconds']:.1f} | {faster:.1f} | {one['gib']:.1f} | {less:.1f} |")


if __name__ == "__main__":
    main()
