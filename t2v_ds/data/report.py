"""What is in a folder of raw shards, for people: report.md and contact_sheet.png.

    manifest.json, indexes, rejected.jsonl -> counts, rejections, lengths, captions, bytes -> Markdown
    a few clips, evenly spaced             -> contact sheet

Only the clips of the contact sheet are read: the rest is known from the indexes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.pack import REJECTED
from t2v_ds.data.video import contact_sheet, write_png
from t2v_ds.files import write_atomically

REPORT = "report.md"
SHEET = "contact_sheet.png"
ROT = ("dead_link", "download_failed")  # reasons that say that the source is no longer there
_SHEET_CLIPS = 12
_BAR = 40  # characters of the longest bar
_COMMON = 15  # details and words listed


def write_report(folder: str | Path) -> str:
    """Write `report.md` and `contact_sheet.png` into a folder of raw shards; returns the text.

    Raises:
        DataError: it is no finished folder of raw shards, or a shard of it is damaged.
    """
    folder = Path(folder)
    with ShardDataset(folder, "raw") as dataset:
        manifest = dataset.manifest
        captions = [dataset.caption(i) for i in range(len(dataset))]
        parts = [
            f"# {folder.absolute().name}\n",
            _counts(dataset),
            _rejected(len(dataset), manifest.rejected, _read_rejected(folder)),
            _lengths({int(length): count for length, count in manifest.frames_histogram.items()}),
            _captions(captions),
            f"## Clips\n\n![{_SHEET_CLIPS} clips, evenly spaced]({SHEET})\n",
        ]
        _write_sheet(dataset, folder / SHEET)
    text = "\n".join(parts)
    write_atomically(folder / REPORT, text.encode())
    return text


def _counts(dataset: ShardDataset) -> str:
    manifest = dataset.manifest
    stored = sum(shard.bytes for shard in manifest.shards)
    rows = manifest.total_clips + sum(manifest.rejected.values())
    table = [
        ("source", str(manifest.source.get("name", "unknown"))),
        ("rows read", f"{rows:,}"),
        ("clips kept", f"{manifest.total_clips:,} ({_share(manifest.total_clips, rows)})"),
        ("frames in total", f"{manifest.total_frames:,}"),
        ("frames a clip", f"{manifest.total_frames / manifest.total_clips:.1f} in the mean"),
        ("size of a frame", f"{manifest.image_size} x {manifest.image_size} pixels"),
        ("shards", f"{len(manifest.shards):,} in {len(manifest.chunks)} chunk{'s' * (len(manifest.chunks) != 1)}"),
        ("bytes", f"{stored:,} ({stored / 2**30:.2f} GiB)"),
        ("digest", manifest.digest()[:16]),
    ]
    return _table(("", ""), table)


def _read_rejected(folder: Path) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in (folder / REJECTED).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def _rejected(kept: int, counts: dict[str, int], listed: Sequence[dict[str, str]]) -> str:
    rows = kept + sum(counts.values())
    lines = ["## Rejected\n"]
    if not counts:
        return "\n".join([*lines, "None.\n"])
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines.append(_table(("reason", "rows", "share of all rows"), [(reason, f"{n:,}", _share(n, rows)) for reason, n in ordered]))
    rot = sum(counts.get(reason, 0) for reason in ROT)
    if rot:
        lines.append(f"Rot (links that are dead or failed): {rot:,} of {rows:,} rows, {_share(rot, rows)}.\n")
        details = Counter(one["detail"] for one in listed if one["reason"] in ROT)
        lines.append(_table(("answer", "rows"), [(_cell(detail), f"{n:,}") for detail, n in _most_common(details)]))
    return "\n".join(lines)


def _lengths(histogram: dict[int, int]) -> str:
    longest = max(histogram.values())
    bars = [(str(length), f"{n:,}", "#" * -(-_BAR * n // longest)) for length, n in sorted(histogram.items())]
    return "## Frames a clip\n\n" + _table(("frames", "clips", ""), bars)


def _captions(captions: Sequence[str]) -> str:
    counts = np.array([len(caption.split()) for caption in captions])  # [N]
    words = Counter(word for caption in captions for word in caption.lower().split())
    longest = max(captions, key=lambda caption: len(caption.split()))
    median, p95 = np.percentile(counts, [50, 95])
    table = [
        ("distinct captions", f"{len(set(captions)):,} of {len(captions):,}"),
        ("words a caption", f"mean {counts.mean():.1f}, median {median:.0f}, 95% at most {p95:.0f}, {counts.min()} to {counts.max()}"),
        ("distinct words", f"{len(words):,} (lower case), {sum(n == 1 for n in words.values()):,} of them once"),
        ("most frequent", _cell(", ".join(f"{word} {n:,}" for word, n in _most_common(words)))),
        ("longest", _cell(longest)),
    ]
    return "## Captions\n\n" + _table(("", ""), table)


def _write_sheet(dataset: ShardDataset, path: Path) -> None:
    numbers = np.linspace(0, len(dataset) - 1, min(_SHEET_CLIPS, len(dataset))).round().astype(int)
    clips = [dataset.read(int(i)) for i in numbers]
    captions = [f"{clip['caption']} ({len(clip['frames'])} frames)" for clip in clips]
    write_png(path, contact_sheet([clip["frames"] for clip in clips], captions))


def _most_common(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent; ties in alphabetical order, so that a report does not depend on chance."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_COMMON]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


def _cell(text: str) -> str:
    """Text that ends neither its cell nor its row, and is not too long for one."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 200 else f"{text[:197]}..."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"
