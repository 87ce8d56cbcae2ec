"""Clips -> WebDataset tar shards with an index and checksums; `dataset.ShardDataset` reads them.

    clip -> members {"frames.npy" | "frames.npy.zst" | "codes.npy", "json"[, "text.npy"]}
         -> write_shard: NAME.tar, then NAME.index.json -> Manifest

The tars are plain ustar with no times, owners or extended headers, so the same clips give the same bytes, and any
tar program and the `webdataset` package read them. A shard is whole once its index exists, which is written after it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.data.compression import compress_frames
from t2v_ds.data.manifest import STAGES, ShardInfo
from t2v_ds.errors import DataError
from t2v_ds.files import rename_durably, write_atomically

HEAD = 128  # bytes before the numbers in a .npy file, as numpy has written them for years
ARRAYS = {"raw": "frames", "tokens": "codes"}  # the array of a clip of each kind
DTYPES: dict[str, np.dtype[Any]] = {"raw": np.dtype(np.uint8), "tokens": np.dtype(np.uint16)}
TEXT = "text.npy"  # member of a token clip: what a text encoder made of its caption, fp16 [n, width]
TEXT_DTYPE: np.dtype[Any] = np.dtype(np.float16)
_INDEX_FORMAT = "t2v_ds.index/1"


def npy_head(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of the .npy file of such an array, version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a .npy file, version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def raw_members(
    frames: np.ndarray, caption: str, durations_ms: list[int], provenance: dict[str, Any], compression: str = "none"
) -> dict[str, bytes]:
    """Members of a raw clip from frames [T, S, S, 3] uint8; `compression`: "none" or "zstd" (see `compression.py`)."""
    members = _members("raw", frames, caption, durations_ms, provenance)
    if compression == "zstd":
        array = members.pop("frames.npy")
        members["frames.npy.zst"], sizes = compress_frames(array, len(array) - _array_bytes(array), len(frames))
        members["json"] = json.dumps({**json.loads(members["json"]), "frame_bytes": sizes}, sort_keys=True).encode()
    return dict(sorted(members.items()))


def token_members(
    codes: np.ndarray,
    caption: str,
    durations_ms: list[int],
    provenance: dict[str, Any],
    text: np.ndarray | None = None,
    text_truncated: bool = False,
) -> dict[str, bytes]:
    """Members of a token clip.

    Args:
        codes: [T, h, w] of any integer type, below 65536.
        caption, durations_ms, provenance: as of the raw clip.
        text: the vectors of the caption's tokens, fp16 [n, width]; None: they are not stored.
        text_truncated: whether the caption has more tokens than these.
    """
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 2**16:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit uint16")
    members = _members("tokens", codes.astype(np.uint16), caption, durations_ms, provenance)
    if text is None:
        return members
    if text.dtype != TEXT_DTYPE or text.ndim != 2 or not np.isfinite(text).all():
        raise ValueError(f"text vectors are {text.dtype} {list(text.shape)}; needs finite {TEXT_DTYPE} [n, width]")
    if text_truncated:
        members["json"] = json.dumps({**json.loads(members["json"]), "text_truncated": True}, sort_keys=True).encode()
    return {**members, TEXT: npy_bytes(text)}


def _members(kind: str, array: np.ndarray, caption: str, durations_ms: list[int], provenance: dict[str, Any]) -> dict[str, bytes]:
    if array.dtype != DTYPES[kind] or len(durations_ms) != len(array):
        raise ValueError(f"{array.dtype} {list(array.shape)} with {len(durations_ms)} durations is not a {kind} clip")
    text = {"caption": caption, "durations_ms": durations_ms, "frames": len(array), "provenance": provenance}
    return {f"{ARRAYS[kind]}.npy": npy_bytes(array), "json": json.dumps(text, sort_keys=True).encode()}


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(f"{shard.stem}.index.json")


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]], chunk: int = 0) -> ShardInfo:
    """Write one shard and its index, each whole or not at all.

    Args:
        path: ending in .tar.
        samples: (key, members) where members maps "frames.npy", "frames.npy.zst" or "codes.npy", "json", and "text.npy" where it is
            stored, to their bytes; keys hold no dot or slash, as WebDataset splits names at the first dot.
        chunk: that the shard belongs to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    digest, clips = hashlib.sha256(), []
    with temporary.open("wb") as file:

        def write(data: bytes) -> None:
            file.write(data)
            digest.update(data)

        for key, members in samples:
            text = json.loads(members["json"])
            clip: dict[str, Any] = {"key": key, "frames": text["frames"], "caption": text["caption"], "members": {}}
            if text.get("text_truncated"):
                clip["text_truncated"] = True
            if frames := members.get("frames.npy"):
                clip["frame_crcs"] = frame_crcs(frames, [_array_bytes(frames) // max(1, text["frames"])] * text["frames"])
            if frames := members.get("frames.npy.zst"):
                clip["frame_bytes"] = text["frame_bytes"]
                clip["frame_crcs"] = frame_crcs(frames, text["frame_bytes"])
            for name, payload in members.items():
                write(_tar_header(f"{key}.{name}", len(payload)))
                clip["members"][name] = [file.tell(), len(payload), zlib.crc32(payload)]
                write(payload)
                write(bytes(-len(payload) % tarfile.BLOCKSIZE))
            clips.append(clip)
        end = 2 * tarfile.BLOCKSIZE
        write(bytes(end + -(file.tell() + end) % tarfile.RECORDSIZE))
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    rename_durably(temporary, path)
    return write_index(path, size, digest.hexdigest(), chunk, clips)


def write_index(path: Path, size: int, sha256: str, chunk: int, clips: list[dict[str, Any]]) -> ShardInfo:
    """Write the index of a shard of `size` bytes that lies at `path`, which makes it whole."""
    index = {"format": _INDEX_FORMAT, "shard": path.name, "bytes": size, "sha256": sha256, "chunk": chunk, "clips": clips}
    write_atomically(index_path(path), (json.dumps(index) + "\n").encode())
    return load_shard_info(path)


def frame_crcs(payload: bytes, sizes: Sequence[int]) -> str:
    """CRC-32 of the frames that end a payload, of these sizes; little-endian, in hex: so that a frame can be read alone."""
    ends = len(payload) - sum(sizes) + np.cumsum([0, *sizes])
    body = memoryview(payload)
    return b"".join(zlib.crc32(body[a:b]).to_bytes(4, "little") for a, b in itertools.pairwise(ends.tolist())).hex()


def _array_bytes(payload: bytes) -> int:
    """Bytes of a .npy file behind its header."""
    file = io.BytesIO(payload[:1024])
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return len(payload) - file.tell()


def _tar_header(name: str, size: int) -> bytes:
    if "/" in name or name.startswith("."):
        raise ValueError(f"'{name}' is not the name of a member")
    info = tarfile.TarInfo(name)  # time, user and group are 0
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def load_shard_info(path: str | Path) -> ShardInfo:
    """The ShardInfo of a finished shard, from its index.

    Raises:
        DataError: no index (the shard is not finished), or the file does not have the size that the index says.
    """
    path = Path(path)
    index, index_sha256 = read_index(path, "raw")
    check_size(path, index["bytes"], "its stage")
    lengths: dict[int, int] = {}
    for clip in index["clips"]:
        lengths[clip["frames"]] = lengths.get(clip["frames"], 0) + 1
    return ShardInfo(
        name=path.name,
        clips=len(index["clips"]),
        frames=sum(clip["frames"] for clip in index["clips"]),
        bytes=index["bytes"],
        sha256=index["sha256"],
        index_sha256=index_sha256,
        chunk=index["chunk"],
        lengths={str(length): lengths[length] for length in sorted(lengths)},
    )


def read_shard(path: str | Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the (key, members) of a finished shard in order, as `write_shard` takes them; checksums are compared."""
    path = Path(path)
    index, _ = read_index(path, "raw")
    with path.open("rb") as file:
        for clip in index["clips"]:
            members = {}
            for name, (offset, size, crc) in clip["members"].items():
                members[name] = os.pread(file.fileno(), size, offset)
                if zlib.crc32(members[name]) != crc:
                    raise DataError(f"clip {clip['key']} of shard {path} is damaged (its checksum differs)")
            yield clip["key"], members


def read_index(shard: Path, kind: str) -> tuple[dict[str, Any], str]:
    """The index of a shard and its sha256.

    Raises:
        DataError: it is missing or damaged.
    """
    path = index_path(shard)
    try:
        data = path.read_bytes()
        index = json.loads(data)
    except FileNotFoundError as error:
        raise DataError(f"index {path} is missing: restore it, or make the folder again with {STAGES[kind]}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"index {path} cannot be read ({error}): restore it, or make the folder again with {STAGES[kind]}") from error
    return index, hashlib.sha256(data).hexdigest()


def count_truncated(clips: Iterable[dict[str, Any]]) -> int:
    """How many of the clips of an index have captions with more tokens than are stored."""
    return sum(clip.get("text_truncated", False) for clip in clips)


def check_size(path: Path, expected: int, stage: str) -> None:
    """Raise a DataError if the shard is not there or not of this size."""
    try:
        size = path.stat().st_size
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(f"shard {path} {what}: restore it, or make the folder again with {stage}") from error
    if size != expected:
        raise DataError(f"shard {path} has {size} bytes instead of {expected}: restore it, or make the folder again with {stage}")
