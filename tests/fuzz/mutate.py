"""Damaged GIFs for fuzzing: one is a function of (seeds, seed, number) and can be made again alone.

    seeds -> one of them -> 1 to 4 damages -> bytes

Damages are blind (bits, bytes, cuts, copies) or know the blocks (sizes, flags, controls, code streams, whole images).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2v_ds.data.gif import RejectedClip, parse_gif
from tests.gif_cases import cases, pack, sub_blocks

TELLING_BYTES = (0, 1, 2, 4, 7, 8, 9, 11, 12, 0x21, 0x2C, 0x3B, 0x7F, 0x80, 0xF9, 0xFE, 0xFF)
TELLING_SIZES = (0, 1, 2, 3, 15, 16, 17, 127, 255, 256, 1000, 4096, 32767, 65535)


@dataclass(frozen=True)
class Block:
    """Bytes start .. stop of a file: one extension or image; of an image also where its compressed pixels begin."""

    start: int
    stop: int
    pixels: int = 0


def walk(data: bytes | bytearray) -> list[Block]:
    """The blocks up to the first that is damaged."""
    blocks: list[Block] = []
    try:
        at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
        while data[at] in (0x21, 0x2C):
            start, pixels = at, 0
            if data[at] == 0x21:
                at += 2
            else:
                flags = data[at + 9]
                pixels = at + 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
                at = pixels + 1
            while data[at]:
                at += 1 + data[at]
            at += 1
            blocks.append(Block(start, at, pixels))
    except IndexError:
        pass
    return blocks


def own_seeds() -> list[bytes]:
    """The cases that are compared with a browser, of which none is large."""
    return [data for data in (case.encode() for case in cases()) if len(data) < 20_000]


def folder_seeds(folder: Path, longest: int = 60_000) -> list[bytes]:
    """The GIFs of a folder; of long ones as many images as `longest` bytes hold, and at least one."""
    found = []
    for path in sorted(folder.rglob("*.gif")):
        data = path.read_bytes()
        try:
            stops = [image.data[1] for image in parse_gif(data).images]
        except RejectedClip:
            stops = []
        if len(data) > longest and stops:
            data = data[: max((stop for stop in stops if stop < longest), default=stops[0])] + b";"
        if len(data) < 10 * longest:
            found.append(data)
    return found


def damage(seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """The damaged file of this number."""
    rng = random.Random(f"{seed}/{number}")
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        damaged = bytearray(data)
        rng.choice(DAMAGES)(damaged, rng, seeds)
        data = bytes(damaged)
    return data


Damage = Callable[[bytearray, random.Random, Sequence[bytes]], None]


def flip_bits(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    for _n in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_bytes(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    for _n in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(len(data))] = rng.choice(TELLING_BYTES)


def cut(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    del data[rng.randint(0, len(data)) :]
    if rng.random() < 0.3:
        data += b"\0;"


def drop_or_repeat(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    start = rng.randint(0, len(data))
    piece = data[start : start + rng.randint(1, 300)]
    data[start : start + (len(piece) if rng.random() < 0.5 else 0)] = piece * rng.choice((0, 2, 3))


def move_blocks(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    """Put a block of this or another file behind a block, in its place, or take it away."""
    other = bytes(data) if rng.random() < 0.5 else rng.choice(seeds)
    here, there = walk(data), walk(other)
    if here and there:
        target, source = rng.choice(here), rng.choice(there)
        start = target.start if rng.random() < 0.5 else target.stop
        data[start : target.stop] = other[source.start : source.stop] * rng.choice((0, 1, 1, 2, 5))


def change_sizes(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """Width or height of the screen; or place or size of an image."""
    images = [block for block in walk(data) if block.pixels]
    at = rng.choice(images).start + 1 + 2 * rng.randrange(4) if images and rng.random() < 0.8 else 6 + 2 * rng.randrange(2)
    if at + 2 <= len(data):
        near = struct.unpack_from("<H", data, at)[0] + rng.randint(-2, 2)
        struct.pack_into("<H", data, at, rng.choice((*TELLING_SIZES, near & 0xFFFF, rng.randrange(300))))


def change_flags(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """Flags of the screen or an image, disposal or transparency of a control extension, or the size of literals."""
    places = [10]
    for block in walk(data):
        places += [block.start + 9, block.pixels] if block.pixels else [block.start + 2, block.start + 3, block.start + 6]
    at = rng.choice(places)
    if at < len(data):
        data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.choice(TELLING_BYTES), rng.randrange(256)))


def damage_codes(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """Bits of compressed pixels only, so that the blocks stay whole."""
    images = [block for block in walk(data) if block.pixels and block.stop - block.pixels > 4]
    if images:
        block = rng.choice(images)
        for _n in range(rng.randint(1, 6)):
            data[rng.randrange(block.pixels + 2, block.stop - 1)] ^= rng.choice((1 << rng.randrange(8), rng.randrange(256)))


def new_control(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """A control extension in front of a block, mostly of the right length."""
    blocks = walk(data)
    if blocks:
        at = rng.choice(blocks).start
        content = bytes([rng.randrange(32), *rng.choices((0, 1, 2, 255), k=2), *rng.choices(range(16), k=3)])
        data[at:at] = b"!\xf9" + sub_blocks(content[: rng.choice((0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6))])


def new_codes(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """Random codes, nearly all allowed where they stand, and often an image of as many pixels as they give: the table gets full."""
    images = [block for block in walk(data) if block.pixels]
    if not images:
        return
    block = rng.choice(images)
    bits = rng.choice((data[block.pixels], 1, 2, 3, 8, 9)) & 15 or 8
    codes, pixels = random_codes(rng, bits)
    if rng.random() < 0.8:
        width = rng.choice((1, 2, 7, 40, 255))
        struct.pack_into("<HH", data, block.start + 5, width, min(max(pixels // width, 1), 0xFFFF))
    data[block.pixels : block.stop] = bytes([bits]) + sub_blocks(pack(codes), rng.choice((255, 255, 1, 7)))


def random_codes(rng: random.Random, bits: int) -> tuple[list[tuple[int, int]], int]:
    """Codes with their widths, and the number of pixels that they give."""
    clear = 1 << bits
    table = [1] * clear + [0, 0]  # lengths of strings
    width, last, pixels, codes = bits + 1, 0, 0, list[tuple[int, int]]()
    wrong, clears, newest, literals = rng.choice((0, 0, 0.001)), rng.choice((0, 0, 0.001, 0.05)), rng.random() ** 2, rng.random()
    for _n in range(rng.choice((10, 300, 6000))):
        if rng.random() < clears:
            code = clear
        elif rng.random() < wrong:
            code = rng.randrange(1 << width)
        elif not last or rng.random() < literals:
            code = rng.randrange(clear)
        else:  # up to the string that is only now being made, while there is room for it
            top = min(len(table), 4095)
            code = top if rng.random() < newest else rng.randint(clear + 2, top)
        codes.append((code, width))
        if code == clear:
            table, width, last = [1] * clear + [0, 0], bits + 1, 0
            continue
        made = last + 1 if last and len(table) < 4096 else 0
        last = table[code] if code < len(table) else last + 1
        pixels += last
        if made:
            table.append(made)
        width += len(table) == 1 << width and width < 12
    return [*codes, (clear + 1, width)], pixels


DAMAGES: tuple[Damage, ...] = (
    flip_bits, set_bytes, cut, drop_or_repeat, move_blocks, change_sizes, change_flags, damage_codes, new_control, new_codes, new_codes,
)  # fmt: skip
