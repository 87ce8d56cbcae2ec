"""Readers killed a hundred times, and each time resumed as another number of ranks and threads: nothing twice, nothing missed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_ds.data.manifest import Manifest
from t2v_ds.data.shards import raw_members, token_members, write_shard
from tests.helpers import ROOT, environment

CLIPS, SHARDS = 403, 7  # no multiple of a step


def write_data(folder: Path, kind: str, clips: int = CLIPS) -> Path:
    """Clips of 2 to 6 frames whose every frame says which clip it is of."""
    folder.mkdir()
    shards = []
    for shard, numbers in enumerate(np.array_split(np.arange(clips), SHARDS)):
        members = []
        for number in numbers.tolist():
            length = 2 + number % 5
            if kind == "raw":
                frames = np.zeros((length, 4, 4, 3), dtype=np.uint8)
                frames[..., 0], frames[..., 1], frames[..., 2] = number % 256, number // 256, np.arange(length)[:, None, None]
                members.append((f"k{number}", raw_members(frames, "", [50] * length, {})))
            else:
                members.append((f"k{number}", token_members(np.full((length, 2, 2), number), "", [50] * length, {})))
        shards.append(write_shard(folder / f"{kind}-{shard:05d}.tar", members))
    fields = {"image_size": 4} if kind == "raw" else {"grid_size": 2, "codebook_size": 65536, "tokenizer_id": "t"}
    Manifest.build(kind, shards, **fields).save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {kind: write_data(folder / kind, kind) for kind in ("tokens", "raw")}


def drill(data: Path, work: Path, **settings: Any) -> dict[str, Any]:
    work.mkdir()
    command = [sys.executable, "-m", "tests.fault.stream_drill", str(data), str(work), json.dumps({"epochs": 3, "seed": 5, **settings})]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("kind", "kills", "order"),
    [("tokens", 100, {}), ("raw", 30, {"window": 3}), ("tokens", 30, {"buckets": 4})],
    ids=["plain", "windows", "buckets"],
)
def test_killed_readers_read_what_they_would_have_read(
    kind: str, kills: int, order: dict[str, int], data: dict[str, Path], tmp_path: Path
) -> None:
    calm = drill(data[kind], tmp_path / "calm", kind=kind, kills=0, **order)
    stormy = drill(data[kind], tmp_path / "stormy", kind=kind, kills=kills, **order)
    assert stormy["kills"] == kills
    assert stormy["worlds"] == [1, 2, 4]
    assert stormy["lost"] > kills  # the kills did cost work
    for result in (calm, stormy):
        assert result["repeats"] == result["misses"] == 0
        assert result["in order"]
        assert result["read again alike"]
    assert stormy["samples"] == calm["samples"]  # with the frames that were drawn


@pytest.mark.parametrize("fault", ["counts what is read", "restarts the epoch"])
def test_the_drill_finds_a_fault(fault: str, data: dict[str, Path], tmp_path: Path) -> None:
    result = drill(data["tokens"], tmp_path / "work", kind="tokens", kills=15, fault=fault)
    assert result["kills"] == 15
    assert result["misses"] > 0
    assert not result["in order"]
