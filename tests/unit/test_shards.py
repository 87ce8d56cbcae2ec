"""Shards: bytes that are the same every time, read by us and by others, and never read when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.shards import index_path, load_shard_info, raw_members, read_shard, token_members, write_shard
from t2v_ds.errors import DataError
from t2v_ds.kernels.clips import Files


def clip(i: int) -> tuple[np.ndarray, str, list[int], dict[str, Any]]:
    rng = np.random.default_rng(i)
    frames = rng.integers(0, 256, (2 + i % 3, 6, 6, 3), dtype=np.uint8)
    return frames, f"caption {i} é", [50 + i] * len(frames), {"source": "test", "attributes": {"n": i}}


def build(folder: Path, kind: str = "raw", clips: int = 7, shard_clips: int = 3, **fields: Any) -> Manifest:
    """Shards of 3 clips; chunk 0 is the first two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, first in enumerate(range(0, clips, shard_clips)):
        samples = []
        for i in range(first, min(first + shard_clips, clips)):
            frames, *rest = clip(i)
            members = raw_members(frames, *rest) if kind == "raw" else token_members(frames[..., 0].astype(np.int64) * 4, *rest)
            samples.append((f"{i:08d}", members))
        shards.append(write_shard(folder / f"{kind}-{number:05d}.tar", iter(samples), chunk=number // 2))
    manifest = Manifest.build(kind, shards, image_size=6, **fields)
    manifest.save(folder)
    return manifest


def test_reads_back_what_was_written_and_the_manifest_adds_up(tmp_path: Path) -> None:
    manifest = build(tmp_path, rejected={"too_long": 2})
    data = ShardDataset(tmp_path, "raw")
    assert len(data) == manifest.total_clips == 7
    assert data.lengths.tolist() == [2, 3, 4, 2, 3, 4, 2]
    assert manifest.total_frames == 20
    assert manifest.frames_histogram == {"2": 3, "3": 2, "4": 2}
    assert [chunk["shards"] for chunk in manifest.chunks] == [["raw-00000.tar", "raw-00001.tar"], ["raw-00002.tar"]]
    assert data.shard_ranges == [range(3), range(3, 6), range(6, 7)]
    for i in range(7):
        frames, caption, durations, provenance = clip(i)
        sample = data.read(i)
        assert (sample["frames"] == frames).all()
        assert sample["frames"].dtype == np.uint8
        assert sample["key"] == data.key(i) == f"{i:08d}"
        assert sample["caption"] == data.caption(i) == caption
        assert sample["durations_ms"] == durations
        assert sample["provenance"] == provenance
        assert sample["attributes"] == {"n": i}
    data.verify()
    assert Manifest.load(tmp_path) == manifest
    assert Manifest.load(tmp_path, "raw").digest() == data.digest
    with pytest.raises(IndexError):
        data.read(7)


def test_a_chunk_is_a_data_set_of_its_own(tmp_path: Path) -> None:
    build(tmp_path)
    chunks = [ShardDataset(tmp_path, "raw", chunk) for chunk in (0, 1)]
    assert [[data.key(i) for i in range(len(data))] for data in chunks] == [[f"{i:08d}" for i in range(6)], ["00000006"]]
    assert chunks[1].read(0)["caption"] == "caption 6 é"
    assert chunks[0].digest != chunks[1].digest
    with pytest.raises(DataError, match=r"no chunk 2; it has chunks \[0, 1\]"):
        ShardDataset(tmp_path, "raw", 2)


def test_tokens_are_uint16(tmp_path: Path) -> None:
    build(tmp_path, "tokens", grid_size=6, codebook_size=1024, tokenizer_id="abc")
    sample = ShardDataset(tmp_path, "tokens").read(4)
    assert sample["codes"].dtype == np.uint16
    assert (sample["codes"] == clip(4)[0][..., 0].astype(int) * 4).all()
    assert Manifest.load(tmp_path).tokenizer_id == "abc"
    with pytest.raises(DataError, match=r"holds token shards.*expected raw"):
        ShardDataset(tmp_path, "raw")
    with pytest.raises(ValueError, match="uint16"):
        token_members(np.full((1, 2, 2), 65536), "x", [1], {})


@pytest.mark.parametrize("kind", ["raw", "tokens"])
def test_the_webdataset_package_reads_our_shards(tmp_path: Path, kind: str) -> None:
    import webdataset

    build(tmp_path, kind)
    ours = ShardDataset(tmp_path, kind)
    name = "frames" if kind == "raw" else "codes"
    urls = [str(tmp_path / shard.name) for shard in ours.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in theirs] == [ours.key(i) for i in range(7)]
    for i, sample in enumerate(theirs):
        mine = ours.read(i)
        assert sample[f"{name}.npy"].dtype == mine[name].dtype
        assert (sample[f"{name}.npy"] == mine[name]).all()
        assert sample["json"]["caption"] == mine["caption"]
        assert sample["json"]["durations_ms"] == mine["durations_ms"]


def test_bytes_depend_on_nothing_but_the_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 2e9)
    build(tmp_path / "elsewhere" / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 7  # 3 shards, 3 indexes, 1 manifest and nothing temporary
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "elsewhere" / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "raw-00000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.pax_headers == {}) for m in members} == {(0, 0, 0, "", True)}
    assert (tmp_path / "a" / "raw-00000.tar").stat().st_size % tarfile.RECORDSIZE == 0


def test_every_flipped_byte_of_a_clip_is_noticed(tmp_path: Path) -> None:
    build(tmp_path, clips=3)
    shard = tmp_path / "raw-00000.tar"
    good = shard.read_bytes()
    offset, size, _ = json.loads(index_path(shard).read_text())["clips"][1]["members"]["frames.npy"]
    for place in (offset, offset + size // 2, offset + size - 1):
        shard.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        data = ShardDataset(tmp_path, "raw")
        data.read(0)
        with pytest.raises(DataError, match=r"clip 00000001 of shard .*raw-00000\.tar is damaged.*t2v prepare"):
            data.read(1)
        with pytest.raises(DataError, match=r"raw-00000\.tar is damaged .its sha256"):
            data.verify()
        with pytest.raises(DataError, match="00000001"):
            list(read_shard(shard))


def test_a_shard_cut_while_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    build(tmp_path, clips=3)
    data = ShardDataset(tmp_path, "raw")
    data.read(0)
    with (tmp_path / "raw-00000.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match="damaged"):
        data.read(2)


def test_what_is_missing_or_changed_is_named(tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        folder = tmp_path / name
        build(folder)
        return folder

    with pytest.raises(DataError, match="nowhere does not exist: make it with t2v prepare"):
        ShardDataset(tmp_path / "nowhere", "raw")
    (broken("a") / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json.*has not finished"):
        ShardDataset(tmp_path / "a", "raw")
    (broken("b") / "raw-00001.tar").unlink()
    with pytest.raises(DataError, match=r"raw-00001\.tar is missing"):
        ShardDataset(tmp_path / "b", "raw")
    with (broken("c") / "raw-00002.tar").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=r"raw-00002\.tar has \d+ bytes instead of"):
        ShardDataset(tmp_path / "c", "raw")
    index = broken("d") / "raw-00000.index.json"
    index.write_text(index.read_text().replace("caption 1", "caption 9"))
    with pytest.raises(DataError, match=r"raw-00000\.index\.json is not the one"):
        ShardDataset(tmp_path / "d", "raw")
    (broken("e") / "manifest.json").write_text('{"kind": "raw", "format": "t2v_ds.raw/2"}')
    with pytest.raises(DataError, match=r"not a manifest that this version reads: expected format t2v_ds\.raw/1"):
        ShardDataset(tmp_path / "e", "raw")
    (broken("f") / "manifest.json").write_text('{"kind": "ra')
    with pytest.raises(DataError, match="cannot be read"):
        ShardDataset(tmp_path / "f", "raw")
    shutil.rmtree(tmp_path / "f")


def test_a_shard_that_fails_while_written_leaves_no_shard(tmp_path: Path) -> None:
    def failing() -> Any:
        yield "00000000", raw_members(*clip(0))
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "raw-00000.tar", failing())
    assert not (tmp_path / "raw-00000.tar").exists()
    assert not index_path(tmp_path / "raw-00000.tar").exists()
    info = write_shard(tmp_path / "raw-00000.tar", [("00000000", raw_members(*clip(0)))])
    assert info == load_shard_info(tmp_path / "raw-00000.tar")
    assert info.sha256 == hashlib.sha256((tmp_path / "raw-00000.tar").read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw-00000.index.json", "raw-00000.tar"]


def test_many_threads_and_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2v_ds.data.dataset._OPEN_FILES", 2)
    build(tmp_path, clips=12, shard_clips=2)
    data = ShardDataset(tmp_path, "raw")
    wrong: list[int] = []

    def check(offset: int) -> None:
        for n in range(60):
            i = (offset * 5 + n * 7) % 12
            if (data.read(i)["frames"] != clip(i)[0]).any():
                wrong.append(i)

    threads = [threading.Thread(target=check, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    data.close()
    assert (data.read(3)["frames"] == clip(3)[0]).all()  # opens again


def test_no_more_shards_are_open_than_may_be_and_none_is_opened_twice_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2v_ds.data.dataset._OPEN_FILES", 3)
    build(tmp_path, clips=16, shard_clips=2)
    opened: list[int] = []
    monkeypatch.setattr(Files, "open", lambda self, number, path, plain=Files.open: (opened.append(number), plain(self, number, path))[1])
    data, numbers = ShardDataset(tmp_path, "raw"), np.arange(15, -1, -1)
    found = data.read_frames(numbers, [np.array([0])] * 16, Buffer())
    assert (found == np.stack([clip(int(i))[0][0] for i in numbers])).all()
    assert (data._files.descriptors >= 0).sum() == 3
    opened.clear()
    for _ in range(5):
        for i in (5, 7, 9):
            data.read(i)
    assert len(opened) <= 3


def test_a_forked_process_reads_and_closes_though_a_read_was_under_way(tmp_path: Path) -> None:
    build(tmp_path)
    data = ShardDataset(tmp_path, "raw")
    data.read(0)
    with data._lock:  # as another thread holds it at that moment
        data._reads += 1
        child = os.fork()
        if child == 0:
            right = (data.read(4)["frames"] == clip(4)[0]).all()
            data.close()
            os._exit(0 if right and (data._files.descriptors == -1).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
