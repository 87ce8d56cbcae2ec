"""Time the reading of shuffled clips against other libraries, per second of CPU time.

    .venv/bin/python tests/bench/stream.py [--kind tokens|frames] [--clips 4000] [--batch 8] [--frames 4] [--repeats 7] [--out FOLDER]

    the same random clips, written once for each way -> a process for each way -> rounds: so many batches of every way, one after
    another -> medians

Tokens: whole clips of 15 to 40 frames of 32 x 32 uint16 codes. Frames: FRAMES random frames of 128 x 128 of each clip; a way that
cannot read a frame alone reads the clip. A process of its own, and CPU time and not time on the clock, because ways have threads that
read ahead.
Everything is in the page cache. "memcpy" copies the same bytes from memory to memory: what no way can beat. Libraries that are not
installed (mosaicml-streaming, litdata) are named and left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.shards import raw_members, token_members, write_shard
from t2v_ds.data.stream import ClipStream, random_frames, whole_codes

SHARD = 500  # clips
Batches = Iterator[Any]


def clip(i: int, kind: str) -> np.ndarray:
    """Random numbers: what they are makes no difference to any way here."""
    rng = np.random.default_rng(i)
    length = int(rng.integers(15, 41))
    if kind == "tokens":
        return rng.integers(0, 1024, (length, 32, 32), dtype=np.uint16)
    return rng.integers(0, 256, (length, 128, 128, 3), dtype=np.uint8)


def write(folder: Path, kind: str, clips: int) -> None:
    """Our shards, which webdataset reads as well, and one file of all arrays for memmap."""
    shards = []
    make = token_members if kind == "tokens" else raw_members
    name = "tokens" if kind == "tokens" else "raw"
    with (folder / "all.bin").open("wb") as whole:
        for first in range(0, clips, SHARD):
            samples = []
            for i in range(first, min(first + SHARD, clips)):
                array = clip(i, kind)
                array.tofile(whole)
                samples.append((f"{i:08d}", make(array, f"caption {i}", [50] * len(array), {})))
            shards.append(write_shard(folder / f"{name}-{first // SHARD:05d}.tar", samples))
    fields = {"grid_size": 32, "codebook_size": 1024, "tokenizer_id": "none"} if kind == "tokens" else {"image_size": 128}
    Manifest.build(name, shards, **fields).save(folder)


def ours(folder: Path, flags: argparse.Namespace, threads: int) -> Batches:
    """The stream of a training run."""
    load = whole_codes if flags.kind == "tokens" else random_frames(flags.frames)
    dataset = ShardDataset(folder, "tokens" if flags.kind == "tokens" else "raw")
    return ClipStream(dataset, flags.batch, seed=1, threads=threads, load=load)


def webdataset(folder: Path, flags: argparse.Namespace) -> Batches:
    """The usual pipeline."""
    import webdataset as wds

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    name = "codes.npy" if flags.kind == "tokens" else "frames.npy"
    rng = np.random.default_rng(0)
    samples = wds.WebDataset(shards, shardshuffle=len(shards), seed=1).shuffle(200).decode().to_tuple(name, "json").repeat()
    return batched((some(array, flags, rng) for array, _ in samples), flags)


def some(array: np.ndarray, flags: argparse.Namespace, rng: np.random.Generator) -> np.ndarray:
    """All codes, or a few random frames."""
    return array if flags.kind == "tokens" else array[np.sort(rng.choice(len(array), flags.frames, replace=False))]


def batched(arrays: Iterator[np.ndarray], flags: argparse.Namespace) -> Batches:
    """Lists of arrays for tokens, of which the lengths differ; one array for frames."""
    while True:
        batch = [next(arrays) for _ in range(flags.batch)]
        yield batch if flags.kind == "tokens" else np.concatenate(batch)


def mosaic(folder: Path, flags: argparse.Namespace) -> Batches:
    """mosaicml-streaming."""
    from streaming import MDSWriter, StreamingDataset

    written, name = folder / "mosaic", "ndarray:uint16" if flags.kind == "tokens" else "ndarray:uint8"
    if not written.exists():
        with MDSWriter(out=str(written), columns={"array": name, "caption": "str"}, size_limit=2**26) as writer:
            for i in range(flags.clips):
                writer.write({"array": clip(i, flags.kind), "caption": f"caption {i}"})
    dataset = StreamingDataset(local=str(written), shuffle=True, batch_size=flags.batch, shuffle_seed=1)
    rng = np.random.default_rng(0)

    def samples() -> Iterator[np.ndarray]:
        while True:
            for sample in dataset:
                yield some(sample["array"], flags, rng)

    return batched(samples(), flags)


def lightning(folder: Path, flags: argparse.Namespace) -> Batches:
    """litdata."""
    import litdata

    written = folder / "litdata"
    if not written.exists():
        litdata.optimize(
            fn=_litdata_sample, inputs=[(i, flags.kind) for i in range(flags.clips)], output_dir=str(written), chunk_bytes="64MB",
            num_workers=1,
        )  # fmt: skip
    dataset = litdata.StreamingDataset(str(written), shuffle=True, seed=1)
    rng = np.random.default_rng(0)

    def samples() -> Iterator[np.ndarray]:
        while True:
            for sample in dataset:
                yield some(np.asarray(sample["array"]), flags, rng)

    return batched(samples(), flags)


def _litdata_sample(which: tuple[int, str]) -> dict[str, Any]:
    return {"array": clip(*which), "caption": f"caption {which[0]}"}


def memmap(folder: Path, flags: argparse.Namespace) -> Batches:
    """One file that is mapped, copied from in random order into a buffer that is used again; nothing is checked."""
    lengths = ShardDataset(folder, "tokens" if flags.kind == "tokens" else "raw").lengths
    shape, dtype = ((32, 32), np.uint16) if flags.kind == "tokens" else ((128, 128, 3), np.uint8)
    whole = np.memmap(folder / "all.bin", dtype=dtype, mode="r").reshape(-1, *shape)
    return copies(whole, lengths, flags)


def memcpy(folder: Path, flags: argparse.Namespace) -> Batches:
    """The same from memory."""
    lengths = ShardDataset(folder, "tokens" if flags.kind == "tokens" else "raw").lengths
    shape, dtype = ((32, 32), np.uint16) if flags.kind == "tokens" else ((128, 128, 3), np.uint8)
    return copies(np.fromfile(folder / "all.bin", dtype=dtype).reshape(-1, *shape), lengths, flags)


def copies(whole: np.ndarray, lengths: np.ndarray, flags: argparse.Namespace) -> Batches:
    """Batches copied from `whole`, all clips one after another."""
    starts = np.cumsum(lengths) - lengths
    rng = np.random.default_rng(1)
    buffer = np.empty((flags.batch * (40 if flags.kind == "tokens" else flags.frames), *whole.shape[1:]), dtype=whole.dtype)
    while True:
        order = rng.permutation(len(lengths))
        for first in range(0, len(order) - flags.batch + 1, flags.batch):
            place = 0
            for i in order[first : first + flags.batch].tolist():
                if flags.kind == "tokens":
                    buffer[place : place + lengths[i]] = whole[starts[i] : starts[i] + lengths[i]]
                    place += lengths[i]
                else:
                    for frame in rng.choice(lengths[i], flags.frames, replace=False).tolist():
                        buffer[place] = whole[starts[i] + frame]
                        place += 1
            yield buffer[:place]


WAYS: dict[str, Callable[[Path, argparse.Namespace], Batches]] = {
    "t2v_ds, 1 thread ahead": lambda folder, flags: ours(folder, flags, 1),
    "t2v_ds, no thread": lambda folder, flags: ours(folder, flags, 0),
    "webdataset, shuffled": webdataset,
    "mosaicml-streaming": mosaic,
    "litdata": lightning,
    "memmap, not checked": memmap,
    "memcpy": memcpy,
}


def work(pipe: Connection, name: str, folder: Path, flags: argparse.Namespace) -> None:
    """What the process of a way does: send the seconds to the first batch, then for each number of batches the CPU seconds."""
    try:
        WAYS[name](folder, flags)  # writes what this way reads
        start = time.perf_counter()
        batches = WAYS[name](folder, flags)
        next(batches)
        pipe.send(time.perf_counter() - start)
    except ImportError as error:
        pipe.send(f"not installed: {error.name}")
        return
    while count := pipe.recv():
        start = time.process_time()
        for _ in range(count):
            next(batches)
        pipe.send((time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    os._exit(0)  # some libraries' threads do not end


class Worker:
    """The process of a way."""

    def __init__(self, name: str, folder: Path, flags: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, name, folder, flags))
        self.process.start()
        theirs.close()
        try:
            self.first: float | str = self.pipe.recv()
        except EOFError:
            self.first = "its process died"
        self.rates: list[float] = []
        self.memory: list[float] = []

    def measure(self, batches: int, samples: int) -> None:
        """Add a round."""
        self.pipe.send(batches)
        seconds, memory = self.pipe.recv()
        self.rates.append(samples / seconds)
        self.memory.append(memory)


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("tokens", "frames"), default="tokens")
    for name, default in (("clips", 4000), ("batch", 8), ("frames", 4), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("runs/stream_bench"))
    flags = parser.parse_args()
    folder = flags.out / flags.kind
    if not (folder / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder, flags.kind, flags.clips)
    workers = {name: Worker(name, folder, flags) for name in WAYS}
    running = {name: worker for name, worker in workers.items() if not isinstance(worker.first, str)}
    for _ in range(flags.repeats):
        for name, worker in running.items():
            fast = name.startswith(("t2v_ds", "mem"))
            batches = flags.clips // flags.batch // (1 if fast else 8)
            worker.measure(batches, batches * flags.batch)
    limit = statistics.median(running["memcpy"].rates)
    usual = statistics.median(running["webdataset, shuffled"].rates)
    print("| way | clips/s of CPU | x webdataset | % of memcpy | first batch, ms | memory: first to last round, MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, worker in workers.items():
        if isinstance(worker.first, str):
            print(f"| {name} | {worker.first} | | | | |")
            continue
        rate = statistics.median(worker.rates)
        print(
            f"| {name} | {rate:,.0f} | {rate / usual:.1f} | {100 * rate / limit:.0f} | {1000 * worker.first:.0f} | "
            f"{worker.memory[0]:.0f} to {worker.memory[-1]:.0f} |"
        )
        worker.pipe.send(0)
    for worker in workers.values():
        worker.process.join(10)
        worker.process.kill()


if __name__ == "__main__":
    main()
