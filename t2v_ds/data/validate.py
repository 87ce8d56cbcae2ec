"""Folders of tars that nobody vouches for, and folders whose disk may have failed: what is good in them, and what is not.

    index_folder: *.tar -> scan_shard -> quarantine.jsonl (shard, key, reason) -> NAME.index.json -> manifest.json
    verify_folder: manifest -> every file of it is there, and every byte is as it was written; or a list of what is not

Everything is checked here, so that nothing has to be skipped while a model trains: the index holds good clips only, and a read
that fails later is an error. The manifest is written last, so a run that was killed is simply run again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2v_ds.config import IndexConfig
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import MANIFEST, SHARD_NAME, Manifest, ShardInfo, StoredText
from t2v_ds.data.scan import Bad, Known, ShardScan, scan_shard
from t2v_ds.data.shards import ARRAYS, count_truncated, index_path, load_shard_info, read_index, write_index
from t2v_ds.data.tar import Member, walk
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.files import write_atomically

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
_COUNTED = "quarantined_"  # before a reason, among the manifest's rejections


@dataclass(frozen=True)
class Codes:
    """What the manifest of token shards says of the tokenizer that made them."""

    tokenizer_id: str
    codebook_size: int
    grid_size: int
    image_size: int


@dataclass(frozen=True)
class Indexed:
    """The outcome of `index_folder`."""

    manifest: Manifest
    quarantined: Counter[str]  # reason -> clips


def index_folder(config: IndexConfig, codes: Codes | None = None, text: StoredText | None = None) -> Indexed:
    """Check every clip of a folder of tars, write an index of the good ones and a list of the bad ones.

    Args:
        config: of the run.
        codes: of token shards that have no manifest.
        text: of their text vectors, which every clip must have then; None: there are none, or they are not used.

    Raises:
        ConfigError: the folder has a manifest already, or is one of tokens and `codes` are not given, or of frames and `text` is.
        DataError: no tars, or more than is allowed is bad. The list of the bad clips is written then, too; nothing else is.
    """
    folder = Path(config.data)
    before = Manifest.load(folder) if (folder / MANIFEST).exists() else None
    if before is not None and not config.again:
        raise ConfigError(f"{folder} has a {MANIFEST}: check it with t2v verify, or drop what is damaged in it with again=true")
    paths = [folder / shard.name for shard in before.shards] if before else _tars(folder)
    kind = before.kind if before else _kind_of(paths)
    if before and kind == "tokens":
        codes, text = _as_before(before, text, folder)
    if kind == "raw" and text:
        raise ConfigError(f"setting 'text.encoder' is given, but {folder} holds frames; allowed: with codes")
    if kind == "tokens" and codes is None:
        raise ConfigError(f"--tokenizer is not given; {folder} holds codes: name the folder of the tokenizer that made them")
    old = _old_quarantine(folder / QUARANTINE) if before else {}
    known = [_known(folder, shard, {name for name, _ in old}) for shard in before.shards] if before else [None] * len(paths)
    limit = codes.codebook_size if codes else 0
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as executor:
        scans = list(executor.map(lambda path, crcs: scan_shard(path, kind, crcs, limit, text), paths, known))
    side = _common_side(scans, codes, before)
    bad = [one for scan in scans for one in scan.bad]
    bad = [_with_old_reason(one, old) for one in bad]
    lines = [json.dumps({"shard": one.shard, "key": one.key, "reason": one.reason, "detail": one.detail}) + "\n" for one in bad]
    write_atomically(folder / QUARANTINE, "".join(lines).encode())
    _judge(config, scans, bad)
    counts = Counter(one.reason for one in bad)
    chunks = {shard.name: shard.chunk for shard in before.shards} if before else {}
    shards = _write_indexes(scans, chunks, config.chunk_clips)
    about_text = text.describe(count_truncated(clip for scan in scans for clip in scan.clips)) if text else {}
    manifest = _manifest(kind, shards, side, codes, about_text, before, counts)
    manifest.save(folder)
    return Indexed(manifest, counts)


def _as_before(before: Manifest, text: StoredText | None, folder: Path) -> tuple[Codes, StoredText | None]:
    """What a folder of ours holds already, whatever is asked for; text vectors of another encoder cannot be."""
    if text and text.identity != before.text_identity:
        found = before.text_identity or "no encoder"
        raise ConfigError(f"{folder} holds text vectors of {found}, not of {text.identity}: leave text.encoder out")
    return Codes(before.tokenizer_id, before.codebook_size, before.grid_size, before.image_size), before.stored_text


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist: name a folder of .tar files")
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder} cannot be written, where the index belongs: make it writable, or link the tars into a new folder")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        packed = [path.name for path in folder.iterdir() if path.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz"))]
        raise DataError(f"{folder} holds no .tar files{f'; unpack {packed[0]} and the like first (gunzip)' if packed else ''}")
    for path in paths:
        if not SHARD_NAME.fullmatch(path.name):
            raise DataError(f"shard {path} has a name that is not allowed: rename it to letters, digits, '_', '-' and '.'")
    return paths


def _kind_of(paths: Sequence[Path]) -> str:
    """The kind of the first clip."""
    for path in paths:
        try:
            with path.open("rb") as file:
                for item in walk(file, path.stat().st_size):
                    for kind, array in ARRAYS.items():
                        if isinstance(item, Member) and item.name.endswith((f".{array}.npy", f".{array}.npy.zst")):
                            return kind
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error
    raise DataError(f"{paths[0].parent} holds no clips: expected tars with members KEY.frames.npy or KEY.codes.npy, and KEY.json")


def _known(folder: Path, shard: ShardInfo, in_quarantine: Set[str]) -> Known | None:
    """The checksums that the clips of a shard must have; None: it is as it was written, only its index is not."""
    path = folder / shard.name
    try:
        data = index_path(path).read_bytes()
    except OSError:
        data = b""
    is_index_good = hashlib.sha256(data).hexdigest() == shard.index_sha256
    # The sha256 of a shard with quarantined clips vouches for nothing: it was taken of the damaged bytes.
    if not is_index_good and shard.name not in in_quarantine and _sha256(path) == shard.sha256:
        return None
    try:
        return {clip["key"]: {name: crc for name, (_, _, crc) in clip["members"].items()} for clip in json.loads(data)["clips"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # nothing can be told of this shard: all of its clips are bad


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error


def _common_side(scans: Sequence[ShardScan], codes: Codes | None, before: Manifest | None) -> int:
    """Pixels or codes a side of a frame: as asked for, else as most clips have it; clips of another size become bad ones."""
    sides = Counter(side for scan in scans for side in scan.sides)
    common = codes.grid_size if codes else before.image_size if before else max(sides, key=lambda side: (sides[side], side), default=0)
    for scan in scans:
        for clip, side in zip(scan.clips, scan.sides, strict=True):
            if side != common:
                size = sum(one[1] for one in clip["members"].values())
                scan.bad.append(Bad(scan.path.name, clip["key"], "side", f"frames are {side} a side; the others are {common}", size))
        scan.clips = [clip for clip, side in zip(scan.clips, scan.sides, strict=True) if side == common]
    return common


def _old_quarantine(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The list that an earlier run wrote, by shard and key."""
    try:
        return {(one["shard"], one["key"]): one for one in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): restore it") from error


def _with_old_reason(bad: Bad, old: Mapping[tuple[str, str], dict[str, str]]) -> Bad:
    """A clip that an earlier run put on the list is in no index any more; the first reason is kept."""
    was = old.get((bad.shard, bad.key)) if bad.reason == "not_indexed" else None
    return dataclasses.replace(bad, reason=was["reason"], detail=was["detail"]) if was else bad


def _judge(config: IndexConfig, scans: Sequence[ShardScan], bad: Sequence[Bad]) -> None:
    """Raise if more is bad than is allowed."""
    good = sum(len(scan.clips) for scan in scans)
    cut = [one for one in bad if one.is_cut]
    if cut and not config.accept_cut:
        raise DataError(
            f"shard {Path(config.data, cut[0].shard)} ends early: {cut[0].detail}; how many clips are lost cannot be told: restore it, "
            "or set accept_cut=true, and max_bad_share, to go on with what is left "
            f"(shards like this: {len({one.shard for one in cut})}, see {QUARANTINE})"
        )
    share = max(len(bad) / max(1, good + len(bad)), sum(one.bytes for one in bad) / max(1, sum(scan.bytes for scan in scans)))
    if not good or share > config.max_bad_share:
        (reason, count), *_ = Counter(one.reason for one in bad).most_common(1) or [("no clips", 0)]
        first = next((one.detail for one in bad if one.reason == reason), "")
        raise DataError(
            f"{len(bad)} of {good + len(bad)} clips of {config.data} are bad; allowed: max_bad_share={config.max_bad_share:g} "
            f"of clips and bytes, found {share:.3g}; most often {reason} ({count}), such as: {first}; all are listed in {QUARANTINE}; "
            "to go on without them raise max_bad_share"
        )
    if bad:
        logger.warning("%d clips of %s are bad and left out; they are listed in %s", len(bad), config.data, QUARANTINE)


def _write_indexes(scans: Sequence[ShardScan], chunks: dict[str, int], chunk_clips: int) -> list[ShardInfo]:
    """Write the index of every shard that has a good clip."""
    shards, clips = [], 0
    for scan in scans:
        if not scan.clips:
            continue
        chunk = chunks.get(scan.path.name, clips // chunk_clips)
        clips += len(scan.clips)
        shards.append(write_index(scan.path, scan.bytes, scan.sha256, chunk, scan.clips))
    return shards


def _manifest(
    kind: str,
    shards: list[ShardInfo],
    side: int,
    codes: Codes | None,
    about_text: dict[str, Any],
    before: Manifest | None,
    counts: Counter[str],
) -> Manifest:
    fields: dict[str, Any] = {"image_size": codes.image_size if codes else side, "source": {"name": "tars"}, **about_text}
    if codes:
        fields |= {"tokenizer_id": codes.tokenizer_id, "codebook_size": codes.codebook_size, "grid_size": codes.grid_size}
    rejected = {}
    if before:
        fields |= {"source": before.source, "settings": before.settings}
        rejected = {reason: count for reason, count in before.rejected.items() if not reason.startswith(_COUNTED)}
    rejected |= {_COUNTED + reason: counts[reason] for reason in sorted(counts)}
    return Manifest.build(kind, shards, rejected=rejected, **fields)


def verify_folder(folder: str | Path) -> tuple[Manifest, list[str]]:
    """Read every byte of a folder that has a manifest.

    Returns:
        Its manifest, and a sentence for everything that is not as it was written; damaged clips are named.

    Raises:
        DataError: there is no manifest that can be read.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    problems = []
    for shard in manifest.shards:
        problems += _verify_shard(folder / shard.name, shard, manifest)
    if not problems:
        problems = _verify_manifest(folder, manifest)
    return manifest, problems


def _verify_shard(path: Path, shard: ShardInfo, manifest: Manifest) -> list[str]:
    problems = []
    try:
        data = index_path(path).read_bytes()
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            problems.append(f"index {index_path(path)} is not the one that {MANIFEST} names (its checksum differs)")
    except OSError as error:
        problems.append(f"index {index_path(path)} cannot be read: {error.strerror}")
    try:
        if _sha256(path) == shard.sha256:
            return problems
        scan = scan_shard(path, manifest.kind, _known(path.parent, shard, set()), text=manifest.stored_text)
    except DataError as error:
        return [*problems, str(error)]
    clips = "; ".join(one.detail for one in scan.bad[:5]) + (f"; and {len(scan.bad) - 5} more" if len(scan.bad) > 5 else "")
    lost = shard.clips - len(scan.clips)
    what = f"{lost} of {shard.clips} clips are damaged or gone: {clips}" if lost or clips else "no clip of it is damaged"
    return [*problems, f"shard {path} is not as it was written (its sha256 differs); {what}"]


def _verify_manifest(folder: Path, manifest: Manifest) -> list[str]:
    """Whether the manifest fits its shards, which are as they were written."""
    shards = [load_shard_info(folder / shard.name) for shard in manifest.shards]
    summed = Manifest.build(manifest.kind, shards)
    for name in ("shards", "chunks", "total_clips", "total_frames", "frames_histogram"):
        if getattr(summed, name) != getattr(manifest, name):
            return [f"{folder / MANIFEST} is damaged: {name!r} is not what its shards hold"]
    if manifest.text_truncated != sum(count_truncated(read_index(folder / one.name, manifest.kind)[0]["clips"]) for one in shards):
        return [f"{folder / MANIFEST} is damaged: 'text_truncated' is not what its shards hold"]
    try:
        with ShardDataset(folder, manifest.kind) as dataset:
            found = dataset.read(0)[ARRAYS[manifest.kind]].shape[1:] if len(dataset) else dataset.frame_shape
            if tuple(found) != tuple(dataset.frame_shape):
                return [f"{folder / MANIFEST} is damaged: it names frames of {list(dataset.frame_shape)}, the shards hold {list(found)}"]
    except DataError as error:
        return [str(error)]
    return []
