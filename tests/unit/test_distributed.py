"""Launcher variables -> ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from t2v_ds.errors import ConfigError
from t2v_ds.training.distributed import Ranks, detect_ranks
from tests.helpers import environment, run_ranks

LAUNCHED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4",
    "SLURM_JOB_ID": "40007", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_JOB_NODELIST": "n[1-9]",
}  # fmt: skip


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that answers as SLURM's does for one question and fails for others."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-4]" ] || exit 1\nprintf "n1\\nn2\\nn3\\nn4\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_nothing_set_is_one_process() -> None:
    ranks = detect_ranks({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"})  # a batch shell: no step
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.nodes, ranks.master_addr) == (0, 0, 1, 1, "127.0.0.1")
    assert 1024 <= ranks.master_port < 65536


def test_launchers() -> None:
    assert detect_ranks({**LAUNCHED, "LOCAL_WORLD_SIZE": "2"}) == Ranks(3, 1, 4, 2, "10.0.0.1", 29500)  # torchrun
    assert detect_ranks({**LAUNCHED, "LOCAL_SIZE": "4"}) == Ranks(3, 1, 4, 1, "10.0.0.1", 29500)  # deepspeed
    assert detect_ranks({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


def test_slurm(scontrol: None) -> None:
    assert detect_ranks(SLURM) == Ranks(5, 1, 8, 4, "n1", 20000 + 40007 % 20000)
    assert detect_ranks({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}) == Ranks(5, 1, 8, 4, "head", 1234)


def test_a_launcher_inside_a_slurm_step_wins(scontrol: None) -> None:
    assert detect_ranks({**SLURM, **LAUNCHED}).rank == 3


def test_slurm_without_scontrol_reads_plain_lists_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_ranks({**SLURM, "SLURM_STEP_NODELIST": "a,b"}).master_addr == "a"
    with pytest.raises(ConfigError, match=r"scontrol show hostnames n\[1-4\].*set MASTER_ADDR"):
        detect_ranks(SLURM)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK=0 but no WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK"),
        ({**LAUNCHED, "RANK": "4"}, "RANK is 4 but WORLD_SIZE is 4; RANK must be 0 to 3"),
        ({**LAUNCHED, "RANK": "x"}, "RANK is 'x'; expected a whole number"),
        ({key: LAUNCHED[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}, "MASTER_ADDR is not set"),
        ({**LAUNCHED, "LOCAL_RANK": "4"}, "LOCAL_RANK is 4 but RANK is 3"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, "8 tasks, so each would train alone"),
        ({key: value for key, value in SLURM.items() if key != "SLURM_PROCID"}, "SLURM_PROCID is not set"),
        ({**SLURM, "SLURM_PROCID": "8"}, "SLURM_PROCID is 8"),
    ],
)
def test_contradictions_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect_ranks(env)


PROGRAM = """
import os, sys, torch
from t2v_ds.training.distributed import connect, finish
c = connect()
assert connect() is c
t = torch.full((3,), float(c.rank + 1))
assert c.all_reduce_sum(t) is t and t.tolist() == [3.0] * 3
t = torch.full((2,), float(c.rank)); c.broadcast_(t); assert t.tolist() == [0.0, 0.0]
assert c.any(c.rank == 1) and not c.any(False)
assert c.gather_object({"r": c.rank}) == [{"r": 0}, {"r": 1}]
assert c.broadcast_object(f"from {c.rank}") == "from 0"
c.barrier()
print("rank", os.environ["RANK"], "fine")
finish(5 + c.rank)
"""


def test_collectives_on_two_real_ranks_and_the_exit_code() -> None:
    outcomes = run_ranks(["-c", PROGRAM], 2)
    assert [code for code, _ in outcomes] == [5, 6], outcomes
    assert all(f"rank {rank} fine" in output for rank, (_, output) in enumerate(outcomes))


def test_importing_training_needs_no_deepspeed() -> None:
    modules = "t2v_ds.training, t2v_ds.training.loop, t2v_ds.training.health, t2v_ds.training.monitor, t2v_ds.models.exported"
    program = f"import sys; sys.modules['deepspeed'] = None; import {modules}; assert 'tensorboard' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())
    quick = "import sys, t2v_ds.training.health; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", quick], check=True, env=environment())
