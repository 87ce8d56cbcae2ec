"""A VQ-VAE training step and tokenizing at the full spec size, with the compiled kernel and without it, interleaved.

    .venv/bin/python tests/bench/kernel_effect.py [--repeats 5]

Step: 8 frames of 128 x 128 forward, backward and codebook update, losses of configs/tgif_vqvae.yaml (perceptual: VGG16 with random
weights), fp32. Tokenizing: 16 frames. "usual" replaces the lookup by |x|² + |c|² - 2 x·c and argmin, statistics by one-hot products.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from t2v_ds.config import VQVAERunConfig
from t2v_ds.config_loader import load_config, resolve_recipe
from t2v_ds.kernels import lookup, ops
from t2v_ds.models.facade import Tokenizer
from t2v_ds.training.distributed import connect
from t2v_ds.training.engine import Engine
from t2v_ds.training.objectives import VQVAEObjective


def usual_lookup(x: Tensor, c: Tensor, mark_bad: bool) -> Tensor:
    """The usual way, with a matrix of all distances."""
    return (x.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * x @ c.T).argmin(1)


def usual_assign(x: Tensor, c: Tensor, deterministic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The usual way, with a one-hot matrix."""
    codes = usual_lookup(x, c, False)
    hot = torch.nn.functional.one_hot(codes, len(c)).float()
    return hot @ c, codes, hot.sum(0), hot.T @ x


def calls(functions: dict[str, Callable[..., Any]]) -> Any:
    """Put other functions in the place of the operators."""
    return mock.patch.object(lookup, "_call", lambda operator, *arguments: functions[operator.__name__.split(".")[0]](*arguments))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    torch.manual_seed(0)
    settings = ["train.precision=fp32", "train.batch=1", "train.micro_batch=1", "train.ds_config=zero1", "frames_per_clip=8"]
    settings += ["losses.perceptual_weights=random", "model.quantizer.warmup_steps=0"]
    config = load_config(VQVAERunConfig, resolve_recipe("tgif_vqvae"), settings)
    frames = torch.randint(0, 256, (8, 128, 128, 3), dtype=torch.uint8)
    objective = VQVAEObjective(config, connect(), np.zeros((1, 128, 128, 3), dtype=np.uint8))
    engine = Engine(objective, config.train, 0, connect(), 1000)
    batch = engine.to_device({"frames": frames})
    objective.initialise(batch, engine)
    count = 0

    def step() -> None:
        nonlocal count
        loss, _ = engine.forward(batch)
        engine.backward(loss)
        engine.step(count)
        count += 1
        objective.after_step(count, engine)

    tokenizer = Tokenizer(copy.deepcopy(objective.model).eval(), "none", torch.device("cpu"))
    more = np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), dtype=np.uint8)

    def encode() -> None:
        tokenizer.encode(more)

    plain = {"lookup": ops._reference_lookup, "assign": ops._reference_assign}
    usual = {"lookup": usual_lookup, "assign": usual_assign}
    ways: dict[str, dict[str, Callable[..., Any]] | None] = {"compiled kernel": None, "plain torch, exact": plain, "usual": usual}
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(flags.repeats + 1):  # the first one warms up
        for way, functions in ways.items():
            for task, run in (("step", step), ("tokenize", encode)):
                with calls(functions) if functions else mock.MagicMock():
                    start = time.perf_counter()
                    run()
                    if number:
                        times.setdefault((way, task), []).append(time.perf_counter() - start)
    print(f"threads: {torch.get_num_threads()}, medians of {flags.repeats}\n")
    print("| lookup | training step, s | ratio | tokenizing, frames/s | ratio |\n|---|---:|---:|---:|---:|")
    first = {task: statistics.median(times["compiled kernel", task]) for task in ("step", "tokenize")}
    for way in ways:
        a, b = (statistics.median(times[way, task]) for task in ("step", "tokenize"))
        print(f"| {way} | {a:.2f} | {a / first['step']:.2f} | {len(more) / b:.0f} | {b / first['tokenize']:.2f} |")


if __name__ == "__main__":
    main()
