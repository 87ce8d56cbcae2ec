"""A folder of shards -> the arrays and captions of its clips, every byte checked.

folder or URL -> manifest + indexes -> read(i): bytes, checksum -> arrays and caption
                                    -> read_codes, read_text, read_frames: many clips or single frames at once, into one buffer
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from t2v_ds.data.compression import decompress
from t2v_ds.data.manifest import MANIFEST, STAGES, Manifest, ShardInfo, StoredText, digest_of
from t2v_ds.data.remote import CachedFolder, LocalFolder
from t2v_ds.data.shards import ARRAYS, DTYPES, HEAD, TEXT, TEXT_DTYPE, check_size, index_path, npy_head, read_index
from t2v_ds.errors import DataError
from t2v_ds.kernels.clips import DAMAGED, FILE_ENDS, OTHER_HEAD, Files, Pieces

_OPEN_FILES = 512  # shards kept open when there are more
_CLOSED = -1
_LONGEST_HEAD = 2**16  # of anybody's


_DATASETS: weakref.WeakSet[ShardDataset] = weakref.WeakSet()


def _after_fork() -> None:
    for dataset in list(_DATASETS):
        dataset._after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Buffer:
    """Memory that is used again and again: it grows to the largest that was asked for."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self._beside: Buffer | None = None

    @property
    def beside(self) -> Buffer:
        """Another one, that is used again together with this one."""
        self._beside = self._beside or Buffer()
        return self._beside

    def take(self, size: int) -> np.ndarray:
        """`size` bytes, uint8; what they held before is overwritten."""
        if size > len(self._memory):
            self._memory = np.empty(size, dtype=np.uint8)
        return self._memory[:size]


class ShardDataset:
    """Random access to the clips of a folder of shards; safe to read from many threads.

    Args:
        folder: with a manifest; what lies at a URL is given as `remote.open_folder` opens it.
        kind: "raw" or "tokens".
        chunk: only the clips of this chunk; -1: all.

    Attributes:
        manifest: of the whole folder.
        shards: the ones opened, in order.
        shard_ranges: for each of them, the range of its clips' numbers here.
        lengths: frames of each clip, int64 [N].
        stored_text: what the text vectors are that lie beside the codes; None: there are none.
        text_lengths: text vectors of each clip, one a token of its caption, int64 [N].
        frame_shape: of one frame: (S, S, 3), or (h, w) of codes.

    Raises:
        DataError: folder, manifest, index or shard missing, of the wrong kind or size, or changed since it was made.
    """

    def __init__(self, folder: str | Path | LocalFolder | CachedFolder, kind: str, chunk: int = -1) -> None:
        self._source = folder if isinstance(folder, (LocalFolder, CachedFolder)) else LocalFolder(folder)
        self.folder, self.kind, self.chunk = self._source.folder, kind, chunk
        self.manifest = Manifest.load(self.folder, kind)
        self._open_limit = min(_OPEN_FILES, self._source.open_limit or _OPEN_FILES)
        self.shards = [shard for shard in self.manifest.shards if chunk in (-1, shard.chunk)]
        if not self.shards:
            chunks = [one["chunk"] for one in self.manifest.chunks]
            raise DataError(f"{folder} has no chunk {chunk}; it has chunks {chunks}")
        self._keys: list[str] = []
        self._captions: list[str] = []
        shards_of: list[int] = []
        self.shard_ranges: list[range] = []
        members: list[list[list[int]]] = []  # a clip's [[offset, size, crc32] of the array, [...] of the text]
        self._frame_crcs: list[str] = []  # as `frame_crcs` wrote them; empty in shards that others wrote
        self._packed: list[list[int]] = []  # bytes of each frame where they are compressed; else empty
        vectors: list[list[int]] = []  # a clip's [offset, size, crc32] of what is stored of its caption
        compressed: list[bool] = []
        lengths: list[int] = []
        for number, shard in enumerate(self.shards):
            first = len(self._keys)
            for clip in self._clips_of(shard):
                self._keys.append(clip["key"])
                self._captions.append(clip["caption"])
                shards_of.append(number)
                lengths.append(clip["frames"])
                compressed.append(f"{ARRAYS[kind]}.npy.zst" in clip["members"])
                members.append([clip["members"][f"{ARRAYS[kind]}.npy{'.zst' * compressed[-1]}"], clip["members"]["json"]])
                vectors.append(clip["members"].get(TEXT, [0, 0, 0]))
                self._frame_crcs.append(clip.get("frame_crcs", ""))
                self._packed.append(clip.get("frame_bytes", []))
            self.shard_ranges.append(range(first, len(self._keys)))
        self.lengths = np.array(lengths, dtype=np.int64)  # [N]
        self._shards_of = np.array(shards_of, dtype=np.int64)  # [N]
        self._files = Files(len(self.shards))
        table = np.array(members, dtype=np.int64).reshape(-1, 2, 3)
        self._whole, self._texts = (Pieces(self._files, *self._columns(table[:, m])) for m in range(2))
        side = self.manifest.image_size if kind == "raw" else self.manifest.grid_size
        self.frame_shape = (side, side, 3) if kind == "raw" else (side, side)
        self._frame_bytes = math.prod(self.frame_shape) * DTYPES[kind].itemsize
        self._is_compressed = np.array(compressed, dtype=bool)  # [N]
        # As `npy_bytes` writes them, so that arrays can be read without parsing.
        is_plain = ~self._is_compressed & (table[:, 0, 1] == HEAD + self.lengths * self._frame_bytes)
        self._is_plain = bool(is_plain.all())
        if self._is_plain and kind == "tokens":  # the arrays without their headers, which must be these
            heads = np.zeros((int(self.lengths.max(initial=0)) + 1, HEAD), dtype=np.uint8)  # of an array of so many frames
            for length in set(lengths):
                heads[length] = np.frombuffer(npy_head(DTYPES[kind], (length, *self.frame_shape)), dtype=np.uint8)
            whole = self._whole
            head_of = self.lengths.astype(np.int32)
            self._arrays = Pieces(self._files, whole.files, whole.offsets, whole.sizes, whole.crcs, head_of, heads)
        self.text_lengths = np.zeros(len(lengths), dtype=np.int64)
        self.stored_text = self.manifest.stored_text
        self._vectors = self._text_pieces(self.stored_text, np.array(vectors, dtype=np.int64).reshape(-1, 3)) if self.stored_text else None
        self._readers = np.zeros(len(self.shards), dtype=np.int64)  # reads under way in a shard, where not all stay open
        self._last_use = np.zeros(len(self.shards), dtype=np.int64)
        self._reads, self._closing = 0, False  # reads under way in all; whether to close when they have ended
        self._lock = threading.Lock()
        _DATASETS.add(self)

    def _after_fork(self) -> None:
        """In a child: no read is under way, and nobody holds the lock."""
        self._lock, self._reads, self._closing = threading.Lock(), 0, False
        self._readers[:] = 0

    def _columns(self, table: np.ndarray) -> tuple[np.ndarray, ...]:
        """The columns of `Pieces` from [offset, size, crc32] of a piece a clip."""
        return (self._shards_of.astype(np.int32), *(table[:, c].astype(dtype) for c, dtype in enumerate((np.int64, np.int64, np.uint32))))

    def _text_pieces(self, stored: StoredText, places: np.ndarray) -> Pieces:
        """Text vectors without their headers, which must be these, from [offset, size, crc32] of a member a clip; sets `text_lengths`."""
        tokens, width = stored.settings.tokens, stored.width
        self.text_lengths, rest = np.divmod(places[:, 1] - HEAD, width * TEXT_DTYPE.itemsize)
        for i in ((rest != 0) | (self.text_lengths < 0) | (self.text_lengths > tokens)).nonzero()[0]:
            raise DataError(
                f"clip {self._keys[i]} of {self.folder} has no text vectors of {width} numbers for up to {tokens} tokens, which {MANIFEST} "
                f"promises: restore the folder, or make it again with {STAGES[self.kind]}"
            )
        heads = b"".join(npy_head(TEXT_DTYPE, (rows, width)) for rows in range(tokens + 1))
        table = np.frombuffer(heads, dtype=np.uint8).reshape(tokens + 1, HEAD)
        return Pieces(self._files, *self._columns(places), self.text_lengths.astype(np.int32), table)

    def _clips_of(self, shard: ShardInfo) -> list[dict[str, Any]]:
        path = self.folder / shard.name
        index, index_sha256 = read_index(path, self.kind)
        if index_sha256 != shard.index_sha256:
            raise DataError(
                f"index {index_path(path)} is not the one that {MANIFEST} names (its checksum differs): "
                f"restore it, or make the folder again with {STAGES[self.kind]}"
            )
        if isinstance(self._source, LocalFolder):  # else it is checked when it is fetched
            check_size(path, shard.bytes, STAGES[self.kind])
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
            "frames" [T, S, S, 3] uint8 or "codes" [T, h, w] uint16, not writeable; "text" [n, width] fp16 where it is stored.

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
        clip[ARRAYS[self.kind]] = self._array(i, self._unpacked(i, array))
        if self._vectors is not None:
            clip["text"] = self.read_text(np.array([i]), Buffer())
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
        out = buffer.take(int(np.add.reduce(self.lengths[numbers])) * self._frame_bytes)
        self._read_pieces(self._arrays, numbers, numbers, out)
        return out.view(np.uint16).reshape(-1, *self.frame_shape)

    def read_text(self, numbers: np.ndarray, buffer: Buffer) -> np.ndarray:
        """Read the stored text vectors of many clips at once.

        Args:
            numbers: int64 [B], of the clips.
            buffer: that the vectors are read into.

        Returns:
            fp16 [n of all clips, width], one clip's `text_lengths` after another: a view of the buffer.

        Raises:
            DataError: as `read`; or none are stored here.
        """
        if self._vectors is None:
            raise DataError(f"{self.folder} holds no text vectors")
        width = self.manifest.text_width
        out = buffer.take(int(np.add.reduce(self.text_lengths[numbers])) * width * TEXT_DTYPE.itemsize)
        self._read_pieces(self._vectors, numbers, numbers, out)
        return out.view(TEXT_DTYPE).reshape(-1, width)

    def read_frames(self, numbers: np.ndarray, frames: Sequence[np.ndarray], buffer: Buffer) -> np.ndarray:
        """Read some frames of each of many clips, and nothing else of them (whole clips where a folder has compressed ones and others).

        Args:
            numbers: int64 [B], of the clips.
            frames: for each, the numbers of its frames.
            buffer: that the frames are read into.

        Returns:
            uint8 [frames of all clips, S, S, 3], one clip after another: a view of the buffer.

        Raises:
            DataError: as `read`.
            IndexError: there is no such frame.
        """
        clips, wanted = np.repeat(numbers, [len(some) for some in frames]), np.concatenate(frames)
        for bad in ((wanted < 0) | (wanted >= self.lengths[clips])).nonzero()[0]:
            raise IndexError(f"frame {wanted[bad]} of clip {self._keys[clips[bad]]}, which has {self.lengths[clips[bad]]}")
        if not all(self._frame_crcs[i] for i in numbers) or not (self._is_plain or self._is_compressed[numbers].all()):
            return np.concatenate([self.read(int(i))["frames"][some] for i, some in zip(numbers, frames, strict=True)])
        crcs = [np.frombuffer(bytes.fromhex(self._frame_crcs[i]), dtype="<u4")[some] for i, some in zip(numbers, frames, strict=True)]
        if self._is_plain:
            starts = self._whole.offsets[clips] + HEAD + wanted * self._frame_bytes
            sizes = np.full(len(clips), self._frame_bytes, dtype=np.int64)
        else:
            places = [self._packed_places(int(i)) for i in numbers]
            starts, sizes = (np.concatenate([place[k][some] for place, some in zip(places, frames, strict=True)]) for k in range(2))
        pieces = Pieces(self._files, self._whole.files[clips], starts, sizes, np.concatenate(crcs).astype(np.uint32))
        out = buffer.take(len(clips) * self._frame_bytes)
        if self._is_plain:
            self._read_pieces(pieces, np.arange(len(clips)), clips, out)
        else:
            packed = np.empty(int(sizes.sum()), dtype=np.uint8)
            self._read_pieces(pieces, np.arange(len(clips)), clips, packed)
            self._unpack_frames(clips, np.split(packed, np.cumsum(sizes)[:-1]), out.reshape(len(clips), -1))
        return out.reshape(-1, *self.frame_shape)

    def _packed_places(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the compressed frames of a clip are in its shard, and their sizes: int64 [T] each."""
        sizes = np.array(self._packed[i], dtype=np.int64)
        return self._whole.offsets[i] + self._whole.sizes[i] - sizes.sum() + np.cumsum(sizes) - sizes, sizes

    def _unpack_frames(self, clips: np.ndarray, packed: list[np.ndarray], out: np.ndarray) -> None:
        for i, data, frame in zip(clips, packed, out, strict=True):
            try:
                found = decompress(data.tobytes(), self._frame_bytes)
            except ValueError as error:
                raise DataError(f"a frame of clip {self._keys[i]} of {self.folder} is damaged: {error}") from error
            if len(found) != self._frame_bytes:
                raise DataError(f"a frame of clip {self._keys[i]} of {self.folder} has {len(found)} bytes instead of {self._frame_bytes}")
            frame[:] = np.frombuffer(found, dtype=np.uint8)

    def _unpacked(self, i: int, data: bytes) -> bytes:
        """The .npy file of a clip, decompressed if need be."""
        if not self._is_compressed[i]:
            return data
        try:
            return decompress(data, _LONGEST_HEAD + int(self.lengths[i]) * self._frame_bytes)
        except ValueError as error:
            raise DataError(f"clip {self._keys[i]} of {self.folder} is damaged: {error}") from error

    def _payload(self, i: int, pieces: Pieces) -> bytes:
        out = np.empty(pieces.sizes[i], dtype=np.uint8)
        self._read_pieces(pieces, np.array([i]), np.array([i]), out)
        return out.tobytes()

    def _read_pieces(self, pieces: Pieces, numbers: np.ndarray, clips: np.ndarray, out: np.ndarray) -> None:
        """Read pieces, which are of the clips `clips`."""
        shards = np.unique(self._shards_of[clips]) if len(self.shards) > self._open_limit else None
        if shards is not None and len(shards) > self._open_limit:  # more than may be open
            half = len(numbers) // 2
            size = int((pieces.sizes[numbers[:half]] - pieces.heads.shape[1]).sum())
            self._read_pieces(pieces, numbers[:half], clips[:half], out[:size])
            self._read_pieces(pieces, numbers[half:], clips[half:], out[size:])
            return
        with self._lock:
            self._reads += 1
        try:
            if shards is not None:
                with self._pinned(shards):
                    place, status = pieces.read(numbers, out)
            else:
                place, status = pieces.read(numbers, out)
                if status == errno.EBADF:  # a shard that is not open yet
                    self._open(np.unique(self._shards_of[clips]))
                    place, status = pieces.read(numbers, out)
        finally:
            with self._lock:
                self._reads -= 1
                if self._closing and not self._reads:
                    self._shut_all()
        if status:
            self._fail(int(clips[place]), status, pieces)

    @contextlib.contextmanager
    def _pinned(self, shards: np.ndarray) -> Iterator[None]:
        """These shards are open meanwhile, and only as many others as may be."""
        with self._lock:
            self._readers[shards] += 1
            self._last_use[shards] = self._last_use.max() + 1
            is_open = self._files.descriptors != _CLOSED
            idle = (is_open & (self._readers == 0)).nonzero()[0]
            idle = idle[np.argsort(self._last_use[idle])]  # the longest unused first
            self._shut(idle[: max(0, int(is_open.sum()) + int((~is_open[shards]).sum()) - self._open_limit)])
        try:
            self._open(shards)
            yield
        finally:
            with self._lock:
                self._readers[shards] -= 1

    def _open(self, shards: np.ndarray) -> None:
        for shard in shards[self._files.descriptors[shards] == _CLOSED].tolist():
            path = self._local(shard)  # fetched before the lock is taken, so that other threads go on reading
            try:
                with self._lock:
                    if self._files.descriptors[shard] == _CLOSED:
                        self._files.open(shard, path)
            except OSError as error:
                raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error

    def _local(self, shard: int) -> Path:
        """Where a shard lies on this machine, fetched if need be."""
        info = self.shards[shard]
        return self._source.path(info.name, info.bytes, info.sha256)

    def _shut(self, shards: np.ndarray) -> None:
        for shard in shards.tolist():
            self._files.close(shard)
            self._source.release(self.shards[shard].name)

    def _shut_all(self) -> None:
        self._closing = False
        self._shut((self._files.descriptors != _CLOSED).nonzero()[0])

    def _fail(self, i: int, status: int, pieces: Pieces) -> NoReturn:
        path = self.folder / self.shards[self._shards_of[i]].name
        if status == OTHER_HEAD and pieces is self._vectors:
            raise DataError(f"clip {self._keys[i]} of {self.folder} holds text vectors of another shape than its index says")
        if status == OTHER_HEAD:
            self._array(i, self._payload(i, self._whole))  # raises, and says what it holds
        if status not in (FILE_ENDS, DAMAGED):
            raise DataError(f"shard {path} cannot be read: {os.strerror(status)}")
        why = "the shard ends before it" if status == FILE_ENDS else "its checksum differs"
        raise DataError(
            f"clip {self._keys[i]} of shard {path} is damaged ({why}): "
            f"restore the shard, or remove {self.folder} and make it again with {STAGES[self.kind]}"
        )

    def _array(self, i: int, data: bytes) -> np.ndarray:
        file = io.BytesIO(data)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        ndim = 4 if self.kind == "raw" else 3
        if dtype != DTYPES[self.kind] or fortran or len(shape) != ndim or shape[0] != self.lengths[i]:
            raise DataError(f"clip {self._keys[i]} of {self.folder} holds {dtype} {list(shape)}, which is not a {self.kind} clip")
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)

    def verify(self) -> None:
        """Read every shard in full and compare its sha256 with the manifest's.

        Raises:
            DataError: the first shard that differs.
        """
        for number, shard in enumerate(self.shards):
            with self._local(number).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if self._files.descriptors[number] == _CLOSED:
                self._source.release(shard.name)
            if found != shard.sha256:
                raise DataError(
                    f"shard {self.folder / shard.name} is damaged (its sha256 differs from the manifest's): "
                    f"restore it, or remove {self.folder} and make it again with {STAGES[self.kind]}"
                )

    def close(self) -> None:
        """Close the shards, or have the last of the reads that are under way do it."""
        with self._lock:
            if self._reads:
                self._closing = True
            else:
                self._shut_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):  # absent when opening failed
            self.close()
