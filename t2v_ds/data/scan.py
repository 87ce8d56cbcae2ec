"""What is in a shard that nobody vouches for: its good clips, as an index lists them, and its bad ones, each with a reason.

NAME.tar -> tar.walk -> members that stand together -> checks of names, checksums, array, text -> ShardScan (clips, bad)
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.data.compression import decompress
from t2v_ds.data.manifest import StoredText
from t2v_ds.data.shards import ARRAYS, DTYPES, HEAD, TEXT, TEXT_DTYPE, frame_crcs, npy_head
from t2v_ds.data.tar import Damage, Member, walk
from t2v_ds.errors import DataError

_LARGEST_CLIP = 2**32  # bytes, decompressed
Known = dict[str, dict[str, int]]  # key -> name of a member -> CRC-32


@dataclass(frozen=True)
class Bad:
    """A clip, or bytes of no known clip, that cannot be used."""

    shard: str
    key: str  # empty: not known
    reason: str  # a word to count by
    detail: str
    bytes: int = 0
    is_cut: bool = False  # more clips may be lost than can be told


@dataclass
class ShardScan:
    """What is in a shard."""

    path: Path
    bytes: int = 0
    sha256: str = ""
    clips: list[dict[str, Any]] = field(default_factory=list)  # as in an index
    sides: list[int] = field(default_factory=list)  # of the frames of each
    bad: list[Bad] = field(default_factory=list)


class _BadClip(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass
class _Clip:
    """The members of a key that stand together in a tar."""

    key: str
    members: dict[str, tuple[int, bytes]] = field(default_factory=dict)  # name -> offset and payload
    bytes: int = 0
    problem: tuple[str, str] | None = None  # reason, detail
    is_cut: bool = False


def scan_shard(
    path: Path, kind: str, known: Known | None = None, codebook_size: int = 2**16, text: StoredText | None = None
) -> ShardScan:
    """Read a shard from its start to its end, whatever it holds.

    Args:
        path: of a tar.
        kind: "raw" or "tokens".
        known: checksums to compare with; a clip that has none is bad. None: none are known.
        codebook_size: codes must be below it.
        text: of the text vectors that each clip must have; None: what there is of them is left alone.

    Raises:
        DataError: the file cannot be read.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(0, os.SEEK_END)
            asked = _Asked(kind, known, codebook_size, text)
            found = [_judged(path.name, item, asked, seen) for item in _clips(walk(file, size))]
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error
    scan = ShardScan(path, size, sha256)
    for one in _merged(found):
        if isinstance(one, Bad):
            scan.bad.append(one)
        else:
            scan.clips.append(one[0])
            scan.sides.append(one[1])
    return scan


Good = tuple[dict[str, Any], int]  # the entry of a clip in the index, and the side of its frames


@dataclass(frozen=True)
class _Asked:
    """What a clip must be; see `scan_shard`."""

    kind: str
    known: Known | None
    codebook_size: int
    text: StoredText | None


def _judged(shard: str, item: _Clip | Damage, asked: _Asked, seen: set[str]) -> Good | Bad:
    if isinstance(item, Damage):
        return Bad(shard, "", item.reason, item.detail, item.size, item.is_cut)
    try:
        return _check(item, asked, seen)
    except _BadClip as bad:
        return Bad(shard, item.key, bad.reason, bad.detail, item.bytes, item.is_cut)


def _merged(found: list[Good | Bad]) -> list[Good | Bad]:
    """A clip that lacks a member beside damage of an unknown member is one bad clip and not two."""
    merged: list[Good | Bad] = []
    for one in found:
        last = merged[-1] if merged else None
        if isinstance(last, Bad) and isinstance(one, Bad):
            clip, damage = (last, one) if last.key else (one, last)
            if clip.reason == "member_missing" and not damage.key:
                merged[-1] = dataclasses.replace(damage, key=clip.key, bytes=clip.bytes + damage.bytes)
                continue
        merged.append(one)
    return merged


def _clips(items: Iterable[Member | Damage]) -> Iterator[_Clip | Damage]:
    """Group members that stand together and have the same key."""
    clip: _Clip | None = None
    for item in items:
        if isinstance(item, Member) and item.name.endswith("/"):
            continue  # a folder; its files are told by their names
        key, member, problem = _split(item.name)
        if clip is not None and (clip.key != key or not item.name):
            yield clip
            clip = None
        if isinstance(item, Damage) and not item.name:
            yield item
            continue
        clip = clip or _Clip(key)
        if isinstance(item, Damage):
            clip.bytes += item.size
            clip.problem, clip.is_cut = clip.problem or (item.reason, item.detail), item.is_cut
            continue
        clip.bytes += len(item.payload)
        if member in clip.members:
            problem = ("duplicate_member", f"member {item.name} is there twice")
        clip.problem = clip.problem or problem
        clip.members[member] = (item.offset, item.payload)
    if clip is not None:
        yield clip


def _split(name: str) -> tuple[str, str, tuple[str, str] | None]:
    """Key, rest of the name, and what is wrong with it."""
    short = name.removeprefix("./")
    key, dot, member = short.partition(".")
    if key and dot and not set("/\\\0") & set(short):
        return key, member, None
    allowed = "KEY.frames.npy[.zst], KEY.codes.npy, KEY.text.npy or KEY.json with a KEY that holds no slash"
    return short, "", ("member_name", f"member {name!r} is not {allowed}")


def _check(clip: _Clip, asked: _Asked, seen: set[str]) -> Good:
    if clip.problem is not None:
        raise _BadClip(*clip.problem)
    if clip.key in seen:
        raise _BadClip("duplicate_key", f"clip {clip.key} is there twice")
    kind, array_name = asked.kind, f"{ARRAYS[asked.kind]}.npy"
    if kind == "raw" and array_name not in clip.members and f"{array_name}.zst" in clip.members:
        array_name += ".zst"
    names = [array_name, "json", *([TEXT] if asked.text else [])]
    for name in names:
        if name not in clip.members:
            raise _BadClip("member_missing", f"member {clip.key}.{name} is missing")
    crcs = {name: zlib.crc32(clip.members[name][1]) for name in names}
    if asked.known is not None and asked.known.get(clip.key) != crcs:
        if clip.key not in asked.known:
            raise _BadClip("not_indexed", f"clip {clip.key} is not in the index of the shard")
        raise _BadClip("checksum", f"clip {clip.key} is not what was written (its checksum differs)")
    payload = clip.members[array_name][1]
    array = _array(_unpacked(payload, f"{clip.key}.{array_name}"), kind, f"{clip.key}.{array_name}")
    if kind == "tokens" and array.size and int(array.max()) >= asked.codebook_size:
        raise _BadClip("code_range", f"member {clip.key}.{array_name} holds code {array.max()}; allowed: below {asked.codebook_size}")
    text = _text(clip.members["json"][1], len(array), f"{clip.key}.json")
    members = {name: [clip.members[name][0], len(clip.members[name][1]), crc] for name, crc in crcs.items()}
    entry = {"key": clip.key, "frames": len(array), "caption": text["caption"], "members": members}
    if asked.text:
        _check_vectors(clip.members[TEXT][1], asked.text, f"{clip.key}.{TEXT}")
        if text.get("text_truncated") is True:
            entry["text_truncated"] = True
    if kind == "raw" and not array_name.endswith(".zst"):
        entry["frame_crcs"] = frame_crcs(payload, [array[0].nbytes] * len(array))
    elif kind == "raw" and "frame_bytes" in text:  # ours; others' are read whole
        entry["frame_bytes"] = _frame_bytes(text["frame_bytes"], payload, array, f"{clip.key}.json")
        entry["frame_crcs"] = frame_crcs(payload, entry["frame_bytes"])
    seen.add(clip.key)
    return entry, array.shape[1]


def _unpacked(payload: bytes, name: str) -> bytes:
    if not name.endswith(".zst"):
        return payload
    try:
        return decompress(payload, _LARGEST_CLIP)
    except ValueError as error:
        raise _BadClip("zstd", f"member {name} is damaged: {error}") from error


def _frame_bytes(sizes: Any, payload: bytes, array: np.ndarray, name: str) -> list[int]:
    """The sizes of the compressed frames, where they are right."""
    is_list = isinstance(sizes, list) and len(sizes) == len(array) and all(type(one) is int and one > 0 for one in sizes)
    if is_list and sum(sizes) <= len(payload):
        ends = len(payload) - sum(sizes) + np.cumsum([0, *sizes])
        try:
            found = [decompress(payload[a:b], frame.nbytes) for a, b, frame in zip(ends[:-1], ends[1:], array, strict=True)]
        except ValueError:
            found = []
        if found == [frame.tobytes() for frame in array]:
            return list(sizes)
    raise _BadClip("json_fields", f'member {name} has a "frame_bytes" that is not the size of each compressed frame')


def _array(payload: bytes, kind: str, name: str) -> np.ndarray:
    """The array of frames or codes of a .npy file."""
    shape, fortran, dtype, head = _npy_header(payload, name)
    wanted = "[T, S, S, 3]" if kind == "raw" else "[T, S, S]"
    fits = len(shape) == (4 if kind == "raw" else 3) and min(shape) > 0 and shape[1] == shape[2] and (kind != "raw" or shape[3] == 3)
    if dtype != DTYPES[kind] or fortran or not fits:
        found = f"{dtype} {list(shape)}{' in Fortran order' * fortran}"
        raise _BadClip("array", f"member {name} holds {found}; allowed: {DTYPES[kind]} {wanted}")
    array = _npy_body(payload, shape, dtype, head, name)
    if head == HEAD and payload[:head] != npy_head(array.dtype, array.shape):  # a stream compares headers of this length byte by byte
        raise _BadClip("npy_header", f"the header of member {name} is not as numpy writes it")
    return array


def _check_vectors(payload: bytes, wanted: StoredText, name: str) -> None:
    """Whether the text vectors of a .npy file are such."""
    shape, fortran, dtype, head = _npy_header(payload, name)
    most = wanted.settings.tokens
    if dtype != TEXT_DTYPE or fortran or len(shape) != 2 or shape[0] > most or shape[1] != wanted.width:
        found = f"{dtype} {list(shape)}{' in Fortran order' * fortran}"
        raise _BadClip("text_vectors", f"member {name} holds {found}; allowed: {TEXT_DTYPE} [0 to {most}, {wanted.width}]")
    vectors = _npy_body(payload, shape, dtype, head, name)
    if payload[:head] != npy_head(TEXT_DTYPE, shape):  # a stream compares it byte by byte
        raise _BadClip("npy_header", f"the header of member {name} is not as numpy writes it")
    if not np.isfinite(vectors).all():
        raise _BadClip("text_vectors", f"member {name} holds numbers that are not finite")


def _npy_header(payload: bytes, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, type and length of the header of a .npy file of format 1.0; nothing is unpickled."""
    file = io.BytesIO(payload)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"format {version[0]}.{version[1]}; allowed: 1.0")
        return *np.lib.format.read_array_header_1_0(file), file.tell()
    except Exception as error:  # numpy lets through what Python's tokenizer raises
        raise _BadClip("npy_header", f"member {name} is not a .npy file that can be read ({' '.join(str(error).split())[:200]})") from error


def _npy_body(payload: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], head: int, name: str) -> np.ndarray:
    """The array behind the header of a .npy file."""
    size = head + math.prod(shape) * dtype.itemsize
    if len(payload) != size:
        raise _BadClip("array_size", f"member {name} has {len(payload)} bytes; {dtype} {list(shape)} takes {size}")
    return np.frombuffer(payload, dtype, offset=head).reshape(shape)


def _text(payload: bytes, frames: int, name: str) -> dict[str, Any]:
    """What the JSON of a clip of so many frames says."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = json.loads(payload.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _BadClip("json", f"member {name} is not JSON ({error})") from error
    if not isinstance(text, dict):
        raise _BadClip("json", f"member {name} is not a JSON object")
    durations, caption = text.get("durations_ms"), text.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise _BadClip("caption", f"member {name} has no caption")
    if not isinstance(durations, list) or len(durations) != frames or not all(type(one) is int and one >= 0 for one in durations):
        raise _BadClip("json_fields", f'member {name} has no "durations_ms" of {frames} whole numbers, one a frame')
    if not isinstance(text.get("provenance"), dict) or text.get("frames", frames) != frames:
        raise _BadClip("json_fields", f'member {name} has no object "provenance", or "frames" that are not {frames}')
    return text
