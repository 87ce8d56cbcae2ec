"""A source -> raw shards, in parallel, restartable after being killed at any instant, the same bytes every time.

    rows of the source -> blocks of 16 -> (threads of the main process: download) -> worker processes: load, reject or keep
      -> OUT/.work/block-N/ (clips.tar, its index, result.json)      renamed when whole
      -> packed in order into OUT/raw-N.tar as soon as enough clips wait; a packed block keeps only its result.json
      -> rejected.jsonl -> manifest.json -> .work and downloads removed

Nothing is remembered but these files: a restart counts the clips in the finished shards, drops the blocks that lie in
them, and goes on with the blocks that are missing. Which worker did what, and when, leaves no trace in the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from t2v_ds.config import PrepareConfig, parse_part
from t2v_ds.data.blocks import make_blocks
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import MANIFEST, Manifest
from t2v_ds.data.pack import REJECTED, Packer, blocks_of, is_finished
from t2v_ds.data.report import write_report
from t2v_ds.data.sources import Source, open_source
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.files import create_once

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> Manifest:
    """Prepare `config.source` into the folder `config.out`; continues an interrupted run, and returns at once if done.

    Raises:
        DataError: the source cannot be read, every clip is rejected, the folder was prepared from another source or
            with other settings, or another process prepares it.
        ConfigError: no folder was given.
    """
    with _opened(config, fcntl.LOCK_EX) as (source, rows, identity, done):
        manifest = done if done is not None else _run(source, config, rows, identity)
        if config.report:
            write_report(config.out)
        return manifest


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
            for block in stack.enter_context(contextlib.closing(make_blocks(source, config, blocks, todo))):
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
    names = ("image_size", "min_frames", "max_frames", "require_trailer", "chunk_clips", "shard_clips", "compression", "limit")
    settings = {name: getattr(config, name) for name in names}
    settings |= {f"filters.{name}": value for name, value in dataclasses.asdict(config.filters).items()}
    return {"source": source.describe(), "settings": settings}


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
        todo = [block for block in range(len(packer.blocks)) if block not in packer.finished]
        # closing(): an error here must end the workers now, not when the generator is collected.
        blocks = stack.enter_context(contextlib.closing(make_blocks(source, config, packer.blocks, todo, lambda: packer.front)))
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
