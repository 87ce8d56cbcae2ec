"""`t2v prepare` on a table of URLs whose server drops, delays, truncates and lies, killed again and again: is every row accounted for?

    python tests/bench/hostile_download.py --rows 100000 --kills 6        (about 1.5 GB of disk)

    plan(row): what the server does, and so what must become of the row  -> table of URLs, local server
    t2v prepare -> kill -9 of the whole process group at random moments -> the same command again ... -> finished
    shards + rejected.jsonl against the plan, row by row                 -> a table

What the server does depends on the row and on how often its URL was asked for, never on chance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2v_ds.data.dataset import ShardDataset
from tests.helpers import ROOT, environment

SIZE, FRAMES, MAX_BYTES = 16, 15, 100_000
KEPT = "kept"
PLANS: dict[str, tuple[float, str]] = {  # what the server does: (share of the rows in %, what becomes of the row)
    "delay": (5, KEPT),
    "error once": (4, KEPT),
    "busy once": (1, KEPT),  # 503 with Retry-After: 0
    "drop once": (3, KEPT),
    "cut once": (2, KEPT),  # and no Content-Length: only the GIF tells
    "redirect": (3, KEPT),
    "missing": (8, "dead_link"),
    "gone": (3, "dead_link"),
    "error": (0.5, "download_failed"),
    "drop": (0.5, "download_failed"),
    "truncate": (0.5, "download_failed"),  # Content-Length is larger than what comes
    "cut": (0.5, "download_failed"),
    "loop": (0.5, "download_failed"),  # redirects to itself
    "escape": (0.5, "download_failed"),  # redirects to a file of this machine
    "drip": (0.1, "download_failed"),
    "silent": (0.1, "download_failed"),
    "huge": (0.5, "too_large"),
    "endless": (0.5, "too_large"),
    "page": (2, "not_a_gif"),  # HTML, called image/gif
    "picture": (1, "not_a_gif"),  # a PNG
    "damaged": (0.5, "truncated"),  # half a GIF, sent whole
    "short": (2, "too_short"),
    "long": (1, "too_long"),
    "still": (1, "still"),
    "flat": (0.5, "flat"),
    "no caption": (0.5, "empty_caption"),
    "twice": (1, "duplicate"),  # URL and caption of an earlier row
    "copy": (1, "duplicate"),  # another URL with the same GIF, and the same caption
    "near": (1, "near_duplicate"),  # another URL with nearly the same colours, and another caption
    "other caption": (2, KEPT),  # URL of an earlier row
}
_REFERS = ("twice", "copy", "near", "other caption")  # to an earlier row that is kept
_LAST = "ok"  # all other rows


@dataclass(frozen=True)
class Row:
    """One row of the table: what the server does, the row whose GIF it is, what must become of it."""

    plan: str
    of: int
    expected: str


def plan(rows: int, seed: int) -> list[Row]:
    """What is to happen to each row."""
    rng = random.Random(seed)
    names, shares = list(PLANS), [share for share, _ in PLANS.values()]
    kinds = rng.choices([*names, _LAST], [*shares, 100 - sum(shares)], k=rows)
    if rows > 10 * len(names):
        kinds[rows // 2 : rows // 2 + len(names)] = names  # each at least once
    made: list[Row] = []
    good: list[int] = []  # rows whose own GIF is kept
    for i, kind in enumerate(kinds):
        if kind in _REFERS and not good:
            kind = _LAST
        # Near ones too, for whom the row that they refer to may be many blocks away or in the same one.
        of = (rng.choice(good) if rng.random() < 0.5 else good[-1]) if kind in _REFERS else i
        made.append(Row(kind, of, KEPT if kind == _LAST else PLANS[kind][1]))
        if kind not in _REFERS and made[-1].expected == KEPT:
            good.append(i)
    return made


def gif(row: int, kind: str, seed: int) -> bytes:
    """An animated GIF of its own for each row: noise in 128 shades of one colour.

    Pixels are codes of the LZW stream as they are: it is cleared so often that no code ever stands for two pixels.
    """
    rng = np.random.default_rng([seed, row])
    base = rng.integers(50, 200, 3)
    palette = np.clip(base + rng.integers(-40, 40, (128, 3)), 0, 250) + (2 if kind == "near" else 0)
    frames = {"short": 5, "long": 45}.get(kind, FRAMES)
    pixels = rng.integers(0, 128, (frames, SIZE * SIZE), dtype=np.uint8)
    if kind == "still":
        pixels[:] = pixels[0]
    if kind == "flat":
        pixels[:] = np.arange(frames, dtype=np.uint8)[:, None]
    parts = [b"GIF89a", struct.pack("<HHBBB", SIZE, SIZE, 0xF6, 0, 0), palette.astype(np.uint8).tobytes()]
    for frame in pixels.reshape(frames, -1, 64).tolist():
        codes = b"".join(b"\x80" + bytes(piece) for piece in frame) + b"\x81"
        blocks = b"".join(bytes([len(codes[at : at + 255])]) + codes[at : at + 255] for at in range(0, len(codes), 255))
        parts.append(b"\x21\xf9\x04\x04\x05\x00\x00\x00," + struct.pack("<HHHHB", 0, 0, SIZE, SIZE, 0) + b"\x07" + blocks + b"\x00")
    return b"".join([*parts, b";"])


class _Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        try:
            line = self.rfile.readline().split()
            while self.rfile.readline().strip():
                pass
            row = int(line[1].rpartition(b"/")[2]) if len(line) > 1 else -1
            if row >= 0:
                self._answer(row, self.server.plans[row].plan if line[1].startswith(b"/clips/") else _LAST)
        except OSError:
            pass  # the other side hung up or was killed

    def _answer(self, row: int, kind: str) -> None:
        first = self.server.count(row) == 1
        if kind.endswith(" once"):
            kind = kind.removesuffix(" once") if first else _LAST
        of = self.server.plans[row].of
        data = gif(of, kind if kind in ("short", "long", "still", "flat", "near") else "", self.server.seed)
        if kind == "silent":
            self.rfile.read(1)  # until the other side has had enough
        elif kind == "drip":
            self._send(200, b"")
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                time.sleep(0.2)
        elif kind == "endless":
            self._send(200, data)
            while True:
                self.wfile.write(data)
        elif kind in ("drop", "truncate"):
            self._send(200, data[: len(data) // 2], len(data) if kind == "drop" else len(data) + 1000)
        elif kind == "cut":
            self._send(200, data[: len(data) // 2])
        elif kind in ("missing", "gone", "error", "busy"):
            status = {"missing": 404, "gone": 410, "error": 500, "busy": 503}[kind]
            self._send(status, b"<p>no", 5, "Retry-After: 0\r\n" if kind == "busy" else "")
        elif kind in ("redirect", "loop", "escape"):
            target = {"redirect": f"/moved/{row}", "loop": f"/clips/{row}", "escape": "file:///etc/hostname"}[kind]
            self._send(302, b"", 0, f"Location: {target}\r\n")
        elif kind == "huge":
            self._send(200, data, 10**9)
        else:
            time.sleep(0.05 + row % 7 * 0.05 if kind == "delay" else 0)
            lies = {"page": b"<!DOCTYPE html><p>no", "picture": b"\x89PNG\r\n\x1a\n" + data, "damaged": data[: len(data) // 2]}
            data = lies.get(kind, data)
            self._send(200, data, len(data))

    def _send(self, status: int, body: bytes, length: int | None = None, headers: str = "") -> None:
        size = "" if length is None else f"Content-Length: {length}\r\n"
        self.wfile.write(f"HTTP/1.0 {status} -\r\nContent-Type: image/gif\r\n{size}{headers}\r\n".encode() + body)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Does what the plans say; counts how often it was asked."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 1024, True

    def __init__(self, plans: list[Row], seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plans, self.seed = plans, seed
        self.asked: Counter[int] = Counter()
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def count(self, row: int) -> int:
        with self._lock:
            self.asked[row] += 1
            return self.asked[row]

    def handle_error(self, *_: object) -> None:
        raise  # a fault of this script must be seen

    def write_table(self, path: Path) -> None:
        """The table of URLs and captions."""
        lines = []
        for i, row in enumerate(self.plans):
            is_same_url = row.plan in ("twice", "other caption")
            caption = "" if row.plan == "no caption" else f"clip number {row.of if row.plan in ('twice', 'copy') else i}"
            lines.append(f"http://127.0.0.1:{self.server_address[1]}/clips/{row.of if is_same_url else i}\t{caption}\n")
        path.write_text("".join(lines))


@dataclass
class Result:
    """What came out: for each row "kept" or a reason, and what it took."""

    outcomes: list[str]
    seconds: float
    kills: int
    requests: int
    again: int  # good URLs that were asked for more than once: they were on their way when a kill came


def run(folder: Path, plans: list[Row], seed: int, kills: int, parts: int, settings: list[str], pause: tuple[float, float]) -> Result:
    """Prepare the table of `plans` in `folder`, killing all its processes `kills` times, each after a random pause in seconds."""
    server = Server(plans, seed)
    rng = random.Random(seed)
    server.write_table(folder / "table.tsv")
    out = folder / "raw"
    fixed = ["prepare", "--source", str(folder / "table.tsv"), "--out", str(out), f"image_size={SIZE}", "download.allow_private=true"]
    fixed += [f"download.max_bytes={MAX_BYTES}", "filters.near_duplicate_below=6", *settings]
    start, killed = time.monotonic(), 0
    stages = [[f"part={number + 1}/{parts}" for number in range(parts)]] if parts > 1 else []
    for stage in [*stages, [""]]:
        todo = list(stage)
        while todo:
            running = {part: _start([*fixed, *([part] if part else [])], folder / "log.txt") for part in todo}
            if killed < kills and _progresses(out, running):
                time.sleep(rng.uniform(*pause))
                for process in running.values():
                    killed += process.poll() is None
                    os.killpg(process.pid, signal.SIGKILL)
            codes = {part: process.wait() for part, process in running.items()}
            if any(code not in (0, -signal.SIGKILL) for code in codes.values()):
                raise RuntimeError(f"prepare ended with {codes}:\n{(folder / 'log.txt').read_text()[-2000:]}")
            todo = [part for part, code in codes.items() if code]
    seconds = time.monotonic() - start
    server.shutdown()
    server.server_close()
    again = sum(row.plan == _LAST and server.asked[i] > 1 for i, row in enumerate(plans))
    return Result(read_outcomes(out, len(plans)), seconds, killed, server.asked.total(), again)


def _start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        command = [sys.executable, "-m", "t2v_ds", *arguments]
        return subprocess.Popen(command, env=environment(no_proxy="*"), cwd=ROOT, stdout=file, stderr=file, start_new_session=True)


def _progresses(out: Path, running: dict[str, subprocess.Popen[bytes]]) -> bool:
    """Wait until a block more is finished: a kill while modules are being imported proves nothing."""

    def finished() -> int:
        work = out / ".work"
        return len(os.listdir(work)) if work.is_dir() else 0

    before = finished()
    while all(process.poll() is None for process in running.values()):
        if finished() > before:
            return True
        time.sleep(0.02)
    return False


def read_outcomes(out: Path, rows: int) -> list[str]:
    """Row -> "kept" or the reason of its rejection; RuntimeError if a row is in both or in neither, or in one twice."""
    found: dict[int, list[str]] = {i: [] for i in range(rows)}
    with ShardDataset(out, "raw") as dataset:
        dataset.verify()
        for i in range(len(dataset)):
            found[int(dataset.key(i))].append(KEPT)
        counts = dict(dataset.manifest.rejected)
    listed = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    for one in listed:
        found[int(one["key"])].append(one["reason"])
    odd = {row: what for row, what in found.items() if len(what) != 1}
    if odd or Counter(one["reason"] for one in listed) != counts:
        raise RuntimeError(f"not accounted for once: {dict(list(odd.items())[:10])}; manifest {counts}")
    return [found[i][0] for i in range(rows)]


def mistakes(plans: list[Row], outcomes: list[str]) -> list[str]:
    """The rows of which something else became than the plan says."""
    pairs = enumerate(zip(plans, outcomes, strict=True))
    return [f"row {i} ({row.plan}): {outcome}, expected {row.expected}" for i, (row, outcome) in pairs if outcome != row.expected]


def table(plans: list[Row], outcomes: list[str]) -> str:
    """What the server did and what became of it, in Markdown."""
    rows = Counter((row.plan, row.expected) for row in plans)
    right = Counter(row.plan for row, outcome in zip(plans, outcomes, strict=True) if outcome == row.expected)
    lines = ["| the server | must be | rows | are |", "|---|---|---|---|"]
    lines += [f"| {kind} | {expected} | {count:,} | {right[kind]:,} |" for (kind, expected), count in sorted(rows.items())]
    return "\n".join([*lines, f"| all | | {len(plans):,} | {right.total():,} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--parts", type=int, default=1, help="processes with a part each, as in a SLURM array")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=40.0, help="longest time to a kill, in seconds")
    parser.add_argument("settings", nargs="*", help="of t2v prepare")
    flags = parser.parse_args()
    plans = plan(flags.rows, flags.seed)
    settings = ["download.timeout_s=4", "download.total_s=12", "download.retries=2", "download.threads=64", *flags.settings]
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), plans, flags.seed, flags.kills, flags.parts, settings, (1.0, flags.pause))
    wrong = mistakes(plans, result.outcomes)
    print(table(plans, result.outcomes))
    rate = flags.rows / result.seconds
    print(f"\n{flags.rows:,} rows, {flags.parts} part(s), {result.kills} kills: {result.seconds:.0f} s, {rate:.0f} rows/s")
    print(f"{result.requests:,} requests, {result.again} good URLs asked for again; rows that ended otherwise than planned: {len(wrong)}")
    print("\n".join(wrong[:20]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
