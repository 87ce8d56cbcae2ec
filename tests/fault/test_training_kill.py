"""Training killed at random moments, while saving, by a signal, and with a rank lost: rerun, it ends as if undisturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from t2v_ds.training.checkpoint import latest_checkpoint
from t2v_ds.training.distributed import free_port
from tests.helpers import finish, run_ranks, start

STEPS = 40
SETTINGS = json.dumps(
    {"steps": STEPS, "precision": "fp32", "ds_config": "zero1", "save_every": 5, "log_every": 2, "visual_every": 9, "data_threads": 2}
)


def arguments(run: Path, *extra: str) -> list[str]:
    return ["tests/toy.py", str(run), SETTINGS, "--sleep=0.02", *extra]


def lines(run: Path) -> list[dict[str, Any]]:
    """The curve without timings."""
    path = run / "metrics.jsonl"
    curve = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{key: value for key, value in line.items() if not key.startswith("performance/")} for line in curve]


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=0)


def wait_until(process: subprocess.Popen[str], condition: Any, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while process.poll() is None and not condition():
        assert time.monotonic() < until, "the run does not get there"
        time.sleep(0.0005)


def test_killed_at_random_and_while_saving_and_stopped_by_a_signal(tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    code, output = run_ranks(arguments(calm), 1)[0]
    assert code == 0, output
    chance = random.Random(1)
    for blow in ("saving", "signal", "random"):
        before = last_step(stormy)
        process = start(arguments(stormy))
        wait_until(process, lambda before=before: last_step(stormy) > before)
        if blow == "saving":
            wait_until(process, lambda: any(stormy.glob("checkpoints/*.partial")))
        else:
            time.sleep(chance.uniform(0.0, 0.3))
        assert process.poll() is None, "over before the blow fell"
        process.send_signal(signal.SIGUSR1 if blow == "signal" else signal.SIGKILL)
        code, output = finish([process])[0]
        assert not (stormy / "DONE").exists()
        assert code == (0 if blow == "signal" else -signal.SIGKILL), output
        if blow == "signal":
            saved = latest_checkpoint(stormy)
            assert saved is not None and 0 <= int(saved.name[5:]) - last_step(stormy) <= 1, "the step of the signal was not saved"
    assert last_step(stormy) < STEPS
    code, output = run_ranks(arguments(stormy), 1)[0]
    assert code == 0, output
    assert [line["step"] for line in lines(calm)] == list(range(2, STEPS + 1, 2))
    assert lines(stormy) == lines(calm)
    assert (stormy / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (stormy / "checkpoints").iterdir()) == [f"step_{STEPS - 5:08d}", f"step_{STEPS:08d}"]


def test_one_of_two_ranks_killed_then_resumed_on_one(tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    code, output = run_ranks(arguments(calm, "--dropout=0"), 1)[0]
    assert code == 0, output
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(arguments(stormy, "--dropout=0"), **common, RANK=str(r), LOCAL_RANK=str(r)) for r in range(2)]
    wait_until(ranks[0], lambda: latest_checkpoint(stormy) is not None)
    os.kill(ranks[1].pid, signal.SIGKILL)
    (code, output), _ = finish(ranks, timeout_s=60)
    assert code != 0, "the other rank must not go on alone"
    assert not (stormy / "DONE").exists()
    code, output = run_ranks(arguments(stormy, "--dropout=0"), 1)[0]
    assert code == 0, output
    for found, expected in zip(lines(stormy), lines(calm), strict=True):
        assert found.keys() == expected.keys() and found["step"] == expected["step"]
        torch.testing.assert_close(found, expected, rtol=5e-6, atol=1e-12)
