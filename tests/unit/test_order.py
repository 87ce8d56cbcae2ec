"""The order of samples is a pure function of (seed, epoch, size)."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from t2v_ds.data.order import batch_positions, global_order, sample_at, sample_rng


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    orders = {(seed, epoch): global_order(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4


def test_the_order_is_the_documented_one_in_any_process() -> None:
    """A change of this order would make every saved position mean something else."""
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 3]))).permutation(10).tolist()
    assert global_order(7, 3, 10).tolist() == expected == [3, 5, 4, 7, 8, 0, 9, 2, 1, 6]
    code = "from t2v_ds.data.order import global_order; print(global_order(7, 3, 10).tolist())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == str(expected)


def test_positions_run_through_epochs_without_gap_or_repeat() -> None:
    found = [sample_at(5, position, 7) for position in range(21)]
    assert [epoch for epoch, _ in found] == [0] * 7 + [1] * 7 + [2] * 7
    for epoch in range(3):
        assert [index for at, index in found if at == epoch] == global_order(5, epoch, 7).tolist()
    with pytest.raises(ValueError, match="at least one"):
        sample_at(0, 0, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_ranks_of_a_step_take_the_step(world_size: int) -> None:
    taken = [position for rank in range(world_size) for position in batch_positions(30, rank, world_size, 6 // world_size)]
    assert taken == list(range(30, 36))
    with pytest.raises(ValueError, match="rank"):
        batch_positions(0, world_size, world_size, 1)


def test_the_cached_order_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        global_order(0, 0, 5)[0] = 3


def test_random_numbers_belong_to_the_sample() -> None:
    places = itertools.product((0, 1), repeat=3)  # seed, epoch, index
    draws = {place: sample_rng(*place).integers(2**60) for place in places}
    assert len(set(draws.values())) == 8
    assert sample_rng(1, 0, 1).integers(2**60) == draws[1, 0, 1]
