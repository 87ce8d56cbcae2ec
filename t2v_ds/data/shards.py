"""Clips <-> WebDataset tar shards with an index and checksums.

    clip -> members {"frames.npy" | "codes.npy", "json"} -> write_shard: NAME.tar, then NAME.index.json -> Manifest
    folder -> ShardDataset: manifest + indexes -> read(i): pread, checksum -> arrays and caption
                                               -> read_codes, read_frames: many clips or single frames at once, into one buffer

The tars are plain ustar with no times, owners or extended headers, so the same clips give the same bytes, and any
tar program and the `webdataset` package read them. A shard is whole once its index exists, which is written after it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import tarfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from t2v_ds.data.manifest import MANIFEST, STAGES, Manifest, ShardInfo, digest_of
from t2v_ds.errors import DataError
from t2v_ds.files import rename_durably, write_atomically
from t2v_ds.kernels.clips import DAMAGED, FILE_ENDS, OTHER_HEAD, Pieces

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
_DTYPES: dict[str, np.dtype[Any]] = {"raw": np.dtype(np.uint8), "tokens": np.dtype(np.uint16)}
_INDEX_FORMAT = "t2v_ds.index/1"
_OPEN_FILES = 512  # shards kept open when there are more
_CLOSED = -1
_HEAD = 128  # bytes before the numbers in a .npy file of ours


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
            if frames := members.get("frames.npy"):
                clip["frame_crcs"] = _frame_crcs(frames, text["frames"])
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


def _frame_crcs(payload: bytes, count: int) -> str:
    """CRC-32 of each frame of a .npy file, little-endian, in hex: so that a frame can be read alone."""
    body = memoryview(payload)[len(payload) - _array_bytes(payload) :]
    size = len(body) // count if count else 0
    return b"".join(zlib.crc32(body[t * size : (t + 1) * size]).to_bytes(4, "little") for t in range(count)).hex()


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


class Buffer:
    """Memory that is used again and again: it grows to the largest that was asked for."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def take(self, size: int) -> np.ndarray:
        """`size` bytes, uint8; what they held before is overwritten."""
        if size > len(self._memory):
            self._memory = np.empty(size, dtype=np.uint8)
        return self._memory[:size]


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
        frame_shape: of one frame: (S, S, 3), or (h, w) of codes.

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
        shards_of: list[int] = []
        self.shard_ranges: list[range] = []
        members: list[list[list[int]]] = []  # a clip's [[offset, size, crc32] of the array, [...] of the text]
        self._frame_crcs: list[str] = []  # as `_frame_crcs` wrote them; empty in shards that others wrote
        lengths: list[int] = []
        for number, shard in enumerate(self.shards):
            first = len(self._keys)
            for clip in self._clips_of(shard):
                self._keys.append(clip["key"])
                self._captions.append(clip["caption"])
                shards_of.append(number)
                lengths.append(clip["frames"])
                members.append([clip["members"][f"{ARRAYS[kind]}.npy"], clip["members"]["json"]])
                self._frame_crcs.append(clip.get("frame_crcs", ""))
            self.shard_ranges.append(range(first, len(self._keys)))
        self.lengths = np.array(lengths, dtype=np.int64)  # [N]
        self._shards_of = np.array(shards_of, dtype=np.int64)  # [N]
        self._files = np.full(len(self.shards), _CLOSED, dtype=np.int32)  # a descriptor a shard
        table = np.array(members, dtype=np.int64).reshape(-1, 2, 3)
        self._whole, self._texts = (Pieces(self._files, *self._columns(table[:, m])) for m in range(2))
        side = self.manifest.image_size if kind == "raw" else self.manifest.grid_size
        self.frame_shape = (side, side, 3) if kind == "raw" else (side, side)
        self._frame_bytes = math.prod(self.frame_shape) * _DTYPES[kind].itemsize
        # As `npy_bytes` writes them, so that arrays can be read without parsing.
        self._is_plain = bool((table[:, 0, 1] == _HEAD + self.lengths * self._frame_bytes).all())
        if self._is_plain:
            heads = np.zeros((int(self.lengths.max(initial=0)) + 1, _HEAD), dtype=np.uint8)  # of an array of so many frames
            for length in set(lengths):
                heads[length] = np.frombuffer(self._head(length), dtype=np.uint8)
            self._arrays = Pieces(self._files, *self._columns(table[:, 0]), self.lengths.astype(np.int32), heads)
        self._readers = np.zeros(len(self.shards), dtype=np.int64)  # reads under way in a shard, where not all stay open
        self._lock = threading.Lock()

    def _columns(self, table: np.ndarray) -> tuple[np.ndarray, ...]:
        """The columns of `Pieces` from [offset, size, crc32] of a piece a clip."""
        return (self._shards_of.astype(np.int32), *(table[:, c].astype(dtype) for c, dtype in enumerate((np.int64, np.int64, np.uint32))))

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

    def keys(self, numbers: np.ndarray) -> list[str]:
        """The names of many clips."""
        return [self._keys[i] for i in numbers.tolist()]

    def captions(self, numbers: np.ndarray) -> list[str]:
        """The captions of many clips, without reading the shards."""
        return [self._captions[i] for i in numbers.tolist()]

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
        array, text = self._payload(i, self._whole), self._payload(i, self._texts)
        sample = json.loads(text)
        provenance = sample["provenance"]
        clip = {"key": self._keys[i], "caption": sample["caption"], "durations_ms": sample["durations_ms"], "provenance": provenance}
        if "attributes" in provenance:
            clip["attributes"] = provenance["attributes"]
        clip[ARRAYS[self.kind]] = self._array(i, array)
        return clip

    def read_codes(self, numbers: np.ndarray, buffer: Buffer) -> np.ndarray:
        """Read the codes of many clips at once.

        Args:
            numbers: int64 [B], of the clips.
            buffer: that the codes are read into.

        Returns:
            uint16 [T of all clips, h, w], one clip after another: a view of the buffer.

        Raises:
            DataError: as `read`.
        """
        if not self._is_plain:
            return np.concatenate([self.read(int(i))["codes"] for i in numbers])
        out = buffer.take(int(self.lengths[numbers].sum()) * self._frame_bytes)
        self._read_pieces(self._arrays, numbers, numbers, out)
        return out.view(np.uint16).reshape(-1, *self.frame_shape)

    def read_frames(self, numbers: np.ndarray, frames: Sequence[np.ndarray], buffer: Buffer) -> np.ndarray:
        """Read some frames of each of many clips, and nothing else of them.

        Args:
            numbers: int64 [B], of the clips.
            frames: for each, the numbers of its frames.
            buffer: that the frames are read into.

        Returns:
            uint8 [frames of all clips, S, S, 3], one clip after another: a view of the buffer.

        Raises:
            DataError: as `read`.
        """
        if not self._is_plain or not all(self._frame_crcs[i] for i in numbers):
            return np.concatenate([self.read(int(i))["frames"][some] for i, some in zip(numbers, frames, strict=True)])
        clips, wanted = np.repeat(numbers, [len(some) for some in frames]), np.concatenate(frames)
        crcs = [np.frombuffer(bytes.fromhex(self._frame_crcs[i]), dtype="<u4")[some] for i, some in zip(numbers, frames, strict=True)]
        starts = self._whole.offsets[clips] + _HEAD + wanted * self._frame_bytes
        sizes = np.full(len(clips), self._frame_bytes, dtype=np.int64)
        pieces = Pieces(self._files, self._whole.files[clips], starts, sizes, np.concatenate(crcs).astype(np.uint32))
        out = buffer.take(len(clips) * self._frame_bytes)
        self._read_pieces(pieces, np.arange(len(clips)), clips, out)
        return out.reshape(-1, *self.frame_shape)

    def _payload(self, i: int, pieces: Pieces) -> bytes:
        out = np.empty(pieces.sizes[i], dtype=np.uint8)
        self._read_pieces(pieces, np.array([i]), np.array([i]), out)
        return out.tobytes()

    def _read_pieces(self, pieces: Pieces, numbers: np.ndarray, clips: np.ndarray, out: np.ndarray) -> None:
        """Read pieces, which are of the clips `clips`."""
        if len(self.shards) > _OPEN_FILES:
            with self._pinned(np.unique(self._shards_of[clips])):
                place, status = pieces.read(numbers, out)
        else:
            place, status = pieces.read(numbers, out)
            if status == errno.EBADF:  # a shard that is not open yet
                with self._lock:
                    self._open(np.unique(self._shards_of[clips]))
                place, status = pieces.read(numbers, out)
        if status:
            self._fail(int(clips[place]), status)

    @contextlib.contextmanager
    def _pinned(self, shards: np.ndarray) -> Iterator[None]:
        """These shards are open meanwhile, and only as many others as may be."""
        with self._lock:
            self._readers[shards] += 1
            try:
                idle = ((self._files != _CLOSED) & (self._readers == 0)).nonzero()[0]
                self._shut(idle[: max(0, int((self._files != _CLOSED).sum()) + len(shards) - _OPEN_FILES)])
                self._open(shards)
            except BaseException:
                self._readers[shards] -= 1
                raise
        try:
            yield
        finally:
            with self._lock:
                self._readers[shards] -= 1

    def _open(self, shards: np.ndarray) -> None:
        for shard in shards[self._files[shards] == _CLOSED]:
            path = self.folder / self.shards[shard].name
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error

    def _shut(self, shards: np.ndarray) -> None:
        for shard in shards:
            os.close(self._files[shard])
            self._files[shard] = _CLOSED

    def _fail(self, i: int, status: int) -> NoReturn:
        path = self.folder / self.shards[self._shards_of[i]].name
        if status == OTHER_HEAD:
            self._array(i, self._payload(i, self._whole))  # raises, and says what it holds
        if status not in (FILE_ENDS, DAMAGED):
            raise DataError(f"shard {path} cannot be read: {os.strerror(status)}")
        why = "the shard ends before it" if status == FILE_ENDS else "its checksum differs"
        raise DataError(
            f"clip {self._keys[i]} of shard {path} is damaged ({why}): "
            f"restore the shard, or remove {self.folder} and make it again with {STAGES[self.kind]}"
        )

    def _head(self, length: int) -> bytes:
        """The header of the .npy file of a clip."""
        file = io.BytesIO()
        header = {"descr": _DTYPES[self.kind].str, "fortran_order": False, "shape": (length, *self.frame_shape)}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue()

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
            self._shut((self._files != _CLOSED).nonzero()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):  # absent when opening failed
            self.close()
