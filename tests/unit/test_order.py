"""The order of samples is a pure function of (seed, epoch, data set, settings)."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from t2v_ds.data.order import Order, batch_positions, global_order, sample_at, sample_rng
from t2v_ds.errors import DataError

SEED = 7


def taken(order: Order, start: int, stop: int) -> np.ndarray:
    """The samples at positions, read a few at a time."""
    return np.concatenate([order.places(range(first, min(first + 13, stop)))[1] for first in range(start, stop, 13)])


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    orders = {(seed, epoch): global_order(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4


def test_the_order_is_the_documented_one_in_any_process() -> None:
    """A change of these orders would make every saved position mean something else."""
    plain = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 3]))).permutation(10).tolist()
    assert plain == [3, 5, 4, 7, 8, 0, 9, 2, 1, 6]
    windows = [8, 7, 9, 1, 0, 2, 5, 3, 4, 6]
    buckets = [3, 4, 5, 1, 6, 0, 9, 2, 8, 7]
    code = """
from t2v_ds.data.order import Order, global_order
import numpy as np
shards, lengths = [range(3), range(3, 5), range(5, 7), range(7, 10)], np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
orders = [
    Order(10, 7), Order(10, 7, window=2, shards=shards), Order(10, 7, buckets=2, lengths=lengths, batch=3)
]
print(global_order(7, 3, 10).tolist(), *[order.epoch(3).tolist() for order in orders])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{plain} {plain} {windows} {buckets}"


def test_positions_run_through_epochs_without_gap_or_repeat() -> None:
    found = [sample_at(5, position, 7) for position in range(21)]
    assert [epoch for epoch, _ in found] == [0] * 7 + [1] * 7 + [2] * 7
    for epoch in range(3):
        assert [index for at, index in found if at == epoch] == global_order(5, epoch, 7).tolist()
    with pytest.raises(ValueError, match="at least one"):
        sample_at(0, 0, 0)


@pytest.mark.parametrize("size", [1, 5, 7, 40])
def test_many_places_at_once_are_those_one_by_one(size: int) -> None:
    order = Order(size, 5)
    for start, count in itertools.product((0, 3, 6, 20, 39), (1, 4, 15)):
        epochs, numbers = order.places(range(start, start + count))
        assert epochs.dtype == numbers.dtype == np.int64
        assert list(zip(epochs.tolist(), numbers.tolist(), strict=True)) == [sample_at(5, start + i, size) for i in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_ranks_of_a_step_take_the_step(world_size: int) -> None:
    positions = [position for rank in range(world_size) for position in batch_positions(30, rank, world_size, 6 // world_size)]
    assert positions == list(range(30, 36))
    with pytest.raises(ValueError, match="rank"):
        batch_positions(0, world_size, world_size, 1)


def test_the_cached_order_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        global_order(0, 0, 5)[0] = 3
    with pytest.raises(ValueError, match="read-only"):
        Order(5, window=1, shards=[range(5)]).epoch(0)[0] = 3


def test_random_numbers_belong_to_the_sample() -> None:
    places = itertools.product((0, 1), repeat=3)  # seed, epoch, index
    draws = {place: sample_rng(*place).integers(2**60) for place in places}
    assert len(set(draws.values())) == 8
    assert sample_rng(1, 0, 1).integers(2**60) == draws[1, 0, 1]


def test_a_window_reads_from_few_shards_at_a_time() -> None:
    sizes = np.random.default_rng(0).integers(0, 30, 23)  # some shards are empty
    ends = np.cumsum(sizes)
    shards = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    shard_of = np.repeat(np.arange(23), sizes)
    order = Order(int(ends[-1]), SEED, window=4, shards=shards)
    firsts = set()
    for epoch in range(3):
        samples = order.epoch(epoch)
        assert sorted(samples) == list(range(ends[-1]))
        left = [int(sizes[shard]) for shard in range(23)]
        is_open: set[int] = set()
        for shard in shard_of[samples].tolist():
            is_open.add(shard)
            assert len(is_open) <= 4
            left[shard] -= 1
            if not any(left[one] for one in is_open):
                is_open.clear()
        firsts.add(tuple(shard_of[samples[:40]]))
    assert len(firsts) == 3


@pytest.mark.parametrize(
    ("size", "batch", "buckets", "phase"), [(100, 8, 3, 0), (64, 8, 2, 0), (5, 8, 2, 3), (101, 12, 50, 7), (30, 30, 1, 0)]
)
@pytest.mark.parametrize("window", [0, 2])
def test_buckets_hold_every_sample_once_an_epoch(size: int, batch: int, buckets: int, phase: int, window: int) -> None:
    lengths = np.random.default_rng(1).integers(15, 41, size)
    shards = [range(first, min(first + 9, size)) for first in range(0, size, 9)]
    order = Order(size, SEED, window=window, shards=shards, buckets=buckets, lengths=lengths, batch=batch, phase=phase)
    epochs = [taken(order, epoch * size, (epoch + 1) * size) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


def padding(lengths: np.ndarray, micro_batch: int) -> float:
    """The share of frames that are padding when each micro-batch is as long as its longest clip."""
    rows = lengths[: len(lengths) // micro_batch * micro_batch].reshape(-1, micro_batch)
    return float(1 - rows.sum() / (rows.max(1) * micro_batch).sum())


@pytest.mark.parametrize("size", [4096, 4099])  # steps that lie in one epoch, and some that lie in two
def test_buckets_spare_the_padding_and_keep_chance(size: int) -> None:
    lengths = np.random.default_rng(2).integers(15, 41, size)
    batch, steps = 64, 3 * size // 64
    plain = Order(size, SEED)
    order = Order(size, SEED, buckets=16, lengths=lengths, batch=batch)
    assert padding(lengths[taken(plain, 0, steps * batch)], 8) > 0.25
    samples = taken(order, 0, steps * batch)
    for world_size, micro_batch in ((1, 8), (2, 8), (4, 16), (1, 64)):
        assert padding(lengths[samples], micro_batch) < (0.035 if micro_batch == 64 else 0.012), (world_size, micro_batch)
    means = lengths[samples].reshape(steps, batch).mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25, "steps come in the order of their lengths"
    of_epochs = [set(map(frozenset, np.split(samples[first : first + 32 * batch], 32))) for first in (0, 64 * batch)]
    assert not of_epochs[0] & of_epochs[1], "the same clips meet in every epoch"


def test_buckets_follow_steps_that_begin_elsewhere() -> None:
    lengths = np.random.default_rng(2).integers(15, 41, 4096)
    order = Order(4096, SEED, buckets=16, lengths=lengths, batch=64).starting_at(64 * 70 + 37)
    assert padding(lengths[taken(order, 64 * 70 + 37, 64 * 130 + 37)], 64) < 0.035
    assert order.starting_at(64 * 90 + 37) is order
    assert Order(4096, SEED).starting_at(5).epoch(1) is global_order(SEED, 1, 4096)


SHARDS = [range(10), range(10, 20)]
LENGTHS = np.arange(20)


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ({}, {}, None),
        ({"seed": 1}, {}, "seed 1, this run has seed 0: they must be equal"),
        ({"window": 1, "shards": SHARDS}, {}, r"setting 'train\.shard_window' = 1, this run has setting 'train\.shard_window' = 0"),
        ({}, {"buckets": 2, "lengths": LENGTHS, "batch": 4}, r"'length_buckets' = 0, this run has setting 'length_buckets' = 2"),
        (
            {"buckets": 2, "lengths": LENGTHS, "batch": 4},
            {"buckets": 2, "lengths": LENGTHS, "batch": 5},
            r"'train\.batch' = 4, this run has setting 'train\.batch' = 5: they must be equal; with length buckets the order depends on it",
        ),
        ({"batch": 4}, {"batch": 5}, None),
    ],
)
def test_a_position_in_another_order_is_refused(before: dict[str, Any], now: dict[str, Any], refused: str | None) -> None:
    state = Order(20, **before).state_dict()
    order = Order(20, **now)
    if refused is None:
        order.check(state)
        return
    with pytest.raises(DataError, match=refused):
        order.check(state)


def test_a_position_saved_before_there_were_windows_and_buckets_is_that_of_the_plain_order() -> None:
    Order(20, 3).check({"seed": 3, "batch": 8, "consumed": 5})
    with pytest.raises(DataError, match="shard_window"):
        Order(20, 3, window=1, shards=SHARDS).check({"seed": 3, "batch": 8, "consumed": 5})


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 1, "shards": [range(19)]},
        {"buckets": 1, "batch": 4},
        {"buckets": 1, "lengths": LENGTHS},
        {"buckets": 1, "lengths": LENGTHS[1:], "batch": 4},
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"shards hold 19 samples of 20|need the length of each sample, and a batch"):
        Order(20, **arguments)
