"""A tar file, strictly: every byte is a member's, padding or the end marker, or it is reported as damage.

    file -> walk -> Member (name, offset, payload) | Damage (what, where, why), in the order of the file

Python's `tarfile` ends quietly at the first header that it cannot read, and whatever lies behind is lost. Here reading goes on at
the next block that is a header with the right checksum, and what lies between is damage. ustar, PAX and GNU headers are understood.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_MAGIC = b"ustar"
_MAGIC_AT = 257
_SEARCH = 2048 * BLOCK  # bytes searched at a time
_FILES = (b"0", b"\0", b"7")
_FOLDER, _PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"5", b"x", b"g", b"L", b"K"
_OTHERS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass(frozen=True)
class Member:
    """A file in the tar."""

    name: str
    offset: int  # of its first byte
    payload: bytes


@dataclass(frozen=True)
class Damage:
    """Bytes of no readable member."""

    name: str  # of the member that is hit; empty where it is unknown
    offset: int
    size: int
    reason: str  # a word to count by
    detail: str
    is_cut: bool = False  # the file ends early: how many members are lost cannot be told


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    type: bytes


def walk(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Read the first `size` bytes of a tar file from its start to its end.

    Raises:
        OSError: the file cannot be read.
    """
    place, renamed = 0, _Extended()
    while place + BLOCK <= size:
        block = _read(file, place, BLOCK)
        if not any(block):
            at_end = _end(file, place, size)
            if at_end is not None:
                yield at_end
            if at_end is None or at_end.is_cut or at_end.offset + at_end.size == size:
                return
            place, renamed = at_end.offset + at_end.size, _Extended()
            continue
        try:
            header = _parse(block)
            data = place + BLOCK
            behind = data + -(-header.size // BLOCK) * BLOCK  # the last payload may lack its padding where the file is cut
            if header.type in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK) and behind <= size:
                renamed.add(header.type, _read(file, data, header.size))
                place = behind
                continue
            header = renamed.apply(header)
        except ValueError as error:
            item: Member | Damage = _lost(file, place, size, "", "tar_header", str(error))
        else:
            item = _member(file, place, size, header)
        renamed = _Extended()
        yield item
        if isinstance(item, Damage):
            if item.is_cut:
                return
            place = item.offset + item.size
        else:
            place = data + -(-header.size // BLOCK) * BLOCK if header.type != _FOLDER else data
    yield Damage("", place, max(0, size - place), "cut", f"it ends at byte {size} without the end marker of a tar", is_cut=True)


def _member(file: BinaryIO, place: int, size: int, header: _Header) -> Member | Damage:
    """The member whose header is at `place`."""
    data = place + BLOCK
    if header.type not in (*_FILES, _FOLDER):
        what = _OTHERS.get(header.type, f"of type {header.type.decode('latin-1')!r}")
        length = 0 if header.type in _OTHERS else -(-header.size // BLOCK) * BLOCK
        return Damage(header.name, place, min(BLOCK + length, size - place), "not_a_file", f"member {header.name} is {what}, not a file")
    if header.type == _FOLDER:
        return Member(header.name.rstrip("/") + "/", data, b"")
    if data + header.size > size:
        return _lost(file, place, size, header.name, "size", f"member {header.name} of {header.size} bytes goes beyond the end of the file")
    payload = _read(file, data, header.size)
    hidden = _find_header(payload)
    if hidden is not None:
        detail = f"member {header.name} of {header.size} bytes covers the header of another member"
        return Damage(header.name, place, BLOCK + hidden, "size", detail)
    return Member(header.name, data, payload)


def _lost(file: BinaryIO, place: int, size: int, name: str, reason: str, detail: str) -> Damage:
    """Damage from `place` to the next header; a cut if there is none, as nobody knows what was there."""
    start = place + BLOCK
    while start < size:
        chunk = _read(file, start, min(_SEARCH, size - start))
        found = _find_header(chunk)
        if found is not None:
            return Damage(name, place, start + found - place, reason, f"{detail} (at byte {place})")
        start += len(chunk)
    return Damage(name, place, size - place, "cut" if reason == "size" else reason, f"{detail} (at byte {place})", is_cut=True)


def _end(file: BinaryIO, place: int, size: int) -> Damage | None:
    """What is wrong with the end marker at `place`: two blocks of zeros or more, and nothing but zeros behind them."""
    other = start = place
    while start < size:
        chunk = _read(file, start, min(_SEARCH, size - start))
        other = start + len(chunk) - len(chunk.lstrip(b"\0"))
        if other < start + len(chunk):
            break
        start += len(chunk)
    if other == size:
        if size - place >= 2 * BLOCK:
            return None
        return Damage("", place, size - place, "cut", f"the end marker at byte {place} is cut", is_cut=True)
    damage = _lost(file, other // BLOCK * BLOCK - BLOCK, size, "", "zeros", "zeros where a header should be, and members behind them")
    if damage.is_cut:
        detail = f"{size - other} bytes that are no member behind the end marker (at byte {other})"
        return Damage("", other, size - other, "trailing", detail)
    return Damage("", place, damage.offset + damage.size - place, "zeros", f"{damage.detail.partition(' (at')[0]} (at byte {place})")


def _find_header(data: bytes) -> int | None:
    """Offset of the first block that is a header with the right checksum."""
    at = data.find(_MAGIC)
    while at >= 0:
        start = at - _MAGIC_AT
        if start >= 0 and start % BLOCK == 0 and _has_checksum(data[start : start + BLOCK]):
            return start
        at = data.find(_MAGIC, at + 1)
    return None


def _has_checksum(block: bytes) -> bool:
    try:
        return len(block) == BLOCK and _number(block[148:156]) == sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    except ValueError:
        return False


def _parse(block: bytes) -> _Header:
    if block[_MAGIC_AT : _MAGIC_AT + 5] != _MAGIC:
        raise ValueError("a block that is no tar header")
    if not _has_checksum(block):
        raise ValueError("a header whose checksum is wrong")
    name = _text(block[:100])
    if block[262:263] == b"\0" and (prefix := _text(block[345:500])):  # GNU keeps other things there
        name = f"{prefix}/{name}"
    try:
        return _Header(name, _number(block[124:136]), block[156:157])
    except ValueError:
        raise ValueError(f"the header of member {name} has a size that is no number") from None


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary number where they do not suffice."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        raise ValueError(f"{field!r} is not octal")
    return int(digits, 8)


def _text(field: bytes) -> str:
    try:
        return field.partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        raise ValueError(f"the name {field.partition(bytes(1))[0]!r} is not UTF-8") from None


class _Extended:
    """What PAX and GNU headers say about the member behind them."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._size: int | None = None

    def add(self, kind: bytes, payload: bytes) -> None:
        """Read one such header."""
        if kind == _LONG_NAME:
            self._name = _text(payload)
        if kind not in (_PAX, _PAX_GLOBAL):
            return
        while payload:
            digits = payload.partition(b" ")[0]
            length = int(digits) if digits.isdigit() else 0
            if not len(digits) < length <= len(payload) or payload[length - 1 : length] != b"\n":
                raise ValueError("a PAX header that cannot be read")
            key, equals, value = payload[len(digits) + 1 : length - 1].partition(b"=")
            if not equals or key.startswith(b"GNU.sparse") or (kind == _PAX_GLOBAL and key in (b"path", b"size")):
                raise ValueError(f"a PAX header with {key.decode('latin-1')!r}")
            if key == b"path":
                self._name = _text(value)
            if key == b"size":
                self._size = int(value) if value.isdigit() else _number(b"x")
            payload = payload[length:]

    def apply(self, header: _Header) -> _Header:
        """The header as they change it."""
        return _Header(self._name or header.name, header.size if self._size is None else self._size, header.type)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise OSError(f"{len(data)} bytes at {offset} instead of {size}: it became shorter meanwhile")
    return data
