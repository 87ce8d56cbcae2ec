"""Compressed raw shards: the same frames, found one by one, in less space."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zstandard

from t2v_ds.config import IndexConfig, PrepareConfig
from t2v_ds.data.compression import decompress
from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.prepare import prepare
from t2v_ds.data.shards import index_path, npy_bytes, raw_members, write_shard
from t2v_ds.data.validate import index_folder, verify_folder
from t2v_ds.errors import DataError

SIDE, LENGTHS = 8, (5, 1, 9)


def frames_of(i: int) -> np.ndarray:
    """A gradient, and a little noise."""
    noise = np.random.default_rng(i).integers(0, 3, (LENGTHS[i], SIDE, SIDE, 3))
    return (noise + np.arange(SIDE)[:, None] * 10 + np.arange(LENGTHS[i])[:, None, None, None]).astype(np.uint8)


def write(folder: Path, compression: str = "zstd") -> Path:
    folder.mkdir()
    samples = [(f"k{i}", raw_members(frames_of(i), f"c{i}", [50] * LENGTHS[i], {}, compression)) for i in range(3)]
    Manifest.build("raw", [write_shard(folder / "raw-00000.tar", samples)], image_size=SIDE).save(folder)
    return folder


def entry(folder: Path, i: int) -> dict[str, Any]:
    clip: dict[str, Any] = json.loads(index_path(folder / "raw-00000.tar").read_text())["clips"][i]
    return clip


def flip(folder: Path, at: int) -> None:
    data = bytearray((folder / "raw-00000.tar").read_bytes())
    data[at] ^= 1
    (folder / "raw-00000.tar").write_bytes(data)


def test_clips_and_single_frames_are_those_that_were_written(tmp_path: Path) -> None:
    with ShardDataset(write(tmp_path / "data"), "raw") as data:
        for i in range(3):
            assert (data.read(i)["frames"] == frames_of(i)).all()
        chosen = [np.array([0, 8, 8]), np.array([4]), np.array([0])]
        found = data.read_frames(np.array([2, 0, 1]), chosen, Buffer())
        assert (found == np.concatenate([frames_of(i)[some] for i, some in zip((2, 0, 1), chosen, strict=True)])).all()
        data.verify()
    assert verify_folder(str(tmp_path / "data"))[1] == []


def test_only_the_frames_asked_for_are_read(tmp_path: Path) -> None:
    """The damage lies in another frame."""
    folder = write(tmp_path / "data")
    offset, size, _ = entry(folder, 2)["members"]["frames.npy.zst"]
    flip(folder, offset + size - 3)  # in the last frame
    with ShardDataset(folder, "raw") as data:
        assert (data.read_frames(np.array([2]), [np.arange(8)], Buffer()) == frames_of(2)[:8]).all()
        with pytest.raises(DataError, match=r"clip k2 .* is damaged .its checksum differs"):
            data.read_frames(np.array([2]), [np.array([8])], Buffer())
        with pytest.raises(DataError, match=r"clip k2 .* is damaged .its checksum differs"):
            data.read(2)
    assert "k2" in verify_folder(str(folder))[1][0]


def test_the_member_is_a_zstd_file_of_the_npy_file_also_for_webdataset(tmp_path: Path) -> None:
    samples = list(webdataset.WebDataset(str(write(tmp_path / "data") / "raw-00000.tar"), shardshuffle=False))
    for i, sample in enumerate(samples):
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(sample["frames.npy.zst"]), read_across_frames=True) as reader:
            assert (np.load(io.BytesIO(reader.read())) == frames_of(i)).all()
    assert len(samples) == 3


def test_prepare_writes_the_same_clips_in_less_space(tmp_path: Path) -> None:
    sizes = {}
    for compression in ("none", "zstd"):
        out = tmp_path / compression
        prepare(PrepareConfig(out=str(out), clips=20, image_size=64, workers=1, compression=compression))
        sizes[compression] = sum(path.stat().st_size for path in out.glob("*.tar"))
    with ShardDataset(tmp_path / "none", "raw") as plain, ShardDataset(tmp_path / "zstd", "raw") as packed:
        for i in range(20):
            assert (plain.read(i)["frames"] == packed.read(i)["frames"]).all()
    assert sizes["zstd"] < 0.3 * sizes["none"]
    with pytest.raises(DataError, match="was prepared with 'compression' 'zstd', this run has 'none'"):
        prepare(PrepareConfig(out=str(tmp_path / "zstd"), clips=20, image_size=64, workers=1))


def test_index_makes_the_same_index_and_takes_those_of_others(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    index = index_path(folder / "raw-00000.tar").read_bytes()
    for path in (index_path(folder / "raw-00000.tar"), folder / "manifest.json"):
        path.unlink()
    assert index_folder(IndexConfig(data=str(folder))).manifest.total_clips == 3
    assert json.loads(index_path(folder / "raw-00000.tar").read_bytes())["clips"] == json.loads(index)["clips"]
    others = tmp_path / "others"
    others.mkdir()
    whole = zstandard.ZstdCompressor().compress(npy_bytes(frames_of(0)))  # one zstd frame, and nothing in the text about it
    text = json.dumps({"caption": "c0", "durations_ms": [50] * 5, "provenance": {}}).encode()
    with webdataset.TarWriter(str(others / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "k0", "frames.npy.zst": whole, "json": text})
    index_folder(IndexConfig(data=str(others)))
    with ShardDataset(others, "raw") as data:
        assert (data.read(0)["frames"] == frames_of(0)).all()
        assert (data.read_frames(np.array([0]), [np.array([3])], Buffer()) == frames_of(0)[3:4]).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda members: members.update({"frames.npy.zst": members["frames.npy.zst"][:-9]}), "array_size"),
        (lambda members: members.update({"frames.npy.zst": b"no zstd"}), "zstd"),
        (lambda members: members.update({"json": members["json"].replace(b'"frame_bytes": [', b'"frame_bytes": [1, ')}), "json_fields"),
        (lambda members: members.update({"frames.npy.zst": zstandard.compress(b"no array")}), "npy_header"),
    ],
)
def test_a_bad_one_is_listed_with_its_reason(change: Any, reason: str, tmp_path: Path) -> None:
    good, bad = (raw_members(frames_of(0), "c", [50] * 5, {}, "zstd") for _ in range(2))
    change(bad)
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for key, members in (("good", good), ("bad", bad)):
            writer.write({"__key__": key, **members})
    assert dict(index_folder(IndexConfig(data=str(tmp_path), max_bad_share=0.6)).quarantined) == {reason: 1}


def test_no_more_is_decompressed_than_there_can_be() -> None:
    bomb = zstandard.compress(bytes(10**8))
    assert len(bomb) < 20_000
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        decompress(bomb, 1000)
