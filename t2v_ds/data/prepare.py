"""A source -> raw shards, in parallel, restartable after being killed at any instant, the same bytes every time.

    rows of the source -> blocks of 16 -> worker processes: load, reject or keep
      -> OUT/.work/block-N/ (clips.tar, its index, result.json)      renamed when whole
      -> packed in order into OUT/raw-N.tar as soon as enough clips wait; a packed block keeps only its result.json
      -> rejected.jsonl -> manifest.json -> .work and downloads removed

Nothing is remembered but these files: a restart counts the clips in the finished shards, drops the blocks that lie in
them, and goes on with the blocks that are missing. Which worker did what, and when, leaves no trace in the result.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path
from typing import Any

from tqdm import tqdm

from t2v_ds.config import PrepareConfig, parse_part
from t2v_ds.data.gif import RejectedClip
from t2v_ds.data.manifest import MANIFEST, Manifest
from t2v_ds.data.pack import CLIPS, REJECTED, RESULT, Packer, block_folder, blocks_of, is_finished
from t2v_ds.data.shards import ShardDataset, raw_members, write_shard
from t2v_ds.data.sources import Source, open_source
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.files import create_once, rename_durably, write_atomically

logger = logging.getLogger(__name__)

_BLOCKS_AHEAD = 8  # times the workers: how far the others may run ahead of a slow block


def prepare(config: PrepareConfig) -> Manifest:
    """Prepare `config.source` into the folder `config.out`; continues an interrupted run, and returns at once if done.

    Raises:
        DataError: the source cannot be read, every clip is rejected, the folder was prepared from another source or
            with other settings, or another process prepares it.
        ConfigError: no folder was given.
    """
    with _opened(config, fcntl.LOCK_EX) as (source, rows, identity, done):
        return done if done is not None else _run(source, config, rows, identity)


def prepare_part(config: PrepareConfig) -> None:
    """Load and check the rows of `config.part`, beside other processes with other parts on any machine; `prepare` then packs them.

    A part that was killed goes on with the blocks that are missing. Raises as `prepare` does.
    """
    out = Path(config.out)
    with _opened(config, fcntl.LOCK_SH) as (source, rows, _, done):
        if done is not None:
            return
        work, blocks = out / ".work", blocks_of(rows)
        mine = range(len(blocks))[parse_part(config.part)]
        _remove_half_made(work, mine)
        todo = [block for block in mine if not is_finished(work, block)]
        total, missing = (sum(len(blocks[block]) for block in some) for some in (mine, todo))
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(_progress(total, total - missing))
            for block in stack.enter_context(contextlib.closing(_process_blocks(source, config, blocks, todo))):
                progress.update(len(blocks[block]))


def _progress(total: int, done: int) -> tqdm[Any]:
    return tqdm(total=total, initial=done, unit="clip", desc="prepare", mininterval=0.5)


@contextlib.contextmanager
def _opened(config: PrepareConfig, lock: int) -> Iterator[tuple[Source, int, dict[str, Any], Manifest | None]]:
    """The source, its number of rows, what decides the result, and the manifest if there is nothing left to do."""
    if not config.out:
        raise ConfigError("setting 'out' is empty; allowed: the folder to write shards to")
    source = open_source(config)
    rows = min(len(source), config.limit) if config.limit else len(source)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out, lock):
            identity = _identity(source, config)
            yield source, rows, identity, _finished(out, identity)
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process was killed while preparing {out} (out of memory?): what is finished is kept, "
            "so run the same command again, with fewer workers"
        ) from error
    except OSError as error:
        raise DataError(f"preparing {out} failed: {error}") from error


@contextlib.contextmanager
def _locked(out: Path, lock: int) -> Iterator[None]:
    """Keep a second `prepare` out of the folder; parts share it. The lock is on the folder: it leaves no file and dies with the process."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is preparing {out}: wait for it, or choose another folder") from error
        except OSError:  # some network file systems have no locks on folders
            logger.debug("no lock on %s", out, exc_info=True)
        yield
    finally:
        os.close(descriptor)


def _identity(source: Source, config: PrepareConfig) -> dict[str, Any]:
    """What decides the result: two runs that agree on this may share a folder."""
    names = ("image_size", "min_frames", "max_frames", "chunk_clips", "shard_clips", "limit")
    return {"source": source.describe(), "settings": {name: getattr(config, name) for name in names}}


def _finished(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of `out` if it is already prepared; DataError if it was prepared differently."""
    if (out / MANIFEST).exists():
        manifest = Manifest.load(out, "raw")
        _check_identity(out, {"source": manifest.source, "settings": manifest.settings}, identity)
        ShardDataset(out, "raw").close()  # raises if a shard went missing since
        _remove_scratch(out)
        logger.info("%s is already prepared: %d clips, %d frames", out, manifest.total_clips, manifest.total_frames)
        return manifest
    settings = out / ".work" / "settings.json"
    if settings.exists():
        _check_identity(out, json.loads(settings.read_bytes()), identity)
    elif any(out.glob("raw-*.tar")):
        raise DataError(f"{out} holds shards but no {MANIFEST}: it is not a folder that prepare can continue; choose another or empty it")
    elif strangers := sorted(path.name for path in out.iterdir() if path.name not in (".work", REJECTED)):
        # What is left over at the end is deleted: it must be ours.
        raise DataError(f"{out} holds other files ('{strangers[0]}'): choose a new or empty folder for the shards")
    else:
        (out / ".work").mkdir(exist_ok=True)
        create_once(settings, json.dumps(identity, indent=1).encode())  # parts may begin together
        _check_identity(out, json.loads(settings.read_bytes()), identity)
    return None


def _check_identity(out: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    for group in ("source", "settings"):
        for name in dict.fromkeys([*asked[group], *found[group]]):
            was, now = found[group].get(name), asked[group].get(name)
            if was != now:
                what = "the source's content" if name == "digest" else f"the source's {name}" if group == "source" else f"'{name}'"
                raise DataError(f"{out} was prepared with {what} {was!r}, this run has {now!r}: choose another folder, or remove this one")


def _run(source: Source, config: PrepareConfig, rows: int, identity: dict[str, Any]) -> Manifest:
    out = Path(config.out)
    packer = Packer(out, config, rows)
    _remove_half_made(packer.work, range(len(packer.blocks)))
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_progress(rows, packer.rows_done))
        todo = [block for block in range(len(packer.blocks)) if block not in packer.results]
        # closing(): an error here must end the workers now, not when the generator is collected.
        blocks = stack.enter_context(contextlib.closing(_process_blocks(source, config, packer.blocks, todo, packer)))
        for block in blocks:
            packer.add(block)
            progress.update(len(packer.blocks[block]))
            progress.set_postfix(kept=packer.kept, rejected=packer.rejected.total(), refresh=False)
    packer.finish()
    packer.write_rejected()
    if not packer.shards:
        _remove_scratch(out)
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(packer.rejected.items()))
        raise DataError(f"no clip of source '{config.source}' can be used: {counts}; see {out / REJECTED}")
    rejected = dict(sorted(packer.rejected.items()))
    manifest = Manifest.build("raw", packer.shards, image_size=config.image_size, rejected=rejected, **identity)
    manifest.save(out)
    _remove_scratch(out)
    logger.info("prepared %s: %d clips, %d frames, rejected %s", out, manifest.total_clips, manifest.total_frames, rejected or "none")
    return manifest


def _remove_half_made(work: Path, blocks: range) -> None:
    """Delete what killed processes left of these blocks; the folder is listed once, however many they are."""
    for path in work.glob(".block-*"):
        if int(path.name.split(".")[1].removeprefix("block-")) in blocks:
            shutil.rmtree(path, ignore_errors=True)


def _remove_scratch(out: Path) -> None:
    if not (out / ".work" / "settings.json").is_file():  # written first: without it nothing there is ours
        return
    for name in ("downloads", ".work"):  # the one that says so goes last
        if (out / name).exists():
            shutil.rmtree(out / name)


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


def _work(block: int, rows: range) -> int:
    assert _job is not None
    return _make_block(_job.source, _job.config, block, rows)


def _make_block(source: Source, config: PrepareConfig, block: int, rows: range) -> int:
    """Load the rows of a block and leave the folder of the block; returns its number."""
    work = Path(config.out) / ".work"
    temporary = work / f".block-{block:06d}.{os.getpid()}"
    temporary.mkdir(exist_ok=True)
    rejected: list[dict[str, Any]] = []

    def clips() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in rows:
            try:
                clip = source.load(i, config)
            except RejectedClip as error:
                rejected.append({"key": source.key(i), "reason": error.reason, "detail": error.detail, "source": source.where(i)})
            else:
                yield source.key(i), raw_members(clip.frames, clip.caption, clip.durations_ms, clip.provenance)

    source.prefetch(rows, config)
    shard = write_shard(temporary / CLIPS, clips())
    write_atomically(temporary / RESULT, json.dumps({"kept": shard.clips, "rejected": rejected}).encode())
    try:
        rename_durably(temporary, block_folder(work, block))
    except OSError:  # the same part runs twice, and the other process was faster
        if not is_finished(work, block):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
    source.release(rows, config)
    return block


# --- in the main process -------------------------------------------------------------------------------------------


def _process_blocks(
    source: Source, config: PrepareConfig, blocks: list[range], missing: list[int], packer: Packer | None = None
) -> Generator[int, None, None]:
    """Have the missing blocks made, not too far ahead of what is packed; yields each as it is finished, in any order."""
    todo = deque(missing)
    workers = min(config.workers or _usable_cores(), len(todo))
    if workers <= 1:
        for block in todo:
            yield _make_block(source, config, block, blocks[block])
        return
    # spawn: a forked copy of a process with threads (torch, TensorBoard) may hang on their locks.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, context, _start_worker, (source, config))
    try:
        running: set[Future[int]] = set()
        while todo or running:
            while todo and len(running) < 2 * workers and (packer is None or todo[0] < packer.front + _BLOCKS_AHEAD * workers):
                block = todo.popleft()
                running.add(executor.submit(_work, block, blocks[block]))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()  # a block may take minutes where links are dead; whatever it was doing is done again
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
