"""How well `t2v plan` predicts memory and time of a training step on this machine.

    .venv/bin/python tests/bench/plan.py [1] [2] [3] [--steps 5] [--small]

For each configuration three fresh processes, one after the other:
    plan     what `t2v plan --measure accelerator=cpu` says, from a trace and from a timed step of two layers
    tensors  real steps by the DeepSpeed engine (ZeRO stage 1, one rank), with malloc set to give each freed tensor back
    kept     the same as it is in training, where freed memory is kept (distributed.keep_freed_memory)

Memory is the highest resident set of a process (VmHWM) less its resident set before the model is built, when a tiny model has been
trained a step, so that libraries that are loaded at the first step are not taken for the model's. "tensors" is compared with the bytes of
tensors that are planned, "kept" with those and the holes that are planned for a CPU. Time is the median of the steps after the first, with
memory kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES: list[dict[str, Any]] = [
    {"frames": [4], "model": {"width": 384, "layers": 6, "heads": 6, "decoding": "token", "attention": "full"}, "precision": "bf16"},
    {
        "frames": [8, 6],
        "model": {
            "width": 256, "layers": 8, "heads": 8, "kv_heads": 4, "group": 2, "decoding": "frame", "attention": "factorised",
            "loss_tile": 1024,
        },
        "precision": "fp32",
    },
    {
        "frames": [5],
        "model": {
            "width": 512, "layers": 6, "heads": 8, "decoding": "token", "attention": "window", "window_frames": 2, "conditioning": "cross",
            "activation_checkpointing": True,
        },
        "precision": "bf16",
    },
]  # fmt: skip
GIB = 2**30
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def settings(case: dict[str, Any], small: bool) -> list[str]:
    """As they are written on the command line."""
    model = {**case["model"], "grid_size": 16 if small else 32, "max_frames": max(case["frames"])}
    chosen = [f"model.{name}={json.dumps(value)}" for name, value in model.items()]
    clips = len(case["frames"])
    return [*chosen, "text.tokens=16", f"train.batch={clips}", f"train.precision={case['precision']}", "train.ds_config=zero1"]


def planned(case: dict[str, Any], small: bool) -> dict[str, float]:
    """What is planned, in this process. The lengths are the case's own, where `t2v plan` knows of data only how many have which."""
    from t2v_ds.config_loader import load_plan
    from t2v_ds.training.planning import planner as planning

    config, run = load_plan(None, ["accelerator=cpu", "measure=true", *settings(case, small)])

    class Fixed(planning.Planner):
        def _largest(self, run: Any, work: Any) -> list[int]:
            return list(case["frames"])

    config.frames = statistics.fmean(case["frames"])
    begin = time.monotonic()
    plan = Fixed(config).plan(run)
    kept = (plan.memory.total - config_overhead(config)) / GIB
    return {"tensors": plan.memory.tensors / GIB, "kept": kept, "seconds": plan.cost.seconds, "took": time.monotonic() - begin}


def config_overhead(config: Any) -> int:
    """What is planned for Python and its libraries, which is there before the measurement begins."""
    from t2v_ds.training.planning.hardware import resident

    return resident(0, config)


def real(case: dict[str, Any], small: bool, steps: int, keep: bool) -> dict[str, Any]:
    """Steps of the whole model."""
    import dataclasses

    import torch

    from t2v_ds.config_loader import load_plan
    from t2v_ds.training import distributed
    from t2v_ds.training.planning.subject import transformer_batch
    from t2v_ds.training.planning.work import read_work

    if not keep:
        distributed.keep_freed_memory = lambda: None
    config, run = load_plan(None, ["accelerator=cpu", *settings(case, small)])
    _, run = read_work(config, run)
    collectives = distributed.connect()
    torch.manual_seed(0)
    tiny = dataclasses.replace(run, model=dataclasses.replace(run.model, width=64, layers=2, heads=2, kv_heads=2))
    train(tiny, transformer_batch(tiny, [1] * len(case["frames"])), collectives, 1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    batch = transformer_batch(run, case["frames"])
    times = train(run, batch, collectives, steps)
    return {"memory": (resident("VmHWM") - before) / GIB, "seconds": statistics.median(times[1:]), "times": times}


def train(run: Any, batch: Any, collectives: Any, steps: int) -> list[float]:
    """Seconds of each step."""
    from t2v_ds.training.engine import Engine
    from t2v_ds.training.planning.subject import stand_in_tokenizer, transformer_objective

    objective = transformer_objective(run, stand_in_tokenizer(run.model.grid_size, run.model.codebook_size))
    engine = Engine(objective, run.train, 0, collectives, 100)
    times = []
    for step in range(steps):
        begin = time.monotonic()
        loss, _ = engine.forward(batch)
        engine.backward(loss)
        engine.step(step)
        del loss
        times.append(time.monotonic() - begin)
    return times


def resident(name: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def child(what: str, number: int, flags: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a fresh process."""
    command = [sys.executable, __file__, str(number + 1), "--steps", str(flags.steps), "--part", what]
    command += ["--small"] if flags.small else []
    environment = {**os.environ, **(NO_HOLES if what == "tensors" else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_part(case: dict[str, Any], flags: argparse.Namespace) -> dict[str, Any]:
    if flags.part == "plan":
        return planned(case, flags.small)
    return real(case, flags.small, flags.steps, keep=flags.part == "kept")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=int, default=[1, 2, 3], help="which configurations")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="grids of 16 x 16, to try the program")
    parser.add_argument("--part", choices=("plan", "tensors", "kept"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    numbers = [number - 1 for number in flags.cases]
    if flags.part:
        print(json.dumps(run_part(CASES[numbers[0]], flags)))
        sys.stdout.flush()
        os._exit(0)
    heads = [f"{what}: planned | measured | ratio" for what in ("tensors, GiB", "freed memory kept, GiB", "step, s")]
    print(f"| | {' | '.join(heads)} |\n|---|" + "---:|" * 9)
    for number in numbers:
        plan, tensors, kept = (child(what, number, flags) for what in ("plan", "tensors", "kept"))
        cells = []
        for value, found in ((plan["tensors"], tensors["memory"]), (plan["kept"], kept["memory"]), (plan["seconds"], kept["seconds"])):
            cells += [f"{value:.2f}", f"{found:.2f}", f"{value / found:.2f}"]
        model = CASES[number]["model"]
        name = f"{model['layers']} x {model['width']}, {model['attention']}, {model['decoding']}, {CASES[number]['precision']}"
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        print(f"  plan took {plan['took']:.1f} s; steps {[round(one, 2) for one in kept['times']]}", file=sys.stderr)


if __name__ == "__main__":
    main()
