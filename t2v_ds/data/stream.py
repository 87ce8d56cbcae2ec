"""Order + shards -> the batches of one rank, for ever, with a position that can be saved.

    consumed (samples of the whole run) -> order.batch_positions -> (epoch, index) of this rank's next samples
      -> threads: dataset.read(index) -> load(sample, rng of (seed, epoch, index))    [bounded look-ahead]
      -> next(): `micro_batch` loaded samples, in order

Only samples handed over count as consumed, never those prefetched, so a restart repeats and misses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self

import numpy as np
import torch

from t2v_ds.data.order import batch_positions, sample_at, sample_rng
from t2v_ds.errors import ConfigError, DataError

Sample = dict[str, Any]
Load = Callable[[Sample, np.random.Generator], Sample]


class Dataset(Protocol):
    """What a stream needs of a data set (`shards.ShardDataset` is one)."""

    @property
    def digest(self) -> str:
        """A hash of the content, to refuse a saved position that belongs to other data."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> Sample:
        """Return clip `i`; must be thread-safe."""


def whole_sample(sample: Sample, rng: np.random.Generator) -> Sample:
    """The load function that changes nothing."""
    return sample


class ClipStream:
    """Endless micro-batches of one rank; the same global order whatever the world size, threads and restarts.

    Step after step takes `batch` samples of the order: rank r the r-th of `world_size` equal slices, in micro-batches
    of `micro_batch`. `next()` returns one micro-batch, so a step is `micro_steps` calls of `next()`.

    Args:
        dataset: where samples are read.
        batch: samples a step over all ranks.
        rank, world_size: of this process.
        seed: of the order and of each sample's random numbers.
        threads: that read ahead; 0: read in `next()`.
        load: turns a sample as read into what `next()` returns; runs in the threads.
        micro_batch: samples of one `next()`; None: the rank's whole share of a step.

    Raises:
        ConfigError: the sizes do not divide evenly.
        DataError: the data set is empty.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        threads: int = 1,
        load: Load = whole_sample,
        micro_batch: int | None = None,
    ) -> None:
        if batch < 1 or batch % world_size:
            raise ConfigError(f"setting 'train.batch' is {batch}; allowed: a multiple of the number of ranks ({world_size})")
        share = batch // world_size
        micro_batch = share if micro_batch is None else micro_batch
        if micro_batch < 1 or share % micro_batch:
            raise ConfigError(
                f"setting 'train.micro_batch' is {micro_batch}; allowed: a divisor of the {share} samples of each rank in a step"
            )
        if len(dataset) == 0:
            raise DataError("the data set holds no clips")
        self.dataset, self.load = dataset, load
        self.batch, self.rank, self.world_size, self.seed = batch, rank, world_size, seed
        self.micro_batch, self.micro_steps = micro_batch, share // micro_batch
        self._share = share
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="clips") if threads > 0 else None
        self._ahead = 2 * micro_batch + threads  # samples that wait or are being read
        self._waiting: deque[Future[Sample]] = deque()
        self._consumed = 0  # samples of the whole run, in finished steps
        self._micro = 0  # micro-batches of the current step handed over
        self._positions = self._rank_positions()

    @property
    def consumed(self) -> int:
        """Samples of the whole run in the steps that all ranks have been handed."""
        return self._consumed

    @property
    def epoch(self) -> float:
        """Passes over the data set."""
        return self._consumed / len(self.dataset)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Sample]:
        """The next micro-batch: `micro_batch` loaded samples.

        Raises:
            DataError: a sample is damaged. The position does not move.
        """
        try:
            samples = [self._next_sample() for _ in range(self.micro_batch)]
        except BaseException:
            self._restart()
            raise
        self._micro += 1
        if self._micro == self.micro_steps:
            self._micro = 0
            self._consumed += self.batch
        return samples

    def state_dict(self) -> dict[str, Any]:
        """The position at the start of the current step; the same on every rank, and valid for any world size."""
        return {
            "consumed": self._consumed,
            "seed": self.seed,
            "digest": self.dataset.digest,
            "clips": len(self.dataset),
            "batch": self.batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the batch and the world size may have changed since.

        Raises:
            DataError: the position belongs to another data set or seed.
        """
        if state["digest"] != self.dataset.digest:
            raise DataError(
                f"the saved position belongs to other data (digest {state['digest'][:12]}, {state['clips']} clips) than this run's "
                f"(digest {self.dataset.digest[:12]}, {len(self.dataset)} clips): resume with the same data, or start a new run"
            )
        if state["seed"] != self.seed:
            raise DataError(f"the saved position was made with seed {state['seed']}, this run has seed {self.seed}: they must be equal")
        self._consumed = int(state["consumed"])
        self._micro = 0
        self._restart()

    def close(self) -> None:
        """Stop the threads."""
        self._drop_waiting()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rank_positions(self) -> Iterator[int]:
        """Positions of this rank from the next micro-batch on, for ever."""
        consumed, skip = self._consumed, self._micro * self.micro_batch
        while True:
            yield from batch_positions(consumed, self.rank, self.world_size, self._share)[skip:]
            consumed, skip = consumed + self.batch, 0

    def _read(self, epoch: int, index: int) -> Sample:
        return self.load(self.dataset.read(index), sample_rng(self.seed, epoch, index))

    def _next_sample(self) -> Sample:
        if self._executor is None:
            return self._read(*sample_at(self.seed, next(self._positions), len(self.dataset)))
        while len(self._waiting) < self._ahead:
            place = sample_at(self.seed, next(self._positions), len(self.dataset))
            self._waiting.append(self._executor.submit(self._read, *place))
        return self._waiting.popleft().result()

    def _restart(self) -> None:
        self._drop_waiting()
        self._positions = self._rank_positions()

    def _drop_waiting(self) -> None:
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()


def random_frames(count: int) -> Load:
    """A load function that keeps `count` random frames of a clip, repeating some only where the clip is shorter."""

    def load(sample: Sample, rng: np.random.Generator) -> Sample:
        frames = sample["frames"]  # [T, S, S, 3]
        chosen = rng.choice(len(frames), size=count, replace=count > len(frames))
        return {**sample, "frames": frames[np.sort(chosen)]}

    return load


def frames_batch(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Join the frames of all samples: {"frames": uint8 [N, S, S, 3]}."""
    return {"frames": torch.from_numpy(np.concatenate([sample["frames"] for sample in samples]))}


def codes_batch(samples: list[Sample]) -> dict[str, Any]:
    """Join token clips of different lengths.

    Returns:
        "codes": int64 [B, Tmax, h, w], 0 past a clip's end; "lengths": int64 [B] frames; "captions", "keys": lists of B.
    """
    lengths = [len(sample["codes"]) for sample in samples]
    codes = np.zeros((len(samples), max(lengths), *samples[0]["codes"].shape[1:]), dtype=np.int64)
    for row, sample in zip(codes, samples, strict=True):
        row[: len(sample["codes"])] = sample["codes"]
    return {
        "codes": torch.from_numpy(codes),
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "captions": [sample["caption"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
    }
