"""Pieces of files -> one buffer, checked: by the compiled reader of `clips.cpp`, or by Python to the same bytes."""

from __future__ import annotations

import ctypes
import errno
import os
import zlib
from functools import cache

import numpy as np

from . import build

SWITCH = "T2V_CLIPS"  # environment variable: "python" keeps the compiled reader out, "pread" mappings
FILE_ENDS, DAMAGED, OTHER_HEAD, _DOES_NOT_FIT, _NOT_THERE = range(10001, 10006)  # beside the operating system's error numbers


def available() -> bool:
    """Whether the compiled reader is loaded now; says once, by its reason, if not."""
    return _library() is not None


class Files:
    """Files that pieces are read from: open or not, and mapped where that is faster.

    Attributes:
        descriptors: int32 [F]; -1: not open.
    """

    def __init__(self, count: int) -> None:
        self.descriptors = np.full(count, -1, dtype=np.int32)
        self.mapped, self.bytes = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.int64)

    def open(self, number: int, path: str | os.PathLike[str]) -> None:
        """Open a file that is not open.

        Raises:
            OSError: it cannot be opened.
        """
        descriptor = os.open(path, os.O_RDONLY)
        if (library := _library()) and os.environ.get(SWITCH) != "pread":
            self.bytes[number] = os.fstat(descriptor).st_size
            self.mapped[number] = library.t2v_map(descriptor, int(self.bytes[number])) or 0
        self.descriptors[number] = descriptor  # last: other threads read what has one

    def close(self, number: int) -> None:
        """Close a file that nothing is read from now."""
        descriptor, mapped = int(self.descriptors[number]), int(self.mapped[number])
        self.descriptors[number], self.mapped[number] = -1, 0
        if mapped and (library := _library()):
            library.t2v_unmap(mapped, int(self.bytes[number]))
        os.close(descriptor)


class Pieces:
    """A table of pieces of files.

    Args:
        opened: the files; which of them are open may change.
        files: int32 [N], which of them each piece is in.
        offsets, sizes: int64 [N], in bytes.
        crcs: uint32 [N], zlib's CRC-32.
        head_of, heads: int32 [N] and uint8 [H, S]: the first S bytes of piece i must be heads[head_of[i]]; they are not part of what is
            read. Without them, pieces are read whole.

    Raises:
        ValueError: types or lengths that do not fit.
    """

    def __init__(
        self,
        opened: Files,
        files: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        crcs: np.ndarray,
        head_of: np.ndarray | None = None,
        heads: np.ndarray | None = None,
    ) -> None:
        if head_of is None or heads is None:
            head_of, heads = np.zeros(len(files), dtype=np.int32), np.empty((1, 0), dtype=np.uint8)
        self.opened, self.files, self.offsets, self.sizes, self.crcs = opened, files, offsets, sizes, crcs
        self.head_of, self.heads = head_of, heads
        columns = {np.int32: (files, head_of), np.int64: (offsets, sizes), np.uint32: (crcs,), np.uint8: (heads.reshape(-1),)}
        for dtype, arrays in columns.items():
            for array in arrays:
                if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
                    raise ValueError(f"a column is {array.dtype} {list(array.shape)}; needs contiguous {np.dtype(dtype)} [N]")
        lengths = [len(array) for array in (files, offsets, sizes, crcs, head_of)]
        if len(set(lengths)) != 1:
            raise ValueError(f"the columns hold {lengths} pieces; needs the same number")
        arrays = (opened.descriptors, opened.mapped, opened.bytes, files, offsets, sizes, crcs, head_of, heads)
        # Addresses are taken once: looking one up takes as long as checking some kilobytes.
        self._table = (*(array.ctypes.data for array in arrays), heads.shape[1], len(files))

    def read(self, numbers: np.ndarray, out: np.ndarray) -> tuple[int, int]:
        """Read pieces to `out`, one after another, and check them; the GIL is free meanwhile.

        Args:
            numbers: int64 [M], of the pieces.
            out: uint8 [R], contiguous.

        Returns:
            (0, 0), or for the first piece that cannot be read its place in `numbers` and what is wrong: an error number of the operating
            system, FILE_ENDS, DAMAGED (its checksum differs) or OTHER_HEAD.

        Raises:
            ValueError: the pieces do not fit `out`.
            IndexError: there is no such piece.
        """
        if numbers.dtype != np.int64 or not numbers.flags.c_contiguous or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"needs contiguous int64 numbers and uint8 output, not {numbers.dtype} and {out.dtype}")
        if library := _library():
            found = library.t2v_read_pieces(*self._table, numbers.ctypes.data, len(numbers), out.ctypes.data, out.size)
            place, status = found >> 16, found & 0xFFFF
        else:
            place, status = self._read_by_python(numbers.tolist(), out)
        if status == _NOT_THERE:
            raise IndexError(f"piece {numbers[place]} of {len(self.files)}")
        if status == _DOES_NOT_FIT:
            raise ValueError(f"pieces of {self.sizes[numbers].tolist()} bytes do not fit {out.size} bytes")
        return place, status

    def _read_by_python(self, numbers: list[int], out: np.ndarray) -> tuple[int, int]:
        """As t2v_read_pieces."""
        skip = self.heads.shape[1]
        head = np.empty(skip, dtype=np.uint8)
        for place, i in enumerate(numbers):
            if not 0 <= i < len(self.files):
                return place, _NOT_THERE
            size = int(self.sizes[i]) - skip
            if not 0 <= size <= len(out):
                return place, _DOES_NOT_FIT
            status = _read(int(self.opened.descriptors[self.files[i]]), int(self.offsets[i]), head, out[:size], int(self.crcs[i]))
            if not status and head.tobytes() != self.heads[self.head_of[i]].tobytes():
                status = OTHER_HEAD
            if status:
                return place, status
            out = out[size:]
        return 0, 0


def crc32(data: bytes, value: int = 0, highest: int = 2) -> int:
    """zlib.crc32, faster; `highest` keeps instruction sets out (0: tables, 1: 128 bits, 2: 512 bits)."""
    library = _library()
    return zlib.crc32(data, value) if library is None else int(library.t2v_crc32(value, data, len(data), highest))


def _read(descriptor: int, offset: int, head: np.ndarray, body: np.ndarray, crc: int) -> int:
    """Read one piece and compare its checksum."""
    whole = [memoryview(part.data) for part in (head, body)]
    parts = [part for part in whole if part.nbytes]
    try:
        while parts:
            got = os.preadv(descriptor, parts, offset)
            if got == 0:
                return FILE_ENDS
            offset += got
            while parts and got >= parts[0].nbytes:
                got -= parts.pop(0).nbytes
            if got:
                parts[0] = parts[0][got:]
    except OSError as error:
        return error.errno or errno.EIO
    return 0 if zlib.crc32(whole[1], zlib.crc32(whole[0])) == crc else DAMAGED


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled reader; says once, by its reason, if there is none."""
    library = build.load_plain("CLIPS", f"{SWITCH}=python", "shards are read by Python, to the same bytes but slower")
    if library is not None:
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        library.t2v_map.argtypes, library.t2v_map.restype = [ctypes.c_int, integer], pointer
        library.t2v_unmap.argtypes, library.t2v_unmap.restype = [pointer, integer], None
        library.t2v_read_pieces.argtypes = [*[pointer] * 9, integer, integer, pointer, integer, pointer, integer]
        library.t2v_read_pieces.restype = integer
        library.t2v_crc32.argtypes = [ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
        library.t2v_crc32.restype = ctypes.c_uint32
    return library
