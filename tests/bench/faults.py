"""Damage a small data folder in many ways and print what webdataset and this project make of it.

    .venv/bin/python -m tests.bench.faults [--kind tokens|raw]

    a good folder -> a copy -> one damage -> webdataset reads all of it | ours: open, read every clip, t2v verify
                                          -> without index and manifest, as others write tars: t2v index

A cell says at which step the damage is noticed, and by which sentence. webdataset is used as its documentation shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.config import IndexConfig
from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import MANIFEST
from t2v_ds.data.shards import ARRAYS, index_path, raw_members, token_members, write_shard
from t2v_ds.data.validate import QUARANTINE, index_folder, verify_folder
from t2v_ds.errors import UserError
from tests.fault_cases import (
    CLIPS,
    CODES,
    FAULTS,
    LARGE,
    SHARDS,
    Clip,
    another_user,
    build,
    copies,
    full_disk,
    make_clip,
    shard_of,
    while_running,
    with_more,
)

# --- what readers make of it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """At which step damage was noticed ("" if it was not) and what was said; what was delivered before, and after in spite of it."""

    step: str
    sentence: str
    good: int = 0
    wrong: int = 0

    def __str__(self) -> str:
        return f"{self.step}: {self.sentence}"


def is_same(clip: Clip, array: Any, caption: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == clip[0].dtype and np.array_equal(array, clip[0]) and caption == clip[1]


def by_webdataset(folder: Path, kind: str, clips: dict[str, Clip], during: Callable[[], None] = lambda: None) -> Outcome:
    """Read all shards; `during` is called after the first clip."""
    import webdataset

    urls = [str(shard_of(folder, kind, n)) for n in range(SHARDS)]
    good = wrong = 0
    step = sentence = ""
    try:
        for n, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False).decode()):
            if n == 0:
                during()
            clip, text = clips.get(sample["__key__"]), sample.get("json", {})
            right = clip is not None and is_same(clip, sample.get(f"{ARRAYS[kind]}.npy"), text.get("caption"))
            good, wrong = good + right, wrong + (not right)
    except Exception as error:
        step, sentence = "read", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(step, sentence, good, wrong)


def by_us(folder: Path, kind: str, clips: dict[str, Clip], during: Callable[[], None] = lambda: None) -> Outcome:
    """Open, read every clip, verify; the first step that notices anything."""
    good = wrong = 0
    said = ["", ""]
    try:
        with ShardDataset(folder, kind) as dataset:
            said[0] = "read"
            for i in range(len(dataset)):
                try:
                    sample = dataset.read(i)
                except UserError as error:
                    said[1] = said[1] or str(error)
                else:
                    right = is_same(clips[dataset.key(i)], sample[ARRAYS[kind]], sample["caption"])
                    good, wrong = good + right, wrong + (not right)
                if i == 0:
                    during()
            try:
                wrong += not is_batch_right(dataset, clips)
            except UserError as error:
                said[1] = said[1] or str(error)
        if not said[1]:
            said = ["verify", next(iter(verify_folder(folder)[1]), "")]
    except UserError as error:
        said = [said[0] or "open", str(error)]
    return Outcome(said[0] if said[1] else "", said[1], good, wrong)


def is_batch_right(dataset: ShardDataset, clips: dict[str, Clip]) -> bool:
    """Whether the clips, read as a training run reads them, are those that were written."""
    numbers = np.arange(len(dataset))
    wanted = np.concatenate([clips[key][0] for key in dataset.keys(numbers)])
    if dataset.kind == "tokens":
        return np.array_equal(dataset.read_codes(numbers, Buffer()), wanted)
    return np.array_equal(dataset.read_frames(numbers, [np.arange(length) for length in dataset.lengths], Buffer()), wanted)


def by_index(folder: Path, kind: str, clips: dict[str, Clip]) -> Outcome:
    """Index a folder as others write it; then read what is left of it when everything is allowed."""
    for path in (folder / MANIFEST, *folder.glob("*.index.json")):
        path.unlink(missing_ok=True)
    codes = CODES if kind == "tokens" else None
    step = sentence = ""
    try:
        index_folder(IndexConfig(data=str(folder), max_bad_share=0), codes)
    except UserError as error:
        step, sentence = "index", str(error)
    listed = [json.loads(line) for line in (folder / QUARANTINE).read_text().splitlines()]
    if listed and "ends early" not in sentence:
        sentence = f"{listed[0]['reason']}: {listed[0]['detail']}"
    good = wrong = 0
    if step:
        index_folder(IndexConfig(data=str(folder), max_bad_share=1, accept_cut=True), codes)
    with ShardDataset(folder, kind) as dataset:
        for i in range(len(dataset)):
            sample = dataset.read(i)
            right = dataset.key(i) in clips and is_same(clips[dataset.key(i)], sample[ARRAYS[kind]], sample["caption"])
            good, wrong = good + right, wrong + (not right)
    return Outcome(step, sentence, good, wrong)


# --- what happens while a program runs --------------------------------------------------------------------------------


def disk_full(root: Path, kind: str) -> tuple[str, Outcome]:
    """(webdataset, ours) when a disk fills while a shard is written."""
    arrays = [make_clip(i, kind) for i in range(CLIPS)]
    theirs = "not installed"
    if importlib.util.find_spec("webdataset"):
        import webdataset

        path = shard_of(root, kind, 0)
        try:
            with full_disk(6144), webdataset.TarWriter(str(path)) as writer:
                for i, array in enumerate(arrays):
                    writer.write({"__key__": f"{i:08d}", f"{ARRAYS[kind]}.npy": array, "json": {"caption": f"caption {i}"}})
        except OSError as error:
            theirs = f"error: {error.strerror}"
        if path.exists():
            with contextlib.suppress(Exception):
                left = sum(1 for _ in webdataset.WebDataset([str(path)], shardshuffle=False))
                theirs += f"; what was written stays under the shard's name, and **{left} of {CLIPS} are read without an error**"
            path.unlink()
    make = token_members if kind == "tokens" else raw_members
    samples = [(f"{i:08d}", make(array, f"caption {i}", [50] * len(array), {})) for i, array in enumerate(arrays)]
    path = shard_of(root, kind, 9)
    try:
        with full_disk(6144):
            write_shard(path, samples)
    except OSError as error:
        is_clean = not path.exists() and not index_path(path).exists()
        return theirs, Outcome("write", f"{error.strerror}; {'no shard and no index is left' if is_clean else 'A PART IS LEFT'}")
    return theirs, Outcome("", "")


SHORT_READS = r"""
#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
// Regular files give at most 1000 bytes a call, as a file system over a network may.
static size_t most(int fd, size_t n) { struct stat s; return n > 1000 && !fstat(fd, &s) && S_ISREG(s.st_mode) ? 1000 : n; }
extern "C" {
static long calls = 0;
long t2v_short_reads() { return calls; }
#define READ(name) \
  ssize_t name(int fd, void* to, size_t n, off_t at) { \
    static auto real = (ssize_t (*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, #name); \
    calls += most(fd, n) < n; return real(fd, to, most(fd, n), at); }
READ(pread) READ(pread64)
static ssize_t first(int fd, const struct iovec* to, int count, off_t at) {
  static auto real = (ssize_t (*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
  int i = 0;
  while (i < count - 1 && !to[i].iov_len) ++i;
  const size_t n = most(fd, to[i].iov_len);
  calls += count - i > 1 || n < to[i].iov_len;
  return real(fd, to[i].iov_base, n, at);
}
ssize_t preadv(int fd, const struct iovec* to, int count, off_t at) { return first(fd, to, count, at); }
ssize_t preadv64(int fd, const struct iovec* to, int count, off_t at) { return first(fd, to, count, at); }
ssize_t preadv2(int fd, const struct iovec* to, int count, off_t at, int) { return first(fd, to, count, at); }
ssize_t preadv64v2(int fd, const struct iovec* to, int count, off_t at, int) { return first(fd, to, count, at); }
ssize_t read(int fd, void* to, size_t n) {
  static auto real = (ssize_t (*)(int, void*, size_t))dlsym(RTLD_NEXT, "read");
  calls += most(fd, n) < n; return real(fd, to, most(fd, n)); }
}
"""
CHILD = """
import ctypes, json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests import fault_cases as cases
from tests.bench import faults
folder, kind, reader = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
clips = {{f"{{i:08d}}": (cases.make_clip(i, kind, side=cases.LARGE), f"caption {{i}}") for i in range(cases.SHARDS * cases.CLIPS)}}
before = ctypes.CDLL(None).t2v_short_reads()
outcome = getattr(faults, reader)(folder, kind, clips)
print(json.dumps([outcome.good, outcome.wrong, str(outcome), ctypes.CDLL(None).t2v_short_reads() - before]))
"""


def compile_short_reads(folder: Path) -> Path:
    """A library for LD_PRELOAD under which files give at most 1000 bytes a call."""
    source, library = folder / "short.cpp", folder / "short.so"
    source.write_text(SHORT_READS)
    subprocess.run([os.environ.get("CXX", "g++"), "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def short_reads(folder: Path, kind: str, reader: str, library: Path, **env: str) -> tuple[int, int, str, int]:
    """(good clips, wrong clips, outcome, shortened reads) of a process that reads `folder` under short reads."""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", CHILD.format(root=root), str(folder), kind, reader]
    done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(library), **env}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    good, wrong, outcome, calls = json.loads(done.stdout.splitlines()[-1])
    return good, wrong, outcome, calls


# --- the table --------------------------------------------------------------------------------------------------------


def theirs(outcome: Outcome, total: int) -> str:
    lost = total - outcome.good - outcome.wrong
    wrong = f"**delivers {outcome.wrong} wrong or incomplete**" if outcome.wrong else ""
    if outcome.step:
        return "; ".join(filter(None, [f"error: {short(outcome.sentence)}", wrong]))
    silent = f"**silently loses {lost} of {total}**" if lost > 0 else ""
    return "; ".join(filter(None, [silent, wrong])) or ("reads all" if lost == 0 else f"reads {-lost} more")


def short(sentence: str, length: int = 84) -> str:
    """Without paths, for a table."""
    sentence = re.sub(r"\S*/(\w[\w.-]*)'?", r"\1", sentence).replace("|", "/").removeprefix("shard ")
    return sentence if len(sentence) <= length else sentence[: length - 3] + "..."


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Damage, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("tokens", "raw"), default="tokens")
    kind = parser.parse_args().kind
    logging.disable(logging.WARNING)
    has_webdataset = importlib.util.find_spec("webdataset") is not None
    if not has_webdataset:
        print("webdataset is not installed: its column is left empty\n")
    row("damage", "webdataset", "a folder of ours: noticed at", "others' tars: `t2v index`", "good clips kept")
    row("---", "---", "---", "---", "---")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        originals = build(root / "good", kind)
        for fault in FAULTS:
            clips = with_more(originals, fault)
            total = len(clips)
            damaged = copies(root, root / "good", fault, kind)
            folder = next(damaged)
            webdataset = theirs(by_webdataset(folder, kind, clips), total) if has_webdataset else ""
            ours = by_us(next(damaged), kind, originals)
            foreign, kept = "-", "-"
            if fault.index:
                outcome = by_index(next(damaged), kind, clips)
                foreign, kept = short(outcome.sentence), f"{outcome.good} of {total}"
            elif fault.in_tar:
                foreign = "a tar does not show it"
            noticed = f"{ours.step}: {short(ours.sentence)}"
            if ours.step == "verify":  # the index does not need what is damaged
                noticed = f"reads {ours.good} of {len(originals)} right; {noticed}"
            row(fault.name, webdataset if fault.in_tar else "has none", noticed, foreign, kept)
        clips, total = originals, len(originals)
        theirs_full, ours = disk_full(root, kind)
        row("the disk fills while a shard is written", theirs_full, f"{ours.step}: {ours.sentence}", "-", "-")
        for what, happens, _, as_nobody in while_running(kind):
            outcomes = []
            for reader in ([by_webdataset] if has_webdataset else []) + [by_us]:
                shutil.rmtree(root / "live", ignore_errors=True)
                shutil.copytree(root / "good", root / "live")
                outcomes.append(running(reader, root / "live", kind, clips, happens, as_nobody))
            shown = theirs(outcomes[0], total) if has_webdataset else ""
            row(what, shown, f"{outcomes[-1].step}: {short(outcomes[-1].sentence)}", "-", "-")
        library = compile_short_reads(root)
        cells = []
        build(root / "large", kind, side=LARGE)
        for reader in (["by_webdataset"] if has_webdataset else []) + ["by_us"]:
            good, _, _, calls = short_reads(root / "large", kind, reader, library, T2V_CLIPS="pread")  # as over a network
            cells.append(f"reads {good} of {total} ({calls} short reads)")
        row("reads give fewer bytes than asked for (NFS)", *(cells if has_webdataset else ["", *cells]), "-", "-")


def running(
    reader: Callable[..., Outcome], folder: Path, kind: str, clips: dict[str, Clip], happens: Callable[[Path], None], as_nobody: bool
) -> Outcome:
    """Read a folder to which something happens after the first clip."""
    with contextlib.ExitStack() as stack:

        def during() -> None:
            happens(folder)
            stack.enter_context(another_user(as_nobody and os.geteuid() == 0))

        return reader(folder, kind, clips, during)


if __name__ == "__main__":
    main()
