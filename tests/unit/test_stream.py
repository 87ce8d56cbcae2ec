"""The stream: one global order, whatever the world size, the threads and the restarts."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from t2v_ds.data.collate import frames_batch, pack_codes
from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.order import sample_at
from t2v_ds.data.shards import raw_members, token_members, write_shard
from t2v_ds.data.stream import ClipStream, Places, random_frames, whole_codes
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.kernels import clips

SEED = 3


class Numbers:
    """A data set whose sample i says i."""

    def __init__(self, size: int = 20, digest: str = "d" * 64, broken: int = -1) -> None:
        self.size, self.digest, self.broken = size, digest, broken
        self.reads = 0
        self.most = 0
        self.inside = 0
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def read(self, i: int) -> dict[str, Any]:
        with self.lock:
            self.reads += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.0005 * (i % 3))  # so that threads finish out of order
        with self.lock:
            self.inside -= 1
        if i == self.broken:
            raise DataError(f"clip {i} is damaged")
        return {"key": str(i), "i": i}


def with_random(dataset: Numbers, places: Places, buffer: Buffer) -> dict[str, Any]:
    memory = buffer.take(len(places.numbers))
    memory[:] = [dataset.read(i)["i"] for i in places.numbers.tolist()]
    return {"i": memory, "random": [int(rng.integers(2**40)) for rng in places.rngs()]}


def expected(count: int, size: int = 20) -> list[int]:
    return [sample_at(SEED, position, size)[1] for position in range(count)]


def steps(streams: list[ClipStream], count: int) -> list[tuple[int, int]]:
    """Take whole steps from the streams of all ranks; the samples' numbers and random numbers in the global order."""
    taken = []
    for _ in range(count):
        for stream in streams:
            held: list[dict[str, Any]] = []
            for _ in range(stream.micro_steps):
                held.append(next(stream))
                if len(held) == 2:  # one more has been taken since: its buffer must not have been used again
                    taken += samples(held.pop(0))
            taken += [sample for batch in held for sample in samples(batch)]
    return taken


def samples(batch: dict[str, Any]) -> list[tuple[int, int]]:
    return list(zip(batch["i"].tolist(), batch["random"], strict=True))


def streams(world_size: int, batch: int = 12, **settings: Any) -> list[ClipStream]:
    settings = {"threads": 2, "load": with_random, **settings}
    return [ClipStream(Numbers(), batch, rank, world_size, SEED, **settings) for rank in range(world_size)]


@pytest.mark.parametrize(("world_size", "threads", "micro"), [(1, 0, None), (1, 3, 4), (2, 2, 3), (3, 1, 2), (4, 0, 1), (6, 2, None)])
def test_the_global_order_and_its_random_numbers_are_the_same_everywhere(world_size: int, threads: int, micro: int | None) -> None:
    reference = steps(streams(1, threads=0), 4)
    assert [i for i, _ in reference] == expected(48)
    group = streams(world_size, threads=threads, micro_batch=micro)
    assert steps(group, 4) == reference
    assert {stream.consumed for stream in group} == {48}
    assert group[0].epoch == pytest.approx(2.4)
    for stream in group:
        stream.close()


def test_kill_and_resume_anywhere_on_any_number_of_ranks() -> None:
    """Seven runs killed at random points (also inside a step) see every position once, in order."""
    rng = np.random.default_rng(0)
    seen: list[tuple[int, int]] = []
    state: dict[str, Any] | None = None
    for world_size in (1, 2, 4, 3, 6, 2, 1):
        group = streams(world_size, threads=int(rng.integers(0, 3)), micro_batch=12 // world_size // int(rng.integers(1, 3)))
        for stream in group:
            if state is not None:
                stream.load_state_dict(state)
        seen += steps(group, int(rng.integers(1, 5)))
        state = group[-1].state_dict()
        assert all(stream.state_dict() == state for stream in group)
        for stream in group:
            if stream.micro_steps > 1:
                next(stream)  # handed over, but its step was never finished: it will be repeated
                assert stream.state_dict() == state
            stream.close()
    assert len(seen) > 100
    assert seen == steps(streams(1, threads=0), len(seen) // 12)


def test_resume_with_another_batch_goes_on_at_the_same_sample() -> None:
    first = streams(1)[0]
    seen = steps([first], 2)
    second = streams(1, batch=5)[0]
    second.load_state_dict(first.state_dict())
    seen += steps([second], 3)
    assert [i for i, _ in seen] == expected(39)
    for stream in (first, second):
        stream.close()


def test_going_back_drops_what_was_read_ahead() -> None:
    with streams(1)[0] as stream:
        start = stream.state_dict()
        first = steps([stream], 3)
        stream.load_state_dict(start)
        assert steps([stream], 3) == first


def test_an_interrupt_while_a_batch_is_waited_for_spoils_no_batch() -> None:
    """The read that was waited for goes on, and must not write to a buffer that is handed out again."""
    hold = threading.Event()

    def load(dataset: Numbers, places: Places, buffer: Buffer) -> np.ndarray:
        memory = buffer.take(4)
        if not hold.is_set():
            hold.wait(5)
        memory[:] = places.numbers
        return memory

    with ClipStream(Numbers(), 4, seed=SEED, threads=1, load=load) as stream:
        waiting = stream._waiting
        threading.Timer(0.3, hold.set).start()
        with pytest.raises(KeyboardInterrupt), mock.patch.object(Future, "result", side_effect=KeyboardInterrupt):
            next(stream)
        assert not waiting
        assert hold.is_set()  # it was waited for
        assert next(stream).tolist() == expected(4)


def test_a_batch_holds_when_the_position_is_set(tmp_path: Path) -> None:
    with folder(tmp_path, "tokens") as data, ClipStream(data, 1, seed=SEED, threads=3, load=whole_codes) as stream:
        start = stream.state_dict()
        held = next(stream)
        before = held["codes"].copy()
        stream.load_state_dict(start)
        for _ in range(2):
            next(stream)
        assert (held["codes"] == before).all()


def test_a_position_of_other_data_or_seed_is_refused() -> None:
    with ClipStream(Numbers(), 4, seed=SEED) as stream:
        state = stream.state_dict()
        with ClipStream(Numbers(digest="e" * 64), 4, seed=SEED) as other, pytest.raises(DataError, match=r"other data.*dddddddddddd"):
            other.load_state_dict(state)
        with ClipStream(Numbers(), 4, seed=4) as other, pytest.raises(DataError, match="seed 3, this run has seed 4"):
            other.load_state_dict(state)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'train\.batch' is 10; allowed: a multiple of the number of ranks \(4\)"):
        ClipStream(Numbers(), 10, 0, 4)
    with pytest.raises(ConfigError, match=r"'train\.micro_batch' is 4; allowed: a divisor of the 6 samples"):
        ClipStream(Numbers(), 12, 0, 2, micro_batch=4)
    with pytest.raises(DataError, match="no clips"):
        ClipStream(Numbers(0), 4)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_surfaces_in_next_and_loses_no_sample(threads: int) -> None:
    data = Numbers(broken=expected(7)[6])
    with ClipStream(data, 4, seed=SEED, threads=threads) as stream:
        assert [sample["i"] for sample in next(stream)] == expected(4)
        for _ in range(2):
            with pytest.raises(DataError, match="is damaged"):
                next(stream)
        data.broken = -1
        assert [sample["i"] for sample in next(stream)] == expected(8)[4:]


def test_looks_ahead_with_all_threads_but_not_without_bound() -> None:
    data = Numbers()
    with ClipStream(data, 4, seed=SEED, threads=3) as stream:
        next(stream)
        time.sleep(0.1)
        assert data.reads == 4 * 4  # a batch a thread, and one ahead
        assert data.most >= 2


LENGTHS = (3, 1, 12, 7)


def folder(path: Path, kind: str) -> ShardDataset:
    """Four clips in two shards; the numbers of a frame say which it is."""
    shards = []
    for shard in range(2):
        clips = []
        for i in (2 * shard, 2 * shard + 1):
            values = 20 * i + np.arange(LENGTHS[i])
            if kind == "raw":
                members = raw_members(np.full((LENGTHS[i], 4, 4, 3), values[:, None, None, None], np.uint8), f"c{i}", [50] * LENGTHS[i], {})
            else:
                members = token_members(values[:, None, None] + np.full((2, 2), 60000), f"c{i}", [50] * LENGTHS[i], {})
            clips.append((f"k{i}", members))
        shards.append(write_shard(path / f"{kind}-{shard:05d}.tar", clips))
    fields = {"image_size": 4} if kind == "raw" else {"grid_size": 2, "codebook_size": 65536, "tokenizer_id": "t"}
    Manifest.build(kind, shards, **fields).save(path)
    return ShardDataset(path, kind)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("reader", ["compiled", "python"])
def test_random_frames_are_different_ones_where_there_are_enough(
    tmp_path: Path, threads: int, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "python":
        monkeypatch.setattr(clips, "_library", lambda: None)
    with folder(tmp_path, "raw") as data, ClipStream(data, 4, seed=SEED, threads=threads, load=random_frames(5)) as stream:
        seen = []
        for epoch in range(20):
            batch = next(stream)
            assert batch["frames"].shape == (20, 4, 4, 3)
            for key, frames in zip(batch["keys"], batch["frames"].reshape(4, 5, -1), strict=True):
                i, values = int(key[1:]), frames[:, 0].tolist()
                assert (frames == frames[:, :1]).all()
                assert values == sorted(values)
                assert {value // 20 for value in values} == {i}
                assert max(values) - 20 * i < LENGTHS[i]
                assert len(set(values)) == 5 if LENGTHS[i] >= 5 else len(set(values)) <= LENGTHS[i]
                seen += [(epoch, value) for value in values if i == 2]
        assert {value for _, value in seen} == set(range(40, 52))


@pytest.mark.parametrize("reader", ["compiled", "python"])
def test_codes_come_one_clip_after_another(tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reader == "python":
        monkeypatch.setattr(clips, "_library", lambda: None)
    with folder(tmp_path, "tokens") as data, ClipStream(data, 4, seed=SEED, load=whole_codes) as stream:
        for _ in range(3):
            batch = next(stream)
            order = [int(key[1:]) for key in batch["keys"]]
            assert sorted(order) == [0, 1, 2, 3]
            assert batch["lengths"].tolist() == [LENGTHS[i] for i in order]
            assert batch["captions"] == [f"c{i}" for i in order]
            values = [60000 + 20 * i + t for i in order for t in range(LENGTHS[i])]
            assert batch["codes"].dtype == np.uint16
            assert batch["codes"].reshape(-1, 4).tolist() == [[value] * 4 for value in values]


@pytest.mark.parametrize("kind", ["raw", "tokens"])
def test_a_damaged_clip_is_an_error_also_where_many_are_read_at_once(tmp_path: Path, kind: str) -> None:
    data = folder(tmp_path, kind)
    path = tmp_path / f"{kind}-00001.tar"
    content = bytearray(path.read_bytes())
    at = content.index(data.read(2)[{"raw": "frames", "tokens": "codes"}[kind]].tobytes())
    content[at + 5] ^= 1
    path.write_bytes(content)
    everything = Places(np.zeros(4, dtype=np.int64), np.arange(4), SEED)
    load = random_frames(12) if kind == "raw" else whole_codes
    with pytest.raises(DataError, match=f"clip k2 of shard {path} is damaged \\(its checksum differs\\)"):
        load(data, everything, Buffer())
    path.write_bytes(content[:at])
    with pytest.raises(DataError, match=r"clip k2 .*the shard ends before it"):
        load(data, everything, Buffer())


def test_a_header_that_belongs_to_other_codes_is_an_error(tmp_path: Path) -> None:
    """The checksum is right, the array's shape is not."""
    members = token_members(np.zeros((3, 2, 2), np.int64), "c", [50] * 3, {})
    members["codes.npy"] = members["codes.npy"].replace(b"(3, 2, 2)", b"(2, 3, 2)")
    shard = write_shard(tmp_path / "tokens-00000.tar", [("k", members)])
    Manifest.build("tokens", [shard], grid_size=2, codebook_size=65536, tokenizer_id="t").save(tmp_path)
    with pytest.raises(DataError, match=r"clip k of .* holds uint16 \[2, 3, 2\], which is not a tokens clip"):
        whole_codes(ShardDataset(tmp_path, "tokens"), Places(np.zeros(1, dtype=np.int64), np.arange(1), SEED), Buffer())


def test_batches() -> None:
    frames = frames_batch({"frames": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)})["frames"]
    assert frames.dtype == torch.uint8
    assert frames.shape == (2, 2, 2, 3)
    batch = pack_codes([np.full((n, 2, 2), 60000 + n, dtype=np.uint16) for n in (1, 3)])
    assert batch["codes"].dtype == torch.int64
    assert batch["codes"].shape == (4, 2, 2)
    assert batch["codes"][:, 0, 0].tolist() == [60001, 60003, 60003, 60003]
    assert batch["lengths"] == [1, 3]
