"""Parts of a data set, by clip number: what is held out of training, and every chunk as often as every other.

dataset -> held_out(dataset, share)      -> numbers of the clips kept from training, by a hash of their keys
        -> Selection(dataset, numbers)   -> a data set of those clips, in that order
chunks  -> balanced(numbers by chunk)    -> every chunk's clips, the smaller chunks' repeated
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import ShardInfo
from t2v_ds.errors import ConfigError


class Selection:
    """Some clips of a data set; a `stream.Dataset`. Safe to read from many threads, as the data set is."""

    def __init__(self, dataset: ShardDataset, numbers: np.ndarray) -> None:
        self.dataset = dataset
        self.numbers = numbers.astype(np.int64)  # [N]

    @property
    def digest(self) -> str:
        """A hash of the data set's content and of what is selected."""
        return hashlib.sha256(f"{self.dataset.digest}\0".encode() + self.numbers.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, i: int) -> dict[str, Any]:
        """Read clip `i` of the selection; see `ShardDataset.read`."""
        return self.dataset.read(int(self.numbers[i]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Frames of each clip: int64 [N]."""
        return self.dataset.lengths[self.numbers]

    @property
    def shards(self) -> list[ShardInfo]:
        """Those of the data set."""
        return self.dataset.shards

    @property
    def shard_ranges(self) -> list[np.ndarray]:
        """For each shard, the numbers of the selection's clips that lie in it."""
        starts = [part.start for part in self.dataset.shard_ranges]
        shards = np.searchsorted(starts, self.numbers, side="right") - 1
        return [(shards == shard).nonzero()[0] for shard in range(len(starts))]

    def keys(self, numbers: np.ndarray) -> list[str]:
        """The names of many clips."""
        return self.dataset.keys(self.numbers[numbers])

    def captions(self, numbers: np.ndarray) -> list[str]:
        """The captions of many clips."""
        return self.dataset.captions(self.numbers[numbers])

    def read_codes(self, numbers: np.ndarray, buffer: Buffer) -> np.ndarray:
        """Read the codes of many clips; see `ShardDataset.read_codes`."""
        return self.dataset.read_codes(self.numbers[numbers], buffer)

    def read_frames(self, numbers: np.ndarray, frames: Sequence[np.ndarray], buffer: Buffer) -> np.ndarray:
        """Read some frames of many clips; see `ShardDataset.read_frames`."""
        return self.dataset.read_frames(self.numbers[numbers], frames, buffer)


def split(dataset: ShardDataset, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the clips to train on and of those held out: int64 twice, in order.

    A clip is held out by a hash of its key, so that it is in every chunk, every order and every part of the data.

    Raises:
        ConfigError: nothing is left to train on.
    """
    if share == 0:
        return np.arange(len(dataset)), np.arange(0)
    points = [int.from_bytes(hashlib.sha256(dataset.key(i).encode()).digest()[:8], "big") / 2**64 for i in range(len(dataset))]
    held_out = np.array(points) < share  # [N]
    if held_out.all():
        raise ConfigError(f"setting 'held_out' is {share}, which leaves none of the {len(dataset)} clips to train on: allowed: less")
    return (~held_out).nonzero()[0], held_out.nonzero()[0]


def balanced(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Every group as often as the largest: its numbers repeated, cut where it is as long (int64)."""
    longest = max(len(group) for group in groups)
    return np.concatenate([np.resize(group, longest) for group in groups])
