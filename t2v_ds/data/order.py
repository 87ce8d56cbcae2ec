"""The order of samples: a pure function of (seed, epoch, data set, settings).

    position 0, 1, 2, ... of an endless sequence
      -> (epoch, place) = divmod(position, size)
      -> index = Order.epoch(epoch)[place]

    Order.epoch: all samples permuted
                 | shards permuted, and the samples of `window` of them at a time         (few shards are read from at a time)
                 -> steps of clips of like length, the steps of a pool in random order    (little is padded)

World size, threads and restarts do not appear: ranks only take different positions of the same sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from t2v_ds.errors import DataError

_AUGMENTATION = 1  # keeps the random numbers of a sample apart from those of the order
_BUCKETS = 2  # and those that shuffle steps apart from those of the permutation
_CACHED = 2  # epochs: a step may lie in two
_SETTINGS = {"seed": "seed", "window": "train.shard_window", "buckets": "length_buckets", "batch": "train.batch"}


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


@lru_cache(maxsize=4)
def global_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """One epoch of all samples permuted: the numbers 0 .. size - 1, int64 [N], read-only because it is cached."""
    order = _generator(seed, epoch).permutation(size)
    order.flags.writeable = False
    return order


def sample_at(seed: int, position: int, size: int) -> tuple[int, int]:
    """The (epoch, index) of a position of the endless concatenation of permuted epochs."""
    return Order(size, seed).sample_at(position)


def batch_positions(consumed: int, rank: int, world_size: int, batch_per_rank: int) -> range:
    """The positions that `rank` takes of the step that follows `consumed` samples of the whole run."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    start = consumed + rank * batch_per_rank
    return range(start, start + batch_per_rank)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers of one sample in one epoch, the same on whatever rank or thread it is loaded."""
    return _generator(seed, epoch, index, _AUGMENTATION)


class Order:
    """The endless concatenation of epochs, each of which holds every sample once.

    Args:
        size: samples, N.
        seed: of all that is random.
        window: shards that are read from at a time; 0: all. Their samples are permuted together.
        shards: for `window`: the numbers of the samples of each shard; every sample is in one.
        buckets: steps that are made of like lengths together: the samples of so many steps are sorted by length, cut into steps, and
            these shuffled; 0: off. What an epoch leaves over for a step that the next one completes are its longest.
            A pool may lie in two windows.
        lengths: for `buckets`: int64 [N], of the samples.
        batch: for `buckets`: samples a step over all ranks.
        phase: for `buckets`: steps begin at the positions that are this modulo `batch`.

    Raises:
        ValueError: no samples, or arguments that do not fit one another.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        *,
        window: int = 0,
        shards: Sequence[Sequence[int] | np.ndarray] = (),
        buckets: int = 0,
        lengths: np.ndarray | None = None,
        batch: int = 0,
        phase: int = 0,
    ) -> None:
        if size < 1:
            raise ValueError("an order needs at least one sample")
        self.size, self.seed, self.window, self.buckets, self.batch, self.phase = size, seed, window, buckets, batch, phase
        self._shards = [np.asarray(shard, dtype=np.int64) for shard in shards if len(shard)] if window else []
        if window and sum(map(len, self._shards)) != size:
            raise ValueError(f"the shards hold {sum(map(len, self._shards))} samples of {size}")
        if buckets and (lengths is None or len(lengths) != size or not 0 <= phase < batch):
            raise ValueError("length buckets need the length of each sample, and a batch")
        self._lengths = lengths
        self._epochs: dict[int, np.ndarray] = {}

    def starting_at(self, position: int) -> Order:
        """This order for a run whose steps begin at `position`, which matters to length buckets only."""
        if not self.buckets or position % self.batch == self.phase:
            return self
        return Order(
            self.size, self.seed, window=self.window, shards=self._shards, buckets=self.buckets, lengths=self._lengths,
            batch=self.batch, phase=position % self.batch,
        )  # fmt: skip

    def epoch(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in order: int64 [N], read-only because it is cached."""
        found = self._epochs.get(epoch)
        if found is None:
            found = self._windows(epoch) if self.window else global_order(self.seed, epoch, self.size)
            if self.buckets:
                found = self._bucketed(found, epoch)
            found.flags.writeable = False
            while len(self._epochs) >= _CACHED:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = found
        return found

    def places(self, positions: range) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the numbers of the samples at positions that follow one another: both int64 [B], perhaps read-only."""
        epoch, place = divmod(positions.start, self.size)
        if place + len(positions) <= self.size:
            return np.full(len(positions), epoch), self.epoch(epoch)[place : place + len(positions)]
        epochs, rest = np.divmod(np.arange(positions.start, positions.stop), self.size)
        parts = [self.epoch(one)[rest[epochs == one]] for one in range(epoch, int(epochs[-1]) + 1)]
        return epochs, np.concatenate(parts)

    def sample_at(self, position: int) -> tuple[int, int]:
        """The (epoch, index) of a position."""
        epoch, place = divmod(position, self.size)
        return epoch, int(self.epoch(epoch)[place])

    def state_dict(self) -> dict[str, int]:
        """What the order depends on beside the data set, kept with a position in it."""
        state = {"seed": self.seed, "window": self.window, "buckets": self.buckets}
        return {**state, "batch": self.batch} if self.buckets else state

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a position in another order.

        Args:
            state: what `state_dict` returned, perhaps among other things; what it lacks was 0.

        Raises:
            DataError: names the setting that differs.
        """
        for name, value in self.state_dict().items():
            saved = state.get(name, 0)
            if saved != value:
                setting = name if name == "seed" else f"setting '{_SETTINGS[name]}' ="
                why = "; with length buckets the order depends on it" if name == "batch" else ""
                raise DataError(
                    f"the saved position was made with {setting} {saved}, this run has {setting} {value}: they must be equal{why}"
                )

    def _windows(self, epoch: int) -> np.ndarray:
        """Shards in random order; the samples of `window` of them at a time permuted."""
        random = _generator(self.seed, epoch)
        shards = [self._shards[i] for i in random.permutation(len(self._shards))]
        windows = [np.concatenate(shards[first : first + self.window]) for first in range(0, len(shards), self.window)]
        return np.concatenate([random.permutation(window) for window in windows])

    def _bucketed(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """The same samples, those of a pool exchanged so that a step is of like lengths."""
        assert self._lengths is not None
        batch, size = self.batch, self.size
        head = min((self.phase - epoch * size) % batch, size)  # samples that complete the last epoch's last step
        steps = (size - head) // batch
        pools = max(1, -(-steps // self.buckets))
        ends = head + batch * (steps * np.arange(1, pools + 1) // pools)
        ends[-1] = size  # with what is left for the next epoch to complete
        random = _generator(self.seed, epoch, _BUCKETS)
        parts: list[np.ndarray] = []
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            pool = order[first:end]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            completes = head if first == 0 else 0
            whole = (len(pool) - completes) // batch * batch
            cut = pool[:whole].reshape(-1, batch)
            parts += [pool[whole : whole + completes], cut[random.permutation(len(cut))].ravel(), pool[whole + completes :]]
        return np.concatenate(parts)
