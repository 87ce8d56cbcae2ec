"""Trainings on two nodes of a real cluster that lose a rank, or wait for one: ended within seconds, with the reason in the log."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from t2v_ds.config import PrepareConfig
from t2v_ds.data.prepare import prepare
from tests.slurm.cluster import Slurm

TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--no-requeue"]
SETTINGS = [
    "frames_per_clip=1", "model.image_size=16", "model.stem_channels=8", "model.channel_multipliers=[1,2]", "model.residual_blocks=[0,1]",
    "model.norm_groups=8", "model.quantizer.codebook_size=16", "model.quantizer.codebook_dim=4", "losses.perceptual=0", "losses.ssim=0",
    "train.batch=4", "train.precision=fp32", "train.warmup_steps=2", "train.save_every=20", "train.log_every=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(slurm: Slurm) -> Path:
    folder = slurm.folder / "jobs"
    prepare(PrepareConfig(out=str(folder / "raw"), clips=12, image_size=16, max_frames=18, workers=1))
    return folder


def train(slurm: Slurm, script: str, out: Path, *more: str) -> Path:
    return slurm.submit(script, out, TWO_NODES, ["train-vqvae", "--data", str(out.parent / "raw"), *SETTINGS, *more])


def processes(run: Path) -> dict[int, int]:
    """Process of each rank of a run."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            variables = dict(one.partition(b"=")[::2] for one in (entry / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        rank = variables.get(b"RANK", variables.get(b"SLURM_PROCID"))
        if str(run).encode() in command and b"python" in command[0] and b"launcher" not in b" ".join(command) and rank is not None:
            found[int(rank)] = int(entry.name)
    return found


def test_the_launcher_without_ssh_and_a_rank_that_dies(slurm: Slurm, folder: Path) -> None:
    out = folder / "launched"
    log = train(slurm, "deepspeed.sbatch", out, "train.steps=2000")
    slurm.wait(lambda: list(out.glob("checkpoints/step_????????")), "a checkpoint", folder)
    ranks = processes(out)
    assert set(ranks) == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    slurm.wait(lambda: not slurm.queue(), "the job's end", folder, 60)
    assert time.monotonic() - killed < 40
    assert not (out / "DONE").exists()
    train(slurm, "deepspeed.sbatch", out, "train.steps=2000")
    slurm.wait(lambda: "resumed" in log.read_text(), "the resumed run", folder)
    slurm.call("scancel", "--name=t2v")
    slurm.wait(lambda: not slurm.queue(), "the job's end", folder)


def test_a_rank_that_everybody_waits_for_is_named(slurm: Slurm, folder: Path) -> None:
    out = folder / "waiting"
    log = train(slurm, "train.sbatch", out, "train.steps=100000", "train.watchdog_s=6")
    slurm.wait(lambda: list(out.glob("checkpoints/step_????????")), "a checkpoint", folder)
    os.kill(processes(out)[1], signal.SIGSTOP)
    slurm.wait(lambda: not slurm.queue(), "the job's end", folder, 90)
    said = next(line for line in log.read_text().splitlines() if "rank 0 hangs at step" in line)
    assert "rank 1 is silent since step" in said
