"""Pieces of files: the compiled reader and the one in Python give the same bytes and find the same faults."""

from __future__ import annotations

import errno
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from t2v_ds.kernels import clips


@pytest.fixture(params=["compiled", "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(clips, "_library", lambda: None)
    else:
        assert clips._library() is not None
    return str(request.param)


@pytest.mark.parametrize("highest", [0, 1, 2])
def test_the_checksum_is_that_of_zlib(highest: int) -> None:
    numbers = random.Random(highest)
    for length in [*range(600), *(numbers.randrange(100_000) for _ in range(50))]:
        data, start = numbers.randbytes(length), numbers.getrandbits(32)
        assert clips.crc32(data, start, highest) == zlib.crc32(data, start), length


def pieces(path: Path, count: int = 50) -> tuple[bytes, list[np.ndarray]]:
    """A file, and offsets, sizes and checksums of pieces of it."""
    numbers = random.Random(0)
    content = numbers.randbytes(100_000)
    path.write_bytes(content)
    offsets = np.array([numbers.randrange(90_000) for _ in range(count)])
    sizes = np.array([7 + numbers.randrange(5_000) for _ in range(count)])
    crcs = np.array([zlib.crc32(content[offset : offset + size]) for offset, size in zip(offsets, sizes, strict=True)], dtype=np.uint32)
    return content, [offsets, sizes, crcs]


def table(descriptors: list[int], files: list[int], columns: list[np.ndarray], heads: list[bytes] | None = None) -> clips.Pieces:
    rest = [column.astype(dtype) for column, dtype in zip(columns, (np.int64, np.int64, np.uint32), strict=True)]
    if heads is not None:
        rest += [np.arange(len(heads), dtype=np.int32), np.array([list(head) for head in heads], dtype=np.uint8)]
    return clips.Pieces(np.array(descriptors, dtype=np.int32), np.array(files, dtype=np.int32), *rest)


@pytest.mark.parametrize("skip", [0, 7])
def test_pieces_come_one_after_another(tmp_path: Path, reader: str, skip: int) -> None:
    content, columns = pieces(tmp_path / "file")
    offsets, sizes, _ = columns
    whole = [content[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    numbers = np.array([4, 17, 4, 0, *range(20, 50)])
    out = np.full(int((sizes[numbers] - skip).sum()) + 5, 99, dtype=np.uint8)
    with (tmp_path / "file").open("rb") as file:
        one = table([-1, file.fileno()], [1] * 50, columns, [piece[:7] for piece in whole] if skip else None)
        assert one.read(numbers, out) == (0, 0)
    assert out[:-5].tobytes() == b"".join(whole[i][skip:] for i in numbers)
    assert (out[-5:] == 99).all()


def test_the_first_that_is_wrong_is_named(tmp_path: Path, reader: str) -> None:
    content, columns = pieces(tmp_path / "file", 6)
    offsets, sizes, crcs = columns
    heads = [content[offset : offset + 3] for offset in offsets]
    offsets[1] = len(content) - 3  # the file ends inside
    offsets[2] = len(content) + 9  # and before
    crcs[3] ^= 1
    heads[4] = heads[4][:2] + bytes([heads[4][2] ^ 1])
    out = np.zeros(int(sizes.sum()), dtype=np.uint8)
    write_only = os.open(tmp_path / "file", os.O_WRONLY)
    with (tmp_path / "file").open("rb") as file:
        one = table([write_only, file.fileno()], [0, 1, 1, 1, 1, 1], columns, heads)
        wrong = [one.read(np.array([5, i, 0]), out) for i in range(5)]
        assert one.read(np.array([5]), out) == (0, 0)
    os.close(write_only)
    assert wrong == [(1, errno.EBADF), (1, clips.FILE_ENDS), (1, clips.FILE_ENDS), (1, clips.DAMAGED), (1, clips.OTHER_HEAD)]


def test_nothing_is_read_or_written_outside(tmp_path: Path, reader: str) -> None:
    _, columns = pieces(tmp_path / "file", 3)
    columns[1][:] = (8, 8, 8)
    with (tmp_path / "file").open("rb") as file:
        columns[2][:] = [zlib.crc32(os.pread(file.fileno(), 8, offset)) for offset in columns[0]]
        one = table([file.fileno()], [0] * 3, columns)
        out = np.full(20, 99, dtype=np.uint8)
        with pytest.raises(ValueError, match="do not fit 15 bytes"):
            one.read(np.array([0, 1]), out[:15])
        assert (out[8:] == 99).all()
        with pytest.raises(ValueError, match="do not fit"):
            table([file.fileno()], [0] * 3, columns, [b"123456789"] * 3).read(np.array([0]), out)
        for numbers in ([-1], [0, 3]):
            with pytest.raises(IndexError, match=f"piece {numbers[-1]} of 3"):
                one.read(np.array(numbers), out)
        with pytest.raises(ValueError, match="contiguous"):
            one.read(np.array([0]), out[::2])
        assert one.read(np.empty(0, dtype=np.int64), out[:0]) == (0, 0)
    with pytest.raises(ValueError, match="int32"):
        clips.Pieces(columns[0], *columns, columns[2])
    with pytest.raises(ValueError, match=r"\[3, 2, 3, 3, 3\] pieces"):
        table([0], [0] * 3, [columns[0][:2], *columns[1:]])
