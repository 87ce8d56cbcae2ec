"""The stream: one global order, whatever the world size, the threads and the restarts."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from t2v_ds.data.order import sample_at
from t2v_ds.data.stream import ClipStream, codes_batch, frames_batch, random_frames
from t2v_ds.errors import ConfigError, DataError

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


def with_random(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**sample, "random": int(rng.integers(2**40))}


def expected(count: int, size: int = 20) -> list[int]:
    return [sample_at(SEED, position, size)[1] for position in range(count)]


def steps(streams: list[ClipStream], count: int) -> list[dict[str, Any]]:
    """Take whole steps from the streams of all ranks; the samples in the global order."""
    taken = []
    for _ in range(count):
        for stream in streams:
            for _ in range(stream.micro_steps):
                taken += next(stream)
    return taken


def streams(world_size: int, batch: int = 12, **settings: Any) -> list[ClipStream]:
    settings = {"threads": 2, "load": with_random, **settings}
    return [ClipStream(Numbers(), batch, rank, world_size, SEED, **settings) for rank in range(world_size)]


@pytest.mark.parametrize(("world_size", "threads", "micro"), [(1, 0, None), (1, 3, 4), (2, 2, 3), (3, 1, 2), (4, 0, 1), (6, 2, None)])
def test_the_global_order_and_its_random_numbers_are_the_same_everywhere(world_size: int, threads: int, micro: int | None) -> None:
    reference = steps(streams(1, threads=0), 4)
    assert [sample["i"] for sample in reference] == expected(48)
    group = streams(world_size, threads=threads, micro_batch=micro)
    assert steps(group, 4) == reference
    assert {stream.consumed for stream in group} == {48}
    assert group[0].epoch == pytest.approx(2.4)
    for stream in group:
        stream.close()


def test_kill_and_resume_anywhere_on_any_number_of_ranks() -> None:
    """Seven runs killed at random points (also inside a step) see every position once, in order."""
    rng = np.random.default_rng(0)
    seen: list[dict[str, Any]] = []
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
    assert [sample["i"] for sample in seen] == expected(39)
    for stream in (first, second):
        stream.close()


def test_going_back_drops_what_was_read_ahead() -> None:
    with streams(1)[0] as stream:
        start = stream.state_dict()
        first = steps([stream], 3)
        stream.load_state_dict(start)
        assert steps([stream], 3) == first


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
        assert 4 < data.reads <= 4 + 2 * 4 + 3
        assert data.most >= 2


def test_random_frames_are_different_ones_where_there_are_enough() -> None:
    sample = {"key": "k", "frames": np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, 3)}
    rng = np.random.default_rng(0)
    for _ in range(20):
        chosen = random_frames(4)(sample, rng)["frames"][:, 0, 0, 0].tolist()
        assert len(set(chosen)) == 4
        assert chosen == sorted(chosen)
    assert set(random_frames(10)(sample, rng)["frames"][:, 0, 0, 0].tolist()) == set(range(10))
    assert random_frames(12)(sample, rng)["frames"].shape == (12, 1, 1, 3)


def test_batches() -> None:
    frames = frames_batch([{"frames": np.full((n, 2, 2, 3), n, dtype=np.uint8)} for n in (1, 3)])["frames"]
    assert frames.dtype == torch.uint8
    assert frames.shape == (4, 2, 2, 3)
    assert frames[:, 0, 0, 0].tolist() == [1, 3, 3, 3]
    samples = [{"codes": np.full((n, 2, 2), 60000 + n, dtype=np.uint16), "caption": f"c{n}", "key": f"k{n}"} for n in (1, 3)]
    batch = codes_batch(samples)
    assert batch["codes"].dtype == torch.int64
    assert batch["codes"].shape == (2, 3, 2, 2)
    assert batch["codes"][:, :, 0, 0].tolist() == [[60001, 0, 0], [60003] * 3]
    assert batch["lengths"].tolist() == [1, 3]
    assert batch["captions"] == ["c1", "c3"]
    assert batch["keys"] == ["k1", "k3"]
