"""slurm/train.sbatch with stand-ins for SLURM's commands: one step a job, signals passed on, requeued only when unfinished."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALLS/srun"
env | grep ^MASTER_ > "$CALLS/rendezvous"
[ -z "${FINISH:-}" ] || touch "$FINISH"
trap 'echo usr1 >> "$CALLS/signals"; sleep 0.3; exit "${STOP_CODE:-0}"' USR1
touch "$CALLS/running"
for _ in $(seq "${TENTHS:-0}"); do sleep 0.1; done
exit "${CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$CALLS/scontrol"
[ "$1" != show ] || { echo alpha; seq 20000; }  # more than a pipe holds
"""


class Job:
    def __init__(self, folder: Path, **env: str) -> None:
        self.calls = folder / "calls"
        self.run = folder / "run with space"
        for made in (self.calls, self.run, folder / "bin"):
            made.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        spooled = folder / "slurm_script"  # SLURM runs a copy
        spooled.write_text(SCRIPT.read_text())
        slurm = {"SLURM_JOB_ID": "30007", "SLURM_JOB_NODELIST": "alpha,beta", "SLURM_NTASKS": "4"}
        slurm["SLURM_SUBMIT_DIR"] = str(SCRIPT.parents[1])
        self.env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.calls), **slurm, **env}
        self.command = ["bash", str(spooled)]

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.command, *arguments], env=self.env, cwd=self.calls, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def train(self) -> "subprocess.Popen[str]":
        return self.start("train-vqvae", "--data", "d", "--out", str(self.run), "train.batch=64")

    def said(self, name: str) -> list[str]:
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> bool:
        return "requeue 30007" in self.said("scontrol")

    def wait_until_running(self) -> None:
        deadline = time.monotonic() + 20
        while not (self.calls / "running").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_one_step_with_the_arguments_as_given(tmp_path: Path) -> None:
    job = Job(tmp_path)
    process = job.train()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    step = ["--kill-on-bad-exit=1", "--label", "t2v", "train-vqvae", "--data", "d", "--out", str(job.run), "train.batch=64"]
    assert job.said("srun") == step
    assert sorted(job.said("rendezvous")) == ["MASTER_ADDR=alpha", "MASTER_PORT=30007"]
    assert not job.requeued


@pytest.mark.parametrize("code", [3, 137])
def test_a_failed_step_fails_the_job(tmp_path: Path, code: int) -> None:
    job = Job(tmp_path, CODE=str(code))
    process = job.train()
    process.communicate(timeout=30)
    assert process.returncode == code
    assert not job.requeued


@pytest.mark.parametrize(
    ("env", "done", "code", "requeued"),
    [({}, False, 0, True), ({}, True, 0, False), ({"STOP_CODE": "5"}, False, 5, False)],
    ids=["unfinished", "finished", "failed-while-stopping"],
)
def test_usr1_is_passed_on_and_only_an_unfinished_run_is_requeued(
    tmp_path: Path, env: dict[str, str], done: bool, code: int, requeued: bool
) -> None:
    job = Job(tmp_path, TENTHS="150", **env)
    if done:
        job.env["FINISH"] = str(job.run / "DONE")
    process = job.train()
    job.wait_until_running()
    process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as `--signal=B:USR1` does
    output, _ = process.communicate(timeout=30)
    assert job.said("signals") == ["usr1"], output
    assert process.returncode == code, output
    assert job.requeued == requeued


def test_missing_arguments_are_named_before_anything_starts(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for arguments, message in (((), "usage: sbatch"), (("train-vqvae", "--data", "d"), "--out RUN is missing")):
        process = job.start(*arguments)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 2
        assert message in output
    assert not job.said("srun")
    job.start("train-vqvae", f"--out={job.run}").communicate(timeout=30)
    assert job.said("srun")[-1] == f"--out={job.run}"
