"""Fuzz the compiled GIF decoder with sanitizers, and compare what it decodes with Pillow's way.

    .venv/bin/python -m tests.fuzz.fuzz_gif [--count 10000] [--seed 0] [--first 0] [--source FOLDER] [--keep FOLDER]

    mutants -> gif_main (AddressSanitizer, UndefinedBehaviorSanitizer, bounded memory, a time limit for each), many in one process
            -> the same mutants by Pillow's way -> kinds of outcome, counted; a fault ends with exit code 1

Seeds are the cases of tests/gif_cases.py, and with --source the GIFs of a folder as well. --keep writes every mutant with a fault to
a folder. A fault can be had again alone: --first NUMBER --count 1.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2v_ds.data.gif import RejectedClip, decode_gif
from tests.fuzz.mutate import damage, folder_seeds, own_seeds
from tests.gif_ways import decoding_by

MAX_PIXELS, MAX_FRAMES, SECONDS = 1 << 20, 60, 20
SIZES = (1, 7, 12, 32, 33)  # of resized frames
MEMORY_MB = 1024  # a mutant needs the frames three times, a canvas, and a picture's indices
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS", "-D_GLIBCXX_SANITIZE_VECTOR=1")
HERE = Path(__file__).resolve().parent
FAULTS = {77: "hang", 78: "vector instructions give other frames"}  # exit codes of gif_main; others: crash


@dataclass(frozen=True)
class Mutant:
    """A damaged file and how it is decoded."""

    number: int
    data: bytes

    @property
    def trailer(self) -> bool:
        """Whether it needs one."""
        return self.number % 2 == 0

    @property
    def size(self) -> int:
        """Of its resized frames."""
        return SIZES[self.number % len(SIZES)]


@dataclass(frozen=True)
class Outcome:
    """What happened to a mutant: a kind to count by; a fault, or not; and what the program said."""

    kind: str
    fault: bool = False
    detail: str = ""


def build(folder: Path, source: Path = HERE / "gif_main.cpp") -> Path:
    """Compile the decoder with sanitizers; takes seconds."""
    program = folder / "gif_main"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *SANITIZE, "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(compiler)} with sanitizers failed: {done.stderr[:2000]}")
    return program


def run(program: Path, mutants: Sequence[Mutant]) -> Iterator[list[int] | Outcome]:
    """A line of numbers for each mutant, or its fault; those behind a fault go to a new process."""
    options = f"hard_rss_limit_mb={MEMORY_MB}:max_allocation_size_mb={MEMORY_MB}:detect_leaks=1"
    env = {**os.environ, "ASAN_OPTIONS": options}
    command = [str(program), *map(str, (MAX_PIXELS, MAX_FRAMES, SECONDS))]
    while mutants:
        stream = b"".join(len(one.data).to_bytes(4, "little") + bytes([one.trailer, one.size]) + one.data for one in mutants)
        done = subprocess.run(command, input=stream, capture_output=True, env=env, check=False)
        lines = done.stdout.decode().splitlines()
        yield from ([int(number) for number in line.split()] for line in lines)
        if done.returncode and len(lines) == len(mutants):
            raise RuntimeError(f"gif_main ended with {done.returncode}: {done.stderr.decode()[-2000:]}")  # a leak: of no one file
        if len(lines) < len(mutants):
            yield Outcome(FAULTS.get(done.returncode, "crash"), True, done.stderr.decode()[:3000])
        mutants = mutants[len(lines) + 1 :]


def checksum(frames: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(frames).tobytes())


def compare(mutant: Mutant, numbers: list[int]) -> Outcome:
    """Pillow's way against what gif_main printed."""
    status, count, width, height, frames, resized = numbers
    try:
        with decoding_by("pillow"):
            slow = decode_gif(mutant.data, MAX_FRAMES, MAX_PIXELS, require_trailer=mutant.trailer)
    except RejectedClip as error:
        if status:
            return Outcome(f"both reject: {error.reason}")
        if "indices are of 1 bits" in error.detail:  # which Pillow cannot read
            return Outcome("decoded, and Pillow cannot")
        return Outcome("decoded, and Pillow's way rejects", True, str(error))
    if status:
        return Outcome("left to Pillow, which decodes it", True)
    if slow.frames.shape != (count, height, width, 3):
        return Outcome("other shape", True, f"{numbers[1:4]}, Pillow's way {slow.frames.shape}")
    if checksum(slow.frames) != frames:
        return Outcome("other frames", True)
    if count <= 8:
        with decoding_by("pillow"):
            small = decode_gif(mutant.data, MAX_FRAMES, MAX_PIXELS, size=mutant.size, require_trailer=mutant.trailer).frames
        if checksum(small) != resized:
            return Outcome("other resized frames", True)
    return Outcome("same frames")


def fuzz(program: Path, seeds: Sequence[bytes], seed: int, numbers: range, keep: Path | None = None, batch: int = 100) -> Counter[str]:
    """Count the outcomes of mutants; a fault's kind begins with "FAULT"."""
    kinds: Counter[str] = Counter()
    for first in range(numbers.start, numbers.stop, batch):
        mutants = [Mutant(number, damage(seeds, seed, number)) for number in range(first, min(first + batch, numbers.stop))]
        for mutant, ran in zip(mutants, run(program, mutants), strict=True):
            outcome = ran if isinstance(ran, Outcome) else compare(mutant, ran)
            kinds[f"FAULT {outcome.kind}" if outcome.fault else outcome.kind] += 1
            if outcome.fault:
                print(f"mutant {mutant.number} of seed {seed}: {outcome.kind}\n{outcome.detail}", file=sys.stderr, flush=True)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{mutant.number}.gif").write_bytes(mutant.data)
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--keep", type=Path)
    flags = parser.parse_args()
    seeds = own_seeds() + (folder_seeds(flags.source) if flags.source else [])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kinds = fuzz(build(Path(folder)), seeds, flags.seed, range(flags.first, flags.first + flags.count), flags.keep)
    print(f"{flags.count} mutants of {len(seeds)} GIFs in {time.monotonic() - started:.0f} s")
    for kind, number in kinds.most_common():
        print(f"{number:8d}  {kind}")
    return int(any(kind.startswith("FAULT") for kind in kinds))


if __name__ == "__main__":
    raise SystemExit(main())
