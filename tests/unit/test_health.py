"""Stop signals, the policy for non-finite losses, and the watchdog."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import pytest

from t2v_ds.config import TrainConfig
from t2v_ds.config_loader import to_dict
from t2v_ds.data.stream import ClipStream
from t2v_ds.errors import UserError
from t2v_ds.training.health import WATCHDOG_EXIT_CODE, NonFinitePolicy, StopRequested, Watchdog
from t2v_ds.training.loop import train
from tests.helpers import finish, start
from tests.toy import Toy, ToyDataset, collate


def run_poisoned(run: Path, poison: dict[int, str], stage: str, steps: int = 6) -> Toy:
    config = TrainConfig(steps=steps, batch=8, micro_batch=4, log_every=3, warmup_steps=0, ds_config=stage, precision="fp32")
    toy = Toy(poison=poison)
    with ClipStream(ToyDataset(), 8, seed=1, threads=0, micro_batch=4) as stream:
        train(toy, stream, config, run, 1, {"train": to_dict(config)}, collate)
    return toy


@pytest.mark.parametrize("stage", ["zero0", "zero1"])
@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_one_bad_micro_batch_skips_its_step(tmp_path: Path, stage: str, poison: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        toy = run_poisoned(tmp_path, {4: poison}, stage)  # the second micro-batch of step 2
    assert toy.discarded == 1 and int(toy.updates) == 5
    assert "step 2 skipped: loss 'loss' is not finite" in caplog.text
    curve = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in curve] == [1.0, 1.0]
    assert all(math.isfinite(value) for line in curve for value in line.values())


def test_bad_steps_without_end_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stopped at step 22: loss 'loss' was not finite in 20 steps in a row"):
        run_poisoned(tmp_path, dict.fromkeys(range(5, 100), "nan"), "zero1", steps=40)
    assert not (tmp_path / "DONE").exists()


def test_policy_forgives_after_a_good_step() -> None:
    policy = NonFinitePolicy(limit=3)
    for step in (1, 2, 4, 5):
        policy.skipped(step, ["l1"])
        if step == 2:
            policy.applied()
    assert policy.total == 4
    with pytest.raises(UserError, match="step 6: the gradient was not finite in 3 steps"):
        policy.skipped(6, [])


def test_watchdog_names_rank_step_and_phase(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[int] = []
    with caplog.at_level(logging.CRITICAL), Watchdog(0.3, 5, end=ended.append) as dog:
        for step in range(4):
            dog.beat(step, "data")
            time.sleep(0.15)
        assert not ended, "a slow but living run must not be ended"
        dog.beat(17, "optimizer step")
        time.sleep(1.0)
    assert ended == [WATCHDOG_EXIT_CODE]
    assert "rank 5 hangs at step 17 (optimizer step)" in caplog.text


class Board:
    """Rank 1 has fallen silent, rank 2 still posts."""

    def __init__(self) -> None:
        self.posts: list[str] = []
        self.reads = 0

    def post(self, text: str) -> None:
        self.posts.append(text)

    def read(self) -> dict[int, str]:
        self.reads += 1
        return {1: "40 step 17 (data)", 2: f"{60 + self.reads} step 18 (optimizer step)"}


def test_watchdog_says_what_the_others_did_last(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[int] = []
    board = Board()
    with caplog.at_level(logging.CRITICAL), Watchdog(0.4, 0, end=ended.append, board=board) as dog:
        dog.beat(18, "optimizer step")
        time.sleep(1.2)
    assert ended == [WATCHDOG_EXIT_CODE]
    assert board.posts[-1].endswith("step 18 (optimizer step)")
    assert len(set(board.posts)) == len(board.posts) > 1
    assert "; rank 1 is silent since step 17 (data); rank 2 is at step 18 (optimizer step)" in caplog.text


def test_watchdog_can_be_off_and_ends_with_the_run() -> None:
    ended: list[int] = []
    for limit in (0.0, 0.2):
        with Watchdog(limit, 0, end=ended.append):
            pass
        time.sleep(0.4)
    assert not ended


def test_signals_set_a_flag_and_the_request_is_a_clean_exit() -> None:
    program = (
        "import os, signal; from t2v_ds.training import health; health.install_stop_signals(); assert not health.stop_requested()\n"
        "os.kill(os.getpid(), signal.{}); assert health.stop_requested(); raise health.StopRequested(9)"
    )
    for name in ("SIGTERM", "SIGUSR1"):
        assert finish([start(["-c", program.format(name)])]) == [(0, "")]
    assert StopRequested(9).step == 9
