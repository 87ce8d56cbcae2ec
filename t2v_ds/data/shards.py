"""Clips <-> WebDataset tar shards with an index and checksums.

    clip -> members {"frames.npy" | "codes.npy", "json"} -> write_shard: NAME.tar, then NAME.index.json -> Manifest
    folder -> ShardDataset: manifest + indexes -> read(i): pread, checksum -> arrays and caption

The tars are plain ustar with no times, owners or extended headers, so the same clips give the same bytes, and any
tar program and the `webdataset` package read them. A shard is whole once its index exists, which is written after it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from t2v_ds.data.manifest import MANIFEST, STAGES, Manifest, ShardInfo, digest_of
from t2v_ds.errors import DataError
from t2v_ds.files import rename_durably, write_atomically

__all__ = [
    "Manifest",
    "ShardDataset",
    "ShardInfo",
    "index_path",
    "load_shard_info",
    "npy_bytes",
    "raw_members",
    "read_shard",
    "token_members",
    "write_shard",
]

ARRAYS = {"raw": "frames", "tokens": "codes"}  # the array of a clip of each kind
_DTYPES = {"raw": np.dtype(np.uint8), "tokens": np.dtype(np.uint16)}
_INDEX_FORMAT = "t2v_ds.index/1"
_OPEN_FILES = 512  # shards kept open; the rest are opened for each read


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a .npy file, version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def raw_members(frames: np.ndarray, caption: str, durations_ms: list[int], provenance: dict[str, Any]) -> dict[str, bytes]:
    """Members of a raw clip from frames [T, S, S, 3] uint8."""
    return _members("raw", frames, caption, durations_ms, provenance)


def token_members(codes: np.ndarray, caption: str, durations_ms: list[int], provenance: dict[str, Any]) -> dict[str, bytes]:
    """Members of a token clip from codes [T, h, w] of any integer type, below 65536."""
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 2**16:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit uint16")
    return _members("tokens", codes.astype(np.uint16), caption, durations_ms, provenance)


def _members(kind: str, array: np.ndarray, caption: str, durations_ms: list[int], provenance: dict[str, Any]) -> dict[str, bytes]:
    if array.dtype != _DTYPES[kind] or len(durations_ms) != len(array):
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
        samples: (key, members) where members maps "frames.npy" or "codes.npy", and "json", to their bytes; keys hold no
            dot or slash, as WebDataset splits names at the first dot.
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
    index = {"format": _INDEX_FORMAT, "shard": path.name, "bytes": size, "sha256": digest.hexdigest(), "chunk": chunk, "clips": clips}
    write_atomically(index_path(path), (json.dumps(index) + "\n").encode())
    return load_shard_info(path)


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
    index, index_sha256 = _read_index(path, "raw")
    _check_size(path, index["bytes"], "its stage")
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
    index, _ = _read_index(path, "raw")
    with path.open("rb") as file:
        for clip in index["clips"]:
            members = {}
            for name, (offset, size, crc) in clip["members"].items():
                members[name] = os.pread(file.fileno(), size, offset)
                if zlib.crc32(members[name]) != crc:
                    raise DataError(f"clip {clip['key']} of shard {path} is damaged (its checksum differs)")
            yield clip["key"], members


def _read_index(shard: Path, kind: str) -> tuple[dict[str, Any], str]:
    path = index_path(shard)
    try:
        data = path.read_bytes()
        index = json.loads(data)
    except FileNotFoundError as error:
        raise DataError(f"index {path} is missing: restore it, or make the folder again with {STAGES[kind]}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"index {path} cannot be read ({error}): restore it, or make the folder again with {STAGES[kind]}") from error
    return index, hashlib.sha256(data).hexdigest()


def _check_size(path: Path, expected: int, stage: str) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"shard {path} is missing: restore it, or make the folder again with {stage}") from error
    if size != expected:
        raise DataError(f"shard {path} has {size} bytes instead of {expected}: restore it, or make the folder again with {stage}")


class ShardDataset:
    """Random access to the clips of a folder of shards; safe to read from many threads.

    Args:
        folder: with a manifest.
        kind: "raw" or "tokens".
        chunk: only the clips of this chunk; -1: all.

    Attributes:
        manifest: of the whole folder.
        shards: the ones opened, in order.
        shard_ranges: for each of them, the range of its clips' numbers here.
        lengths: frames of each clip, int64 [N].

    Raises:
        DataError: folder, manifest, index or shard missing, of the wrong kind or size, or changed since it was made.
    """

    def __init__(self, folder: str | Path, kind: str, chunk: int = -1) -> None:
        self.folder, self.kind, self.chunk = Path(folder), kind, chunk
        self.manifest = Manifest.load(folder, kind)
        self.shards = [shard for shard in self.manifest.shards if chunk in (-1, shard.chunk)]
        if not self.shards:
            chunks = [one["chunk"] for one in self.manifest.chunks]
            raise DataError(f"{folder} has no chunk {chunk}; it has chunks {chunks}")
        self._keys: list[str] = []
        self._captions: list[str] = []
        self._shard_of: list[int] = []
        self.shard_ranges: list[range] = []
        members: list[list[list[int]]] = []  # a clip's [[offset, size, crc32] of the array, [...] of the text]
        lengths: list[int] = []
        for number, shard in enumerate(self.shards):
            first = len(self._keys)
            for clip in self._clips_of(shard):
                self._keys.append(clip["key"])
                self._captions.append(clip["caption"])
                self._shard_of.append(number)
                lengths.append(clip["frames"])
                members.append([clip["members"][f"{ARRAYS[kind]}.npy"], clip["members"]["json"]])
            self.shard_ranges.append(range(first, len(self._keys)))
        self.lengths = np.array(lengths, dtype=np.int64)  # [N]
        self._members = np.array(members, dtype=np.int64).reshape(-1, 2, 3)
        self._files: dict[int, int] = {}  # shard -> descriptor, until close()
        self._lock = threading.Lock()

    def _clips_of(self, shard: ShardInfo) -> list[dict[str, Any]]:
        path = self.folder / shard.name
        index, index_sha256 = _read_index(path, self.kind)
        if index_sha256 != shard.index_sha256:
            raise DataError(
                f"index {index_path(path)} is not the one that {MANIFEST} names (its checksum differs): "
                f"restore it, or make the folder again with {STAGES[self.kind]}"
            )
        _check_size(path, shard.bytes, STAGES[self.kind])
        return list(index["clips"])

    @property
    def digest(self) -> str:
        """A hash of the content of the shards opened."""
        return digest_of(self.shards)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        """The name of clip `i`."""
        return self._keys[i]

    def caption(self, i: int) -> str:
        """The caption of clip `i`, without reading the shard."""
        return self._captions[i]

    def read(self, i: int) -> dict[str, Any]:
        """Read clip `i`.

        Returns:
            "key", "caption", "durations_ms" (T numbers), "provenance" (and "attributes" where the source drew the clip), and
            "frames" [T, S, S, 3] uint8 or "codes" [T, h, w] uint16, not writeable.

        Raises:
            DataError: the shard was cut or a byte of the clip changed since it was written.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        array, text = (self._payload(i, m) for m in range(2))
        sample = json.loads(text)
        provenance = sample["provenance"]
        clip = {"key": self._keys[i], "caption": sample["caption"], "durations_ms": sample["durations_ms"], "provenance": provenance}
        if "attributes" in provenance:
            clip["attributes"] = provenance["attributes"]
        clip[ARRAYS[self.kind]] = self._array(i, array)
        return clip

    def _payload(self, i: int, member: int) -> bytes:
        offset, size, crc = (int(n) for n in self._members[i, member])
        shard = self._shard_of[i]
        # pread and not mmap: a mapped file that is cut afterwards kills the process.
        try:
            data = self._pread(shard, size, offset)
        except OSError as error:
            raise DataError(f"shard {self.folder / self.shards[shard].name} cannot be read: {error.strerror or error}") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise DataError(
                f"clip {self._keys[i]} of shard {self.folder / self.shards[shard].name} is damaged (its checksum differs): "
                f"restore the shard, or remove {self.folder} and make it again with {STAGES[self.kind]}"
            )
        return data

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        with self._lock:
            if shard not in self._files and len(self._files) < _OPEN_FILES:
                self._files[shard] = os.open(self.folder / self.shards[shard].name, os.O_RDONLY)
            descriptor = self._files.get(shard)
        if descriptor is not None:
            return os.pread(descriptor, size, offset)
        with (self.folder / self.shards[shard].name).open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def _array(self, i: int, data: bytes) -> np.ndarray:
        file = io.BytesIO(data)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        ndim = 4 if self.kind == "raw" else 3
        if dtype != _DTYPES[self.kind] or fortran or len(shape) != ndim or shape[0] != self.lengths[i]:
            raise DataError(f"clip {self._keys[i]} of {self.folder} holds {dtype} {list(shape)}, which is not a {self.kind} clip")
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)

    def verify(self) -> None:
        """Read every shard in full and compare its sha256 with the manifest's.

        Raises:
            DataError: the first shard that differs.
        """
        for shard in self.shards:
            with (self.folder / shard.name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise DataError(
                    f"shard {self.folder / shard.name} is damaged (its sha256 differs from the manifest's): "
                    f"restore it, or remove {self.folder} and make it again with {STAGES[self.kind]}"
                )

    def close(self) -> None:
        """Close the shards."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):  # absent when opening failed
            self.close()
