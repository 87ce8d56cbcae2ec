"""A program that kills readers: ranks read a data set through `ClipStream`, die at random moments, and go on as other ranks.

    round: read the checkpoint -> cut the logs to it -> fork a process a rank -> SIGKILL all of them at a random moment
    rank:  next(stream) -> ids from what was read -> log | barrier | every few steps rank 0 saves (step, position, sizes of the logs)

The processes are forked from this one, which has imported what they need and started no thread: a round takes hundredths of a second.
What the ranks log names the step by their own count, not by the stream's, as a model learns from what it is handed.

usage: stream_drill.py DATA WORK SETTINGS; prints what happened as JSON
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import random
import signal
import struct
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.order import Order
from t2v_ds.data.stream import ClipStream, random_frames, whole_codes
from t2v_ds.files import write_atomically

BATCH, SEED, FRAMES = 12, 11, 2
RECORD = struct.Struct("<4q")  # step, place in the step, id, what else says whether the sample is the same
Sample = tuple[int, int]


class CountsWhatIsRead(ClipStream):
    """A fault to be found: samples count as consumed when they are read, not when they are handed over."""

    def state_dict(self) -> dict[str, Any]:
        ahead = len(self._waiting) * self.micro_batch // self._share * self.batch
        return {**super().state_dict(), "consumed": self._consumed + ahead}


class RestartsTheEpoch(ClipStream):
    """Another: a restart in the middle of an epoch begins the epoch anew."""

    def load_state_dict(self, state: dict[str, Any], accept_new_data: bool = False) -> None:
        clips = len(self.dataset)
        super().load_state_dict({**state, "consumed": state["consumed"] // clips * clips})


STREAMS = {"": ClipStream, "counts what is read": CountsWhatIsRead, "restarts the epoch": RestartsTheEpoch}


def order_of(data: ShardDataset, settings: dict[str, Any]) -> Order:
    return Order(
        len(data), SEED, window=settings.get("window", 0), shards=data.shard_ranges, buckets=settings.get("buckets", 0),
        lengths=data.lengths, batch=BATCH,
    )  # fmt: skip


def samples(batch: dict[str, Any], kind: str) -> list[Sample]:
    """What was read, from the numbers alone: (id, what else says whether it is the same) of each sample."""
    if kind == "raw":
        frames = batch["frames"].reshape(-1, FRAMES, *batch["frames"].shape[1:])
        found = []
        for clip in frames:
            ids = {int(frame[0, 0, 0]) + 256 * int(frame[0, 0, 1]) for frame in clip}
            assert len(ids) == 1, f"frames of clips {ids} in one sample"
            found.append((ids.pop(), int(clip[0, 0, 0, 2]) * 256 + int(clip[1, 0, 0, 2])))  # which frames were drawn
        return found
    ends = np.cumsum(batch["lengths"])
    clips = [batch["codes"][end - length : end] for end, length in zip(ends, batch["lengths"], strict=True)]
    for clip in clips:
        assert (clip == clip[:1]).all(), "codes of two clips in one sample"
    return [(int(clip[0, 0, 0]), len(clip)) for clip in clips]


def run_rank(data: Path, work: Path, settings: dict[str, Any], rank: int, world: int, barrier: Barrier, progress: mmap.mmap) -> None:
    """One rank, until the last step or SIGKILL."""
    chance = random.Random(settings["seed"])  # the same on all ranks
    threads, kind = settings["threads"], settings["kind"]
    share = BATCH // world
    micro = chance.choice([size for size in range(1, share + 1) if share % size == 0])
    checkpoint = work / "checkpoint.json"
    with ShardDataset(data, kind) as dataset:
        load = random_frames(FRAMES) if kind == "raw" else whole_codes
        order = order_of(dataset, settings)
        with STREAMS[settings.get("fault", "")](dataset, BATCH, rank, world, SEED, threads, load, micro, order) as stream:
            step = 0
            if checkpoint.exists():
                state = json.loads(checkpoint.read_text())
                stream.load_state_dict(state["stream"])
                step = state["step"]
            log = os.open(work / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            while step < settings["steps"]:
                if settings["killed"] and step == settings["steps"] - 1:  # the kill is late: a run that is done could not be killed
                    progress[:8] = struct.pack("<q", step)
                    time.sleep(120)
                for part in range(stream.micro_steps):
                    first = rank * share + part * micro
                    records = [RECORD.pack(step, first + i, *one) for i, one in enumerate(samples(next(stream), kind))]
                    os.write(log, b"".join(records))
                step += 1
                if chance.random() < 0.3 or step == settings["steps"]:
                    barrier.wait()
                    if rank == 0:
                        sizes = {path.name: path.stat().st_size for path in work.glob("*.log")}
                        state = {"step": step, "stream": stream.state_dict(), "sizes": sizes}
                        write_atomically(checkpoint, json.dumps(state).encode())
                    barrier.wait()
                if rank == 0:
                    progress[:8] = struct.pack("<q", step)


def read_logs(work: Path) -> list[tuple[int, int, Sample]]:
    """Everything in the logs: (step, place in it, sample)."""
    found = []
    for path in work.glob("*.log"):
        content = path.read_bytes()
        for step, place, number, other in RECORD.iter_unpack(content[: len(content) // RECORD.size * RECORD.size]):
            found.append((step, place, (number, other)))
    return found


def read_checkpoint(work: Path) -> dict[str, Any]:
    path = work / "checkpoint.json"
    return json.loads(path.read_text()) if path.exists() else {"step": 0, "sizes": {}}  # type: ignore[no-any-return]


def run_round(data: Path, work: Path, settings: dict[str, Any], world: int, kill: tuple[int, float] | None) -> str:
    """Start the ranks, and kill them `kill[1]` seconds after step `kill[0]` or their start (-1); returns "killed" or "finished"."""
    context = multiprocessing.get_context("fork")
    progress, barrier = mmap.mmap(-1, 8), context.Barrier(world)
    progress[:8] = struct.pack("<q", -1)
    ranks = [
        context.Process(target=run_rank, args=(data, work, settings, rank, world, barrier, progress), daemon=True) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    if kill is not None:
        until = time.monotonic() + 60
        while struct.unpack("<q", progress[:8])[0] < kill[0]:
            if time.monotonic() > until or any(process.exitcode for process in ranks):
                raise RuntimeError(f"the ranks do not get to step {kill[0]}: {[process.exitcode for process in ranks]}")
            time.sleep(0.0002)
        time.sleep(kill[1])
        chance = random.Random(settings["seed"])
        for process in chance.sample(ranks, world):
            os.kill(process.pid or 0, signal.SIGKILL)  # not waited for yet, so the number is still its own
            time.sleep(chance.uniform(0, 0.001))
    for process in ranks:
        process.join(60)
    codes = {process.exitcode for process in ranks}
    if codes == {-signal.SIGKILL}:
        return "killed"
    if codes != {0}:
        raise RuntimeError(f"ranks ended with {codes}")
    return "finished"


def drill(data: Path, work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Kill `settings["kills"]` times on the way through the epochs, then run to the end."""
    chance = random.Random(settings["seed"])
    with ShardDataset(data, settings["kind"]) as dataset:
        size, order = len(dataset), order_of(dataset, settings)
    settings["steps"] = steps = -(-settings["epochs"] * size // BATCH)
    points = sorted(chance.randrange(-1, steps - 10) for _ in range(settings["kills"]))
    everything: list[tuple[int, int, Sample]] = []
    worlds: list[int] = []
    kills = lost = 0
    for point in [*points, None]:
        for path in work.glob("*.log"):  # forget what no checkpoint covers
            os.truncate(path, read_checkpoint(work)["sizes"].get(path.name, 0))
        world, threads = chance.choice([1, 2, 4]), chance.randrange(4)
        worlds.append(world)
        kill: tuple[int, float] | None = None
        if point is not None:  # one in four while it starts, reads the checkpoint, or soon after
            kill = (-1, chance.uniform(0, 0.05)) if chance.random() < 0.25 else (point, chance.uniform(0, 0.003))
        settings["killed"] = kill is not None
        ended = run_round(data, work, {**settings, "threads": threads, "seed": chance.randrange(2**32)}, world, kill)
        kills += ended == "killed"
        found = read_logs(work)
        saved = read_checkpoint(work)["step"]
        lost += sum(step >= saved for step, *_ in found)
        everything += found
    ordered = [sample for _, _, sample in sorted(read_logs(work))]
    epochs = [[number for number, _ in ordered[epoch * size : (epoch + 1) * size]] for epoch in range(settings["epochs"])]
    expected = order.places(range(len(ordered)))[1].tolist()
    once = {(step, place): sample for step, place, sample in read_logs(work)}
    return {
        "kills": kills,
        "worlds": sorted(set(worlds)),
        "repeats": sum(len(epoch) - len(set(epoch)) for epoch in epochs),
        "misses": sum(size - len(set(epoch)) for epoch in epochs),
        "in order": [number for number, _ in ordered] == expected,
        "read": len(everything),
        "lost": lost,  # read, but no checkpoint came to cover it: read again
        "read again alike": all(once[step, place] == sample for step, place, sample in everything),
        "samples": ordered,
    }


def main() -> None:
    data, work, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    sys.stdout.write(json.dumps(drill(data, work, settings)))


if __name__ == "__main__":
    main()
