"""A training step on one clip of 40 x 1024 codes, each kind of attention in a process of its own: seconds and peak memory.

    python -m tests.bench.long_context [--frames 40] [--preset 30m] [--decoding token] [--checkpointing] [--repeats 1] [--device cuda]

Forward, backward and AdamW step of the model itself, bf16 autocast, all cores. The first step of each is not counted where there are
several. Peak memory is the most that the process had resident, less what it had before the model was made; on a GPU what was allocated.
The work of a step is what `t2v plan` counts, causal attention as the half that it computes, with what checkpointing computes again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from t2v_ds.config import PRESETS, TransformerConfig
from t2v_ds.config_loader import from_dict
from t2v_ds.models.transformer import VideoTransformer
from t2v_ds.training.distributed import keep_freed_memory
from t2v_ds.training.planning.trace import Recorder

KINDS = ("full", "window", "factorised")


def resident(what: str) -> float:
    """GiB: "VmRSS" now, or "VmHWM" at the most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 2**20


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, and GiB."""
    keep_freed_memory()  # as training does
    before = resident("VmRSS")
    torch.manual_seed(0)
    settings = {
        "preset": arguments.preset, "attention": kind, "decoding": arguments.decoding, "activation_checkpointing": arguments.checkpointing,
        "loss_tile": 4096, "text_width": 128,
    }  # fmt: skip
    device = torch.device(arguments.device)
    model = VideoTransformer(from_dict(TransformerConfig, settings)).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    codes = torch.randint(0, 1024, (arguments.frames, 32, 32), device=device)
    text, mask = torch.randn(1, 16, 128, device=device), torch.ones(1, 16, dtype=torch.bool, device=device)
    passes = torch.randint(8, (arguments.frames, 1024), device=device) if arguments.decoding == "frame" else None
    seconds, flops = [], 0.0
    for number in range(arguments.repeats + (arguments.repeats > 1)):
        start = time.perf_counter()
        with Recorder() if number == 0 else contextlib.nullcontext() as counter:
            with torch.autocast(device.type, torch.bfloat16):
                losses = model(codes, [arguments.frames], text, mask, None, None, passes)
            (losses.codes + losses.end).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        flops = flops if counter is None else counter.flops + counter.again
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resident("VmHWM") - before
    return {"seconds": statistics.median(seconds[arguments.repeats > 1 :]), "gib": peak, "tera": flops / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--preset", choices=PRESETS, default="30m")
    parser.add_argument("--device", default="cpu")
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
    print(f"{arguments.frames} x 1024 codes, preset {arguments.preset}, decoding {arguments.decoding}, on {arguments.device}\n")
    print("| attention | seconds a step | times cheaper | TFLOP a step | TFLOP/s | codes a second | peak memory, GiB | times less |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind, one in found.items():
        faster, less = base["seconds"] / one["seconds"], base["gib"] / one["gib"]
        rates = f"{one['tera']:.1f} | {one['tera'] / one['seconds']:.2f} | {1024 * arguments.frames / one['seconds']:,.0f}"
        print(f"| {kind} | {one['seconds']:.2f} | {faster:.1f} | {rates} | {one['gib']:.1f} | {less:.1f} |")


if __name__ == "__main__":
    main()
