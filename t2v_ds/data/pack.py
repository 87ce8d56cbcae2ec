"""Finished blocks of a source, in order -> shards of a fixed number of clips.

    .work/block-N/{clips.tar, result.json} in any order -> the unbroken run of finished blocks from the first one
      -> duplicates of earlier clips are passed over
      -> as soon as a shard's worth of clips waits: OUT/raw-K.tar -> clips.tar of the blocks in it removed

A block keeps its small result.json, so that counts and positions can be read off the folder after a kill, and duplicates be
judged again: there is no journal.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2v_ds.config import PrepareConfig
from t2v_ds.data.fingerprint import Duplicates, Fingerprint
from t2v_ds.data.manifest import ShardInfo
from t2v_ds.data.shards import index_path, load_shard_info, read_shard, write_shard
from t2v_ds.errors import DataError
from t2v_ds.files import write_atomically

BLOCK_ROWS = 16  # rows that one worker does at a time: what a kill can lose
REJECTED = "rejected.jsonl"
RESULT = "result.json"  # of a block: clips in its tar, their fingerprints, and the rejected ones
CLIPS = "clips.tar"  # of a block


def block_folder(work: Path, block: int) -> Path:
    """Where a finished block lies."""
    return work / f"block-{block:06d}"


def blocks_of(rows: int) -> list[range]:
    """The rows of each block of a source."""
    return [range(first, min(first + BLOCK_ROWS, rows)) for first in range(0, rows, BLOCK_ROWS)]


def is_finished(work: Path, block: int) -> bool:
    """Is the block there, packed or not?"""
    return (block_folder(work, block) / RESULT).exists()


class Packer:
    """Packs finished blocks, in order, into shards; its whole state is read off the folder when it is made.

    Attributes:
        blocks: the rows of each block.
        finished: the blocks that are.
        front: the first block that is not finished, so that clips behind it cannot be packed yet.
        shards: the finished ones.
        kept, rejected: clips so far, in the blocks before `front`.
    """

    def __init__(self, out: Path, config: PrepareConfig, rows: int) -> None:
        self.out, self.work, self.config = out, out / ".work", config
        self.blocks = blocks_of(rows)
        self.shards: list[ShardInfo] = []
        while index_path(self._shard_path(len(self.shards))).exists():
            try:
                self.shards.append(load_shard_info(self._shard_path(len(self.shards))))
            except DataError:
                break  # damaged since: it and what follows is packed again
        self._packed = sum(shard.clips for shard in self.shards)
        while not self._count_finished():
            pass

    @property
    def rows_done(self) -> int:
        """Rows in finished blocks."""
        return sum(len(self.blocks[block]) for block in self.finished)

    def add(self, block: int) -> None:
        """Take in a block that has just been finished, and pack what can be packed."""
        self.finished.add(block)
        self._advance()
        while self._queued - self._packed >= self._room():
            self._pack(self._room())

    def finish(self) -> None:
        """Pack the rest, when all blocks are finished."""
        while self._queued > self._packed:
            self._pack(min(self._room(), self._queued - self._packed))

    def write_rejected(self) -> None:
        """Write `rejected.jsonl`, in the order of the source."""
        lines = []
        for block in range(len(self.blocks)):
            rejected = [*self._result(block)["rejected"], *self._duplicates.get(block, {}).values()]
            lines += [json.dumps(one) + "\n" for one in sorted(rejected, key=lambda one: str(one["key"]))]
        write_atomically(self.out / REJECTED, "".join(lines).encode())

    def _shard_path(self, number: int) -> Path:
        return self.out / f"raw-{number:05d}.tar"

    def _room(self) -> int:
        """Clips of the next shard when it is full; a shard does not cross from one chunk to the next."""
        return min(self.config.shard_clips, self.config.chunk_clips - self._packed % self.config.chunk_clips)

    def _result(self, block: int) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((block_folder(self.work, block) / RESULT).read_bytes())
        return result

    def _count_finished(self) -> bool:
        """Count in what is finished; False if blocks were lost, so that it must be counted again.

        Lost are those whose clips were packed into a shard which is now damaged or gone; they are made again.
        """
        self.finished: set[int] = set()
        self.kept, self.front = 0, 0
        self.rejected: Counter[str] = Counter()
        self._judge = Duplicates(self.config.filters)
        self._duplicates: dict[int, dict[str, dict[str, Any]]] = {}  # block -> key -> as in `rejected.jsonl`
        self._waiting: deque[tuple[int, int, int]] = deque()  # (block, first clip's number, clips) of blocks not fully packed
        self._queued = 0  # clips in the blocks before `front`
        nothing_lost = True
        for block in range(len(self.blocks)):
            if is_finished(self.work, block):
                self.finished.add(block)
                self._advance()
                is_packed = block < self.front and self._queued <= self._packed
                if not is_packed and not (block_folder(self.work, block) / CLIPS).exists():
                    shutil.rmtree(block_folder(self.work, block))
                    nothing_lost = False
        return nothing_lost

    def _advance(self) -> None:
        """Judge and queue the finished blocks that follow on one another."""
        while self.front in self.finished:
            result = self._result(self.front)
            duplicates = self._judge.judge(Fingerprint(*one) for one in result["fingerprints"])
            if duplicates:
                self._duplicates[self.front] = {one["key"]: one for one in duplicates}
            self.rejected.update(one["reason"] for one in [*result["rejected"], *duplicates])
            clips = result["kept"] - len(duplicates)
            self.kept += clips
            self._waiting.append((self.front, self._queued, clips))
            self._queued += clips
            self.front += 1
            self._drop_packed()

    def _pack(self, clips: int) -> None:
        chunk = self._packed // self.config.chunk_clips
        self.shards.append(write_shard(self._shard_path(len(self.shards)), self._take(clips), chunk))
        self._packed += clips
        self._drop_packed()

    def _take(self, clips: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The next `clips` clips of the waiting blocks, read one at a time."""
        for block, first, _ in self._waiting:
            if first >= self._packed + clips:
                return
            number, duplicates = first, self._duplicates.get(block, {})
            for key, members in read_shard(block_folder(self.work, block) / CLIPS):
                if key in duplicates:
                    continue
                if self._packed <= number < self._packed + clips:
                    yield key, members
                number += 1

    def _drop_packed(self) -> None:
        """Free the disk of blocks whose clips all lie in finished shards; their results stay, to count and to restart."""
        while self._waiting and sum(self._waiting[0][1:]) <= self._packed:
            clips = block_folder(self.work, self._waiting.popleft()[0]) / CLIPS
            clips.unlink(missing_ok=True)
            index_path(clips).unlink(missing_ok=True)
