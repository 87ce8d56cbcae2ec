"""Pieces of files: the compiled reader and the one in Python give the same bytes and find the same faults."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from t2v_ds.kernels import clips


@pytest.fixture(params=["mapped", "pread", "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(clips, "_library", lambda: None)
    else:
        assert clips._library() is not None
    if request.param == "pread":
        monkeypatch.setenv(clips.SWITCH, "pread")
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


def table(path: Path, columns: list[np.ndarray], heads: list[bytes] | None = None, file: int = 1) -> clips.Pieces:
    """Pieces of the second of two files, of which the first is not open."""
    rest = [column.astype(dtype) for column, dtype in zip(columns, (np.int64, np.int64, np.uint32), strict=True)]
    if heads is not None:
        rest += [np.arange(len(heads), dtype=np.int32), np.array([list(head) for head in heads], dtype=np.uint8)]
    files = clips.Files(2)
    files.open(1, path)
    return clips.Pieces(files, np.full(len(columns[0]), file, dtype=np.int32), *rest)


@pytest.mark.parametrize("skip", [0, 7])
def test_pieces_come_one_after_another(tmp_path: Path, reader: str, skip: int) -> None:
    content, columns = pieces(tmp_path / "file")
    offsets, sizes, _ = columns
    whole = [content[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    numbers = np.array([4, 17, 4, 0, *range(20, 50)])
    out = np.full(int((sizes[numbers] - skip).sum()) + 5, 99, dtype=np.uint8)
    one = table(tmp_path / "file", columns, [piece[:7] for piece in whole] if skip else None)
    assert bool(one.opened.mapped[1]) == (reader == "mapped")
    assert one.read(numbers, out) == (0, 0)
    assert out[:-5].tobytes() == b"".join(whole[i][skip:] for i in numbers)
    assert (out[-5:] == 99).all()
    one.opened.close(1)
    assert one.read(numbers, out) == (0, errno.EBADF)


def test_the_first_that_is_wrong_is_named(tmp_path: Path, reader: str) -> None:
    content, columns = pieces(tmp_path / "file", 6)
    offsets, sizes, crcs = columns
    heads = [content[offset : offset + 3] for offset in offsets]
    offsets[1] = len(content) - 3  # the file ends inside
    offsets[2] = len(content) + 9  # and before
    crcs[3] ^= 1
    heads[4] = heads[4][:2] + bytes([heads[4][2] ^ 1])
    out = np.zeros(int(sizes.sum()), dtype=np.uint8)
    one = table(tmp_path / "file", columns, heads)
    wrong = [one.read(np.array([5, i, 0]), out) for i in range(1, 5)]
    assert wrong == [(1, clips.FILE_ENDS), (1, clips.FILE_ENDS), (1, clips.DAMAGED), (1, clips.OTHER_HEAD)]
    assert one.read(np.array([5]), out) == (0, 0)
    assert table(tmp_path / "file", columns, heads, file=0).read(np.array([5]), out) == (0, errno.EBADF)


def test_nothing_is_read_or_written_outside(tmp_path: Path, reader: str) -> None:
    content, columns = pieces(tmp_path / "file", 3)
    columns[1][:] = (8, 8, 8)
    columns[2][:] = [zlib.crc32(content[offset : offset + 8]) for offset in columns[0]]
    one = table(tmp_path / "file", columns)
    out = np.full(20, 99, dtype=np.uint8)
    with pytest.raises(ValueError, match="do not fit 15 bytes"):
        one.read(np.array([0, 1]), out[:15])
    assert (out[8:] == 99).all()
    with pytest.raises(ValueError, match="do not fit"):
        table(tmp_path / "file", columns, [b"123456789"] * 3).read(np.array([0]), out)
    for numbers in ([-1], [0, 3]):
        with pytest.raises(IndexError, match=f"piece {numbers[-1]} of 3"):
            one.read(np.array(numbers), out)
    with pytest.raises(ValueError, match="contiguous"):
        one.read(np.array([0]), out[::2])
    assert one.read(np.empty(0, dtype=np.int64), out[:0]) == (0, 0)
    with pytest.raises(ValueError, match="int32"):
        clips.Pieces(one.opened, columns[0], *columns)
    with pytest.raises(ValueError, match=r"\[2, 2, 3, 3, 2\] pieces"):
        table(tmp_path / "file", [columns[0][:2], *columns[1:]])


@pytest.mark.parametrize("offset", [-100_000, 2**63 - 100, -(2**63), 99_999])
def test_an_offset_outside_the_file_is_an_error(tmp_path: Path, reader: str, offset: int) -> None:
    _, columns = pieces(tmp_path / "file", 1)
    columns[0][:] = offset
    _, status = table(tmp_path / "file", columns).read(np.array([0]), np.empty(9000, dtype=np.uint8))
    assert status in (errno.EINVAL, errno.EOVERFLOW, clips.FILE_ENDS)


def test_a_file_that_has_grown_since_it_was_opened_is_read(tmp_path: Path, reader: str) -> None:
    content, columns = pieces(tmp_path / "file")
    (tmp_path / "file").write_bytes(content[:100])
    one, out = table(tmp_path / "file", columns), np.empty(9000, dtype=np.uint8)
    assert one.read(np.array([3]), out) == (0, clips.FILE_ENDS)
    (tmp_path / "file").write_bytes(content)
    assert one.read(np.array([3]), out) == (0, 0)


CUT = """
import faulthandler, mmap, os, sys, zlib
import numpy as np
from t2v_ds.kernels import clips
path, at = sys.argv[1], int(sys.argv[2])
size = 40 * mmap.PAGESIZE
content = np.random.default_rng(0).bytes(size)
with open(path, "wb") as file:
    file.write(content)
files = clips.Files(1)
files.open(0, path)
assert files.mapped[0]
half = size // 2
crcs = np.array([zlib.crc32(content[:half]), zlib.crc32(content[half:])], dtype=np.uint32)
pieces = clips.Pieces(files, np.zeros(2, dtype=np.int32), np.array([0, half]), np.full(2, half), crcs)
out = np.empty(size, dtype=np.uint8)
assert pieces.read(np.array([0, 1]), out) == (0, 0)
faulthandler.enable()  # takes the signal
os.truncate(path, at)
for _ in range(3):
    assert pieces.read(np.array([0, 1]), out) == (1, clips.FILE_ENDS), pieces.read(np.array([0, 1]), out)
    assert out[:half].tobytes() == content[:half]
print("read on", flush=True)
with open(path, "rb") as file:
    other = mmap.mmap(file.fileno(), at, prot=mmap.PROT_READ)
os.truncate(path, 0)
print(other[0])
"""


@pytest.mark.parametrize("at", [30 * 4096, 30 * 4096 + 100])
def test_a_file_that_is_cut_while_it_is_mapped_is_an_error(tmp_path: Path, at: int) -> None:
    """And whoever else touches a page that is gone dies as before, with the report of who handled that."""
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(tmp_path / "file"), str(at)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "read on\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr
