"""A real `t2v`, and one tiny trained chain that the tests share and never change."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import ROOT, environment

VQVAE: dict[str, Any] = {
    "frames_per_clip": 2,
    "model": {
        "image_size": 32, "stem_channels": 8, "channel_multipliers": [1, 2], "residual_blocks": [0, 1], "norm_groups": 4,
        "quantizer": {"codebook_size": 32, "codebook_dim": 8, "warmup_steps": 2},
    },
    "losses": {"perceptual": 0},
    "train": {"steps": 6, "batch": 4, "save_every": 3, "visual_every": 0, "log_every": 2, "warmup_steps": 2},
}  # fmt: skip
TRANSFORMER: dict[str, Any] = {
    "model": {"width": 16, "layers": 1, "heads": 2, "group": 2},
    "text": {"tokens": 12, "width": 16},
    "train": {"steps": 4, "batch": 4, "save_every": 2, "visual_every": 0, "log_every": 2, "warmup_steps": 2},
}
TEXT = ("text.encoder=hashing", "text.tokens=12", "text.width=16")  # what the demo has its captions stored with
DEMO: dict[str, Any] = {
    "prepare": {"clips": 40, "image_size": 32, "max_frames": 16, "shard_clips": 16, "chunk_clips": 20, "workers": 1},
    "vqvae": VQVAE,
    "transformer": TRANSFORMER,
    "evaluate": {"prompts": 2, "batch": 2, "reconstruction_clips": 2},
}


def t2v(*arguments: str | Path, limit: Callable[[], None] | None = None, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run `t2v ARGUMENTS` to its end; `limit` is called in the new process before it starts."""
    command = [sys.executable, "-m", "t2v_ds", *map(str, arguments)]
    env = environment(PYTHONDONTWRITEBYTECODE="1")  # a cut .pyc, written under a limit of file sizes, would outlive the test
    return subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, start_new_session=True, preexec_fn=limit
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence with which `t2v` refused; fails the test if it ended in any other way."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "t2v: error" not in done.stdout
    # A progress bar ends its line by itself: the sentence begins one.
    sentences = [line for line in done.stderr.splitlines() if "t2v: error" in line]
    assert len(sentences) == 1, done.stderr
    assert sentences[0].startswith("t2v: error: ")
    assert done.stderr.rstrip().endswith(sentences[0])  # and is the last word
    return sentences[0].removeprefix("t2v: error: ")


@dataclass(frozen=True)
class Trained:
    """Folders of a finished tiny demo; do not write into them."""

    raw: Path
    tokenizer: Path
    tokens: Path
    generator: Path
    vqvae_config: Path
    transformer_config: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    for name, settings in (("demo", DEMO), ("vqvae", VQVAE), ("transformer", TRANSFORMER)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    done = t2v("demo", "--config", folder / "demo.yaml", "--out", folder / "run", timeout_s=300)
    assert done.returncode == 0, done.stderr
    parts = [folder / "run" / name for name in ("raw", "tokenizer", "tokens", "generator")]
    return Trained(*parts, folder / "vqvae.yaml", folder / "transformer.yaml")
