"""`deepspeed --hostfile` over real ssh: two network namespaces stand for two nodes, each with an sshd and an address of its own.

Both models, ZeRO 0 and 3: the losses are those of one rank on one node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from t2v_ds.config import PrepareConfig, TokenizeConfig
from t2v_ds.data.prepare import prepare
from t2v_ds.tokenize import tokenize
from tests.helpers import environment, finish, run_ranks, start_command

ADDRESSES = ("10.77.0.1", "10.77.0.2")
TRAIN = ["train.steps=6", "train.batch=4", "train.precision=fp32", "train.warmup_steps=2", "train.log_every=1", "train.visual_every=0"]
SETTINGS = {
    "train-vqvae": [
        "frames_per_clip=2", "model.image_size=16", "model.stem_channels=8", "model.channel_multipliers=[1,2]",
        "model.residual_blocks=[0,1]", "model.norm_groups=4", "model.quantizer.codebook_size=24", "model.quantizer.codebook_dim=8",
        "losses.perceptual=0", *TRAIN,
    ],
    "train-transformer": [
        "model.width=16", "model.layers=1", "model.heads=2", "model.group=2", "text.tokens=12", "text.width=16",
        'sample_prompts=["a red circle moves right"]', *TRAIN,
    ],
}  # fmt: skip
SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd-{address}.pid
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""
SSH = """#!/bin/sh
exec /usr/bin/ssh -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"
"""


class Nodes:
    """Two network namespaces with a cable between them, and sshd in each; what runs on the first reaches the second by ssh alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(f"t2v{os.getpid()}{side}" for side in "ab")

    def set_up(self) -> None:
        for key in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
        commands = self.folder / "commands"
        commands.mkdir()
        (commands / "ssh").write_text(SSH.format(folder=self.folder))
        (commands / "ssh").chmod(0o755)
        (self.folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        first, second = self.names
        for name in self.names:
            self._ip("netns", "add", name)
        self._ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            self._ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self._ip("-n", name, "link", "set", device, "up")
            config = self.folder / f"sshd-{address}.conf"
            config.write_text(SSHD.format(address=address, folder=self.folder))
            subprocess.run(["ip", "netns", "exec", name, "/usr/sbin/sshd", "-f", str(config)], check=True)

    def tear_down(self) -> None:
        for pid in self.folder.glob("sshd-*.pid"):
            subprocess.run(["kill", pid.read_text().strip()], check=False)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)

    def deepspeed(self, arguments: list[str], where: Path, **more: str) -> tuple[int, str]:
        """The launcher on the first node, called from the folder `where`; (exit code, output of all)."""
        env = environment(**more)
        env["PATH"] = f"{self.folder / 'commands'}:{env['PATH']}"
        command = ["ip", "netns", "exec", self.names[0], sys.executable, "-m", "deepspeed.launcher.runner"]
        command += ["--hostfile", str(self.folder / "hostfile"), "--master_addr", ADDRESSES[0], *arguments]
        return finish([start_command(command, env, where)])[0]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        nodes.set_up()
        yield nodes
    finally:
        nodes.tear_down()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data of each model, and in "alone" both trained by one rank."""
    folder = tmp_path_factory.mktemp("hostfile")
    prepare(PrepareConfig(out=str(folder / "raw"), clips=12, image_size=16, max_frames=18, workers=1))
    found = {"alone": folder, "train-vqvae": folder / "raw", "train-transformer": folder / "tokens"}
    train(folder / "train-vqvae", "train-vqvae", found, "zero0")
    tokenize(TokenizeConfig(data=str(folder / "raw"), tokenizer=str(folder / "train-vqvae"), out=str(folder / "tokens")))
    train(folder / "train-transformer", "train-transformer", found, "zero0")
    return found


def command(out: Path, verb: str, inputs: dict[str, Path], stage: str) -> list[str]:
    return [verb, "--data", str(inputs[verb]), "--out", str(out), f"train.ds_config={stage}", *SETTINGS[verb]]


def train(out: Path, verb: str, inputs: dict[str, Path], stage: str) -> None:
    code, output = run_ranks(["-m", "t2v_ds", *command(out, verb, inputs, stage)], 1)[0]
    assert code == 0, output


def curve(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("verb", ["train-vqvae", "train-transformer"])
@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_two_nodes_train_as_one(nodes: Nodes, inputs: dict[str, Path], tmp_path: Path, verb: str, stage: str) -> None:
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    arguments = ["--module", "t2v_ds", *command(tmp_path / "run", verb, inputs, stage)]
    code, output = nodes.deepspeed(arguments, tmp_path)
    assert code == 0, output
    assert all(f"{address}: " in output for address in ADDRESSES), output
    assert "rank 0 of 2" in output
    assert (tmp_path / "run/model.safetensors").is_file()
    torch.testing.assert_close(curve(tmp_path / "run"), curve(inputs["alone"] / verb), rtol=2e-6, atol=0)


def test_the_environment_file_reaches_the_other_node(nodes: Nodes, inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nT2V_VQ_CPU=quantum\n")
    arguments = ["--module", "t2v_ds", *command(tmp_path / "run", "train-vqvae", inputs, "zero0")]
    code, output = nodes.deepspeed(arguments, tmp_path)
    assert code != 0
    for address in ADDRESSES:
        said = [line for line in output.splitlines() if line.startswith(f"{address}: ")]
        assert any("T2V_VQ_CPU is 'quantum'" in line for line in said), output
