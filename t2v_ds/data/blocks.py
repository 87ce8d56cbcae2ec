"""Blocks of rows -> a folder each, made by several processes, in any order.

    block -> main process: its URLs are fetched by threads (prefetch.py) -> worker process: load, reject or keep
      -> .work/.block-N.PID/ (clips.tar, its index, result.json) -> renamed to .work/block-N/

What is in a block depends on its rows alone; what depends on other rows is decided where blocks are packed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path
from typing import Any

from t2v_ds.config import PrepareConfig
from t2v_ds.data.fingerprint import Fingerprint, check_content
from t2v_ds.data.gif import RejectedClip
from t2v_ds.data.pack import BLOCK_ROWS, CLIPS, RESULT, block_folder, is_finished
from t2v_ds.data.prefetch import Failures, Prefetcher
from t2v_ds.data.shards import raw_members, write_shard
from t2v_ds.data.sources import Source
from t2v_ds.files import rename_durably, write_atomically

_BLOCKS_AHEAD = 8  # times the workers: how far the others may run ahead of a slow block

# --- in the main process -------------------------------------------------------------------------------------------


def make_blocks(
    source: Source, config: PrepareConfig, blocks: list[range], missing: list[int], front: Callable[[], int] | None = None
) -> Generator[int, None, None]:
    """Have the missing blocks made; yields each as it is finished, in any order.

    Args:
        source: of the rows.
        config: of the run.
        blocks: the rows of each block.
        missing: the blocks to make.
        front: the first block that is not finished; the others do not run too far ahead of it. None: nobody waits for it.
    """
    urls = {block: source.urls(blocks[block]) for block in missing}
    uses = Counter(url for some in urls.values() for url in some)
    workers = min(config.workers or _usable_cores(), len(missing))
    ahead = max(_BLOCKS_AHEAD * workers, config.download.ahead // BLOCK_ROWS if uses else 0)
    todo = deque(missing)
    fetching: dict[Future[Any], int] = {}
    fetched: list[tuple[int, Failures]] = []  # a heap: what comes first is packed first
    making: set[Future[Any]] = set()
    with Prefetcher(source.fetcher(config), uses, config.download.threads) as prefetcher, _workers(source, config, workers) as make:
        while todo or fetching or fetched or making:
            while todo and len(fetching) + len(fetched) < ahead and (front is None or todo[0] < front() + ahead):
                block = todo.popleft()
                fetching[prefetcher.request(urls[block])] = block
            for future in [future for future in fetching if future.done()]:
                heapq.heappush(fetched, (fetching.pop(future), future.result()))
            while fetched and len(making) < (2 * workers if workers > 1 else 1):
                block, failures = heapq.heappop(fetched)
                making.add(make(block, blocks[block], failures))
            wait([*fetching, *making], return_when=FIRST_COMPLETED)
            for done in [future for future in making if future.done()]:
                making.remove(done)
                block = done.result()
                prefetcher.release(urls.pop(block))
                yield block


@contextlib.contextmanager
def _workers(source: Source, config: PrepareConfig, count: int) -> Iterator[Callable[[int, range, Failures], Future[int]]]:
    """A function that has a block made, by one of `count` processes, or by this one if one is enough."""
    if count <= 1:

        def make(block: int, rows: range, failures: Failures) -> Future[int]:
            future: Future[int] = Future()
            source.set_failures(failures)
            future.set_result(_make_block(source, config, block, rows))
            return future

        yield make
        return
    # spawn: a forked copy of a process with threads (torch, TensorBoard) may hang on their locks.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(count, context, _start_worker, (source, config))
    try:
        yield lambda block, rows, failures: executor.submit(_work, block, rows, failures)
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()  # a block takes its time; whatever it was doing is done again
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- in the worker processes ---------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What a worker process works on, set once when it starts."""

    source: Source
    config: PrepareConfig


_job: _Job | None = None


def _start_worker(source: Source, config: PrepareConfig) -> None:
    global _job
    _job = _Job(source, config)
    # The main process decides what a signal to the whole group means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this process when the main one is killed: nothing else would, and it would write beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_sentinel([parent.sentinel])
        os._exit(1)


def _work(block: int, rows: range, failures: Failures) -> int:
    assert _job is not None
    _job.source.set_failures(failures)
    return _make_block(_job.source, _job.config, block, rows)


def _make_block(source: Source, config: PrepareConfig, block: int, rows: range) -> int:
    """Load the rows of a block and leave the folder of the block; returns its number."""
    work = Path(config.out) / ".work"
    temporary = work / f".block-{block:06d}.{os.getpid()}"
    temporary.mkdir(exist_ok=True)
    rejected: list[dict[str, Any]] = []
    fingerprints: list[Fingerprint] = []

    def clips() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in rows:
            key, where = source.key(i), source.where(i)
            try:
                clip = source.load(i, config)
                if not source.is_drawn:  # a drawn clip may repeat, and in a few small frames it may hardly move
                    check_content(clip.frames, config.filters)
            except RejectedClip as error:
                rejected.append({"key": key, "reason": error.reason, "detail": error.detail, "source": where})
            else:
                if not source.is_drawn:
                    fingerprints.append(Fingerprint.of(key, where, clip.frames, clip.caption, config.filters))
                yield key, raw_members(clip.frames, clip.caption, clip.durations_ms, clip.provenance, config.compression)

    shard = write_shard(temporary / CLIPS, clips())
    result = {"kept": shard.clips, "fingerprints": [dataclasses.astuple(one) for one in fingerprints], "rejected": rejected}
    write_atomically(temporary / RESULT, json.dumps(result).encode())
    try:
        rename_durably(temporary, block_folder(work, block))
    except OSError:  # the same part runs twice, and the other process was faster
        if not is_finished(work, block):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
    return block
