"""The command of the README under every launcher: the same training, to the digits that one process gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from t2v_ds.config import PrepareConfig
from t2v_ds.data.prepare import prepare
from t2v_ds.training.distributed import free_port
from tests.helpers import environment, finish, run_deepspeed, run_ranks, run_torchrun, start

CONFIG = """
frames_per_clip: 2
model:
  {image_size: 16, stem_channels: 8, channel_multipliers: [1, 2], residual_blocks: [0, 1], norm_groups: 4,
   quantizer: {codebook_size: 24, codebook_dim: 8, revive_every: 3, dead_below: 0.5}}
losses: {perceptual: 0}
train: {steps: 6, batch: 4, precision: fp32, learning_rate: 3.0e-3, warmup_steps: 2, log_every: 1, save_every: 4, visual_every: 0}
"""
T2V = Path(sys.executable).with_name("t2v")  # the installed command
SCONTROL = '#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] || exit 1\necho 127.0.0.1\necho 127.0.0.2\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    prepare(PrepareConfig(out=str(folder / "raw"), clips=12, image_size=16, max_frames=18, workers=1))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def command(folder: Path, out: str) -> list[str]:
    return ["train-vqvae", "--config", str(folder / "config.yaml"), "--data", str(folder / "raw"), "--out", str(folder / out)]


def curve(run: Path) -> list[float]:
    assert json.loads((run / "DONE").read_text())["step"] == 6
    assert (run / "model.safetensors").is_file()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """By `t2v train-vqvae`, as installed."""
    code, output = run_ranks([str(T2V), *command(folder, "alone")], 1)[0]
    assert code == 0, output
    losses = curve(folder / "alone")
    assert len(set(losses)) == 6
    return losses


def run_srun(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Two processes with what srun sets in its tasks."""
    commands = folder / "commands"
    commands.mkdir()
    (commands / "scontrol").write_text(SCONTROL)
    (commands / "scontrol").chmod(0o755)
    port = next(port for port in iter(free_port, None) if 20000 <= port < 40000)  # the one that is made of the job's id
    slurm = {
        "SLURM_JOB_ID": str(port - 20000), "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
        "PATH": f"{commands}:{environment()['PATH']}",
    }  # fmt: skip
    tasks = [start([str(T2V), *arguments], **slurm, SLURM_PROCID=str(rank), SLURM_LOCALID="0") for rank in range(2)]
    outcomes = finish(tasks)
    return max(code for code, _ in outcomes), "\n".join(output for _, output in outcomes)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed --module", "deepspeed --no_python", "srun"])
def test_the_same_command_under_every_launcher(folder: Path, alone: list[float], launcher: str) -> None:
    arguments = command(folder, launcher.replace(" ", ""))
    if launcher == "torchrun":
        code, output = run_torchrun(["--module", "t2v_ds", *arguments], 2)
    elif launcher == "deepspeed --module":
        code, output = run_deepspeed(["--module", "t2v_ds", *arguments], 2)
    elif launcher == "deepspeed --no_python":
        code, output = run_deepspeed(["--no_python", "t2v", *arguments], 2)
    else:
        code, output = run_srun(folder, arguments)
    assert code == 0, output
    assert output.count(": codebook/") == 1, output  # only rank 0 says how it ended
    torch.testing.assert_close(curve(folder / launcher.replace(" ", "")), alone, rtol=1e-6, atol=0)
    assert "rank 0 of 2" in output
