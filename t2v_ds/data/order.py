"""The order of samples: a pure function of (seed, epoch, size).

    position 0, 1, 2, ... of an endless sequence
      -> (epoch, place) = divmod(position, size)
      -> index = global_order(seed, epoch, size)[place]

World size, threads and restarts do not appear: ranks only take different positions of the same sequence.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_AUGMENTATION = 1  # keeps the random numbers of a sample apart from those of the order


@lru_cache(maxsize=4)
def global_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0 .. size - 1, int64 [N], read-only because it is cached."""
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(size)
    order.flags.writeable = False
    return order


def sample_at(seed: int, position: int, size: int) -> tuple[int, int]:
    """The (epoch, index) of a position of the endless concatenation of epochs."""
    if size < 1:
        raise ValueError("an order needs at least one sample")
    epoch, place = divmod(position, size)
    return epoch, int(global_order(seed, epoch, size)[place])


def batch_positions(consumed: int, rank: int, world_size: int, batch_per_rank: int) -> range:
    """The positions that `rank` takes of the step that follows `consumed` samples of the whole run."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    start = consumed + rank * batch_per_rank
    return range(start, start + batch_per_rank)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers of one sample in one epoch, the same on whatever rank or thread it is loaded."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, index, _AUGMENTATION])))
