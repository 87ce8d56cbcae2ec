"""Order + shards -> the batches of one rank, for ever, with a position that can be saved.

    consumed (samples of the whole run) -> order.batch_positions -> Order.places: (epoch, number) of this rank's next samples
      -> threads: load(dataset, places of a micro-batch, ring buffer)    [a micro-batch a thread, and one ahead]
      -> next(): what it returned, in order

Threads and buffers that are used again, and not worker processes: a batch is not copied from one process to another.

Only samples handed over count as consumed, never those prefetched, so a restart repeats and misses nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from t2v_ds.data.contents import contents, describe_change
from t2v_ds.data.dataset import Buffer
from t2v_ds.data.order import Order, batch_positions, sample_rng
from t2v_ds.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Batch = Any  # whatever a load function returns


class Places(NamedTuple):
    """The samples of a micro-batch: epochs and numbers of clips, both int64 [B]."""

    epochs: np.ndarray
    numbers: np.ndarray
    seed: int

    def rngs(self) -> list[np.random.Generator]:
        """For each, random numbers that are the same in this epoch on whatever rank or thread it is loaded."""
        return [sample_rng(self.seed, epoch, i) for epoch, i in zip(self.epochs.tolist(), self.numbers.tolist(), strict=True)]


class Dataset(Protocol):
    """What a stream needs of a data set (`dataset.ShardDataset` is one); what is read of it is up to the load function."""

    @property
    def digest(self) -> str:
        """A hash of the content, to refuse a saved position that belongs to other data."""

    def __len__(self) -> int: ...


Load = Callable[[Any, Places, Buffer], Batch]  # of a data set; runs in the threads


def whole_samples(dataset: Any, places: Places, buffer: Buffer) -> list[dict[str, Any]]:
    """A load function: `dataset.read` of each."""
    return [dataset.read(i) for i in places.numbers.tolist()]


def whole_codes(dataset: Any, places: Places, buffer: Buffer) -> dict[str, Any]:
    """A load function for tokens.

    Returns:
        "codes": uint16 [T of all clips, h, w], one clip after another; "lengths": int64 [B] frames; "captions", "keys": lists of B.
    """
    return {
        "codes": dataset.read_codes(places.numbers, buffer),
        "lengths": dataset.lengths[places.numbers],
        "captions": dataset.captions(places.numbers),
        "keys": dataset.keys(places.numbers),
    }


def random_frames(count: int) -> Load:
    """A load function that reads `count` random frames of each clip, repeating some only where the clip is shorter.

    Its batches: "frames": uint8 [B * count, S, S, 3], each clip's in order of time; "keys": list of B.
    """

    def load(dataset: Any, places: Places, buffer: Buffer) -> dict[str, Any]:
        lengths = dataset.lengths[places.numbers].tolist()
        frames = [_choose(length, count, rng) for length, rng in zip(lengths, places.rngs(), strict=True)]
        return {"frames": dataset.read_frames(places.numbers, frames, buffer), "keys": dataset.keys(places.numbers)}

    return load


def _choose(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of `count` frames of `length`, in order: int64 [count]."""
    return np.sort(rng.choice(length, size=count, replace=count > length))


class RingBuffers:
    """Buffers that are taken in turn, so that a run's memory is that of a few batches however long it takes."""

    def __init__(self, count: int) -> None:
        self._buffers = [Buffer() for _ in range(count)]
        self._next = 0

    def next(self) -> Buffer:
        """The one that was taken longest ago."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        return buffer


class ClipStream:
    """Endless micro-batches of one rank; the same global order whatever the world size, threads and restarts.

    Step after step takes `batch` samples of the order: rank r the r-th of `world_size` equal slices, in micro-batches
    of `micro_batch`. `next()` returns one micro-batch, so a step is `micro_steps` calls of `next()`. Arrays in it may lie in buffers
    that are used again: they hold until `next()` has been called two more times.

    Args:
        dataset: where samples are read.
        batch: samples a step over all ranks.
        rank, world_size: of this process.
        seed: of the order and of each sample's random numbers.
        threads: that read ahead; 0: read in `next()`.
        load: reads the samples of a micro-batch and makes of them what `next()` returns; runs in the threads.
        micro_batch: samples of one `next()`; None: the rank's whole share of a step.
        order: of the samples; None: all of an epoch permuted with `seed`.

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
        load: Load = whole_samples,
        micro_batch: int | None = None,
        order: Order | None = None,
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
        self._ahead = threads + 1  # micro-batches that wait or are being read
        self._waiting: deque[Future[Batch]] = deque()
        self._buffers = RingBuffers(self._ahead + 2)
        self._consumed = 0  # samples of the whole run, in finished steps
        self._micro = 0  # micro-batches of the current step handed over
        self.order = order or Order(len(dataset), seed)
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

    def __next__(self) -> Batch:
        """The next micro-batch, as `load` made it.

        Raises:
            DataError: a sample is damaged. The position does not move.
        """
        try:
            batch = self._next_batch()
        except BaseException:
            self._restart()
            raise
        self._micro += 1
        if self._micro == self.micro_steps:
            self._micro = 0
            self._consumed += self.batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position at the start of the current step; the same on every rank, and valid for any world size."""
        return {
            "consumed": self._consumed,
            "digest": self.dataset.digest,
            "clips": len(self.dataset),
            "shards": contents(self.dataset),
            "batch": self.batch,
            **self.order.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], accept_new_data: bool = False) -> None:
        """Go to a saved position; the world size may have changed since, and without length buckets the batch.

        Args:
            state: what `state_dict` returned.
            accept_new_data: where the data is another, go to the start of the epoch that the position is in.

        Raises:
            DataError: the position belongs to another data set (says what changed) or order.
        """
        self.order.check(state)
        consumed = int(state["consumed"])
        if state["digest"] != self.dataset.digest:
            change = describe_change(state.get("shards", {}), contents(self.dataset))
            if not accept_new_data:
                raise DataError(
                    f"the saved position belongs to other data (digest {state['digest'][:12]}, {state['clips']} clips) than this run's "
                    f"(digest {self.dataset.digest[:12]}, {len(self.dataset)} clips), where {change}: resume with the same data, "
                    "begin the epoch anew on this data (accept_new_data=true), or start a new run"
                )
            epoch = consumed // int(state["clips"])
            logger.info("epoch %d begins anew, on %d clips instead of %d, where %s", epoch, len(self.dataset), state["clips"], change)
            consumed = epoch * len(self.dataset)
        self._consumed = consumed
        self.order = self.order.starting_at(consumed)
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

    def _rank_positions(self) -> Iterator[range]:
        """Positions of this rank's micro-batches, from the next one on, for ever."""
        consumed, micro = self._consumed, self._micro
        while True:
            positions = batch_positions(consumed, self.rank, self.world_size, self._share)
            for first in range(micro * self.micro_batch, self._share, self.micro_batch):
                yield positions[first : first + self.micro_batch]
            consumed, micro = consumed + self.batch, 0

    def _next_places(self) -> Places:
        return Places(*self.order.places(next(self._positions)), self.seed)

    def _next_batch(self) -> Batch:
        if self._executor is None:
            return self.load(self.dataset, self._next_places(), self._buffers.next())
        while len(self._waiting) < self._ahead:
            self._waiting.append(self._executor.submit(self.load, self.dataset, self._next_places(), self._buffers.next()))
        batch = self._waiting[0].result()  # stays in the queue while it is waited for: an interrupt must find it there
        self._waiting.popleft()
        return batch

    def _restart(self) -> None:
        self._drop_waiting()
        self._buffers = RingBuffers(self._ahead + 2)  # others, so that what was handed over holds as long as it should
        self._positions = self._rank_positions()

    def _drop_waiting(self) -> None:
        running = [future for future in self._waiting if not future.cancel()]
        wait(running)  # their buffers will be used again
        self._waiting.clear()
