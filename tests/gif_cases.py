"""GIFs that try what decoders get wrong, written by code of their own, and the frames that a browser shows of them.

    Case: a screen and its Images -> `encode`: the file
                                  -> `draw`: the frames, from the same description; nothing is decoded

tests/unit/test_gif_browser.py proves that the drawings are what a browser shows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

COLOURS = np.array(
    [[230, 30, 40], [20, 200, 60], [40, 70, 220], [250, 220, 10], [5, 5, 5], [120, 120, 120], [200, 90, 240], [60, 230, 230]], np.uint8
)
OTHERS = 255 - COLOURS
NOISE = np.random.default_rng(7).integers(0, 256, (256, 3), dtype=np.uint8)
TRAILER = b";"


def lzw(indices: np.ndarray, bits: int, clear_first: bool = True, clear_when_full: bool = True, end: bool = True, more: int = 0) -> bytes:
    """Codes of LZW as bytes: literals of `bits` bits; `more` literals (0) behind the last pixel."""
    clear, width, following = 1 << bits, bits + 1, (1 << bits) + 2
    codes = [(clear, width)] if clear_first else []
    table: dict[tuple[int, int], int] = {}  # (code of a string, next index) -> code of both
    known = -1
    for index in [*indices.ravel().tolist(), *[0] * more]:
        longer = table.get((known, index), index if known < 0 else -1)
        if longer >= 0:
            known = longer
            continue
        codes.append((known, width))
        if following < 4096:
            table[known, index] = following
            width += following == 1 << width and width < 12
            following += 1
        elif clear_when_full:
            codes.append((clear, width))
            table, width, following = {}, bits + 1, clear + 2
        known = index
    codes.append((known, width))
    if end:  # before it, the decoder makes one more string
        codes.append((clear + 1, width + (following == 1 << width and width < 12)))
    return pack(codes)


def pack(codes: Sequence[tuple[int, int]]) -> bytes:
    """Codes and their widths, lowest bit first."""
    packed, rest, held = bytearray(), 0, 0
    for code, width in codes:
        rest |= code << held
        held += width
        while held >= 8:
            packed.append(rest & 255)
            rest >>= 8
            held -= 8
    return bytes(packed) + (bytes([rest]) if held else b"")


def sub_blocks(data: bytes, size: int = 255) -> bytes:
    """A chain of blocks of at most `size` bytes, and its end."""
    return b"".join(bytes([len(data[i : i + size])]) + data[i : i + size] for i in range(0, len(data), size)) + b"\0"


def interlaced(indices: np.ndarray) -> np.ndarray:
    """Rows in the order of an interlaced image."""
    return np.concatenate([indices[0::8], indices[4::8], indices[2::4], indices[1::2]])


@dataclass(frozen=True)
class Image:
    """One image block: palette indices [H, W] and how they are stored and shown."""

    indices: np.ndarray
    at: tuple[int, int] = (0, 0)  # left, top
    disposal: int = 0
    delay: int = 10  # hundredths of a second
    transparent: int | None = None
    palette: np.ndarray | None = None  # [colours, 3], of its own
    interlaced: bool = False
    control: bool = True  # has a graphic control extension
    before: bytes = b""  # other blocks in front
    between: bytes = b""  # other blocks between the control extension and the image
    bits: int = 3
    codes: Mapping[str, bool | int] = field(default_factory=dict)  # arguments of `lzw`
    chain: int = 255  # bytes of a sub-block
    declared: tuple[int, int] | None = None  # width and height, where they are not the indices'

    def encode(self) -> bytes:
        control = b""
        if self.control:
            packed = self.disposal << 2 | (self.transparent is not None)
            control = b"!\xf9\x04" + struct.pack("<BHBB", packed, self.delay, self.transparent or 0, 0)
        flags, table = 0x40 * self.interlaced, b""
        if self.palette is not None:
            flags |= 0x80 | (len(self.palette).bit_length() - 2)
            table = self.palette.tobytes()
        width, height = self.declared or (self.indices.shape[1], self.indices.shape[0])
        descriptor = b"," + struct.pack("<HHHHB", *self.at, width, height, flags)
        indices = interlaced(self.indices) if self.interlaced else self.indices
        pixels = bytes([self.bits]) + sub_blocks(lzw(indices, self.bits, **self.codes), self.chain)
        return self.before + control + self.between + descriptor + table + pixels


@dataclass(frozen=True)
class Case:
    """A GIF: its screen, its images, and what stands around them."""

    name: str
    images: Sequence[Image]
    screen: tuple[int, int] = (16, 12)  # width, height, as declared
    palette: np.ndarray | None = field(default_factory=lambda: COLOURS)
    background: int = 0
    version: bytes = b"GIF89a"
    end: bytes = TRAILER
    shown: tuple[int, int] | None = None  # width, height of the screen, where a browser does not take the declared one
    pillow: bool = True  # Pillow's LZW can read it

    def encode(self) -> bytes:
        flags, table = 0x70, b""
        if self.palette is not None:
            flags |= 0x80 | (len(self.palette).bit_length() - 2)
            table = self.palette.tobytes()
        screen = self.version + struct.pack("<HHBBB", *self.screen, flags, self.background, 0)
        return screen + table + b"".join(image.encode() for image in self.images) + self.end

    def draw(self) -> np.ndarray:
        """Frames [T, H, W, 3] uint8 on white, from the description."""
        width, height = self.shown or self.screen
        canvas = np.full((height, width, 3), 255, dtype=np.uint8)
        frames = []
        for image in self.images:
            left, top = image.at
            before = canvas.copy()
            part = canvas[top : top + image.indices.shape[0], left : left + image.indices.shape[1]]
            if image.declared:
                part = part[: image.declared[1], : image.declared[0]]
            indices = image.indices[: part.shape[0], : part.shape[1]]
            palette = self.palette if image.palette is None else image.palette
            colours = np.zeros((256, 3), dtype=np.uint8)  # beyond the palette: black
            if palette is not None:
                colours[: len(palette)] = palette
            seen = indices != (-1 if image.transparent is None else image.transparent)
            part[seen] = colours[indices[seen]]
            frames.append(canvas.copy())
            if image.control and image.disposal == 2:
                part[:] = 255
            elif image.control and image.disposal in (3, 4):
                canvas = before
        return np.stack(frames)

    def durations_ms(self) -> list[int]:
        """How long each frame is shown; shorter than 20 ms is shown as 100 ms."""
        delays = [10 * image.delay if image.control else 0 for image in self.images]
        return [delay if delay >= 20 else 100 for delay in delays]


def ramp(width: int, height: int, colours: int = 8, start: int = 0) -> np.ndarray:
    """Indices that differ from row to row and column to column."""
    y, x = np.mgrid[:height, :width]
    return ((x + 3 * y + start) % colours).astype(np.uint8)


def noise(width: int, height: int, colours: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, colours, (height, width), dtype=np.uint8)


def tour(second: int, third: int = 1, first: int = 1) -> list[Image]:
    """A full picture, two small ones over it with the disposals given, and two that let see what they left."""
    return [
        Image(ramp(16, 12), disposal=first),
        Image(ramp(7, 6, start=2), (2, 3), disposal=second, transparent=4),
        Image(ramp(8, 7, start=5), (5, 2), disposal=third, transparent=1),
        Image(np.zeros((1, 1), dtype=np.uint8), (0, 0), disposal=1),
        Image(ramp(3, 3), (12, 8), transparent=2),
    ]


def cases() -> Iterator[Case]:
    """Disposal, transparency and place, then palettes, times and blocks, then codes."""
    yield Case("disposal 0", tour(0, 0, 0))
    yield Case("disposal 1", tour(1))
    yield Case("disposal 2", tour(2))
    yield Case("disposal 3", tour(3))
    yield Case("disposal 4 is 3", tour(4))
    yield Case("disposal 3 twice", tour(3, 3))
    yield Case("disposal 2 then 3", tour(2, 3))
    yield Case("disposal 3 then 2", tour(3, 2))
    yield Case("first image with disposal 2", tour(1, 2, first=2))
    yield Case("first image with disposal 3", tour(1, 3, first=3))
    yield Case("disposals 5, 6 and 7 keep", tour(5, 6, first=7))
    yield Case("disposal of one image only", [
        Image(ramp(16, 12), disposal=2), Image(ramp(9, 9, start=1), (1, 1), control=False), Image(ramp(2, 2), (13, 9), control=False),
    ])  # fmt: skip
    yield Case("transparent first image", [Image(ramp(16, 12), transparent=3), Image(ramp(6, 6, start=1), (4, 4), transparent=5)])
    nothing = Image(np.full((12, 16), 2, np.uint8), transparent=2, disposal=1)
    yield Case("wholly transparent images", [nothing, Image(ramp(4, 4)), nothing])
    yield Case("first image smaller than the screen", [
        Image(ramp(5, 4), (6, 5)), Image(ramp(16, 2), (0, 10), disposal=2), Image(ramp(1, 1)),
    ])  # fmt: skip
    yield Case("images partly outside the screen", [
        Image(ramp(16, 12)), Image(ramp(10, 9, start=3), (12, 8), disposal=2), Image(ramp(20, 3), (0, 4), disposal=3), Image(ramp(1, 1)),
    ])  # fmt: skip
    yield Case("images wholly outside the screen", [
        Image(ramp(16, 12)), Image(ramp(4, 4), (16, 0), disposal=2), Image(ramp(4, 4), (3, 40), disposal=3), Image(ramp(1, 1), (1, 1)),
    ])  # fmt: skip
    yield Case("first image larger than the screen", [Image(ramp(21, 15)), Image(ramp(5, 5, start=1), (18, 12))], shown=(21, 15))
    yield Case("first image beyond the screen", [Image(ramp(16, 7), (3, 8)), Image(ramp(5, 5, start=1), (16, 12))], shown=(19, 15))
    yield Case("no screen", [Image(ramp(9, 5), (2, 1)), Image(ramp(3, 3, start=1))], screen=(0, 0), shown=(11, 6))
    yield Case("interlaced", [
        Image(ramp(16, 12), interlaced=True), Image(ramp(9, 11, start=4), (7, 1), interlaced=True, transparent=0),
        *[Image(ramp(3, height), (height, 2), interlaced=True, disposal=2) for height in (1, 2, 3, 4, 5)],
    ])  # fmt: skip
    yield Case("interlaced and outside", [Image(ramp(16, 12)), Image(ramp(16, 12, start=3), (5, 5), interlaced=True)])
    yield Case("local palettes", [
        Image(ramp(16, 12)), Image(ramp(8, 8), (2, 2), palette=OTHERS, disposal=3), Image(ramp(4, 4, 2), palette=NOISE[8:10], bits=2),
        Image(ramp(8, 8), (5, 3), palette=NOISE[:8], transparent=1), Image(ramp(4, 4), (9, 1)),
    ])  # fmt: skip
    yield Case("no global palette", [Image(ramp(16, 12), palette=OTHERS), Image(ramp(4, 4), palette=COLOURS)], palette=None)
    yield Case("no palette is black", [Image(ramp(16, 9), transparent=2), Image(ramp(5, 5, 7), (9, 5))], palette=None)
    yield Case("index beyond the palette is black", [
        Image(ramp(16, 12, 4), palette=COLOURS[:4]), Image(ramp(5, 5), (2, 2), palette=OTHERS[:4], transparent=6),
    ])  # fmt: skip
    yield Case("background colour is not shown", [
        Image(ramp(8, 8), (4, 2), disposal=2), Image(ramp(3, 3), (0, 0), disposal=2, transparent=5), Image(ramp(1, 1), (15, 11)),
    ], background=5)  # fmt: skip
    yield Case("transparent index beyond the palette", [Image(ramp(16, 12), transparent=200), Image(ramp(4, 4), transparent=8)])
    yield Case("delays", [Image(ramp(16, 12, start=n), delay=delay) for n, delay in enumerate((0, 1, 2, 3, 7, 100, 65535))])
    yield Case("87a without control", [Image(ramp(16, 12), control=False), Image(ramp(4, 4), (3, 3), control=False)], version=b"GIF87a")
    text = b"!\x01\x0c" + struct.pack("<HHHHBBBB", 0, 0, 8, 8, 8, 8, 1, 2) + sub_blocks(b"text")
    comment = b"!\xfe" + sub_blocks(b"comment" * 99)
    unknown = b"!\x42" + sub_blocks(bytes(range(256)) * 2)
    application = b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00" + b"!\xff\x0bXMP DataXMP" + sub_blocks(b"<x/>")
    yield Case("other extensions", [
        Image(ramp(16, 12), before=application + comment), Image(ramp(5, 5), (1, 1), disposal=2, between=comment, before=unknown),
        Image(ramp(5, 5), (8, 6), transparent=1, disposal=3, before=comment), Image(ramp(1, 1), before=application),
    ])  # fmt: skip
    yield Case("plain text between", [
        Image(ramp(16, 12)), Image(ramp(6, 6, start=3), (3, 3), transparent=2, disposal=2, between=text), Image(ramp(1, 1), before=text),
    ])  # fmt: skip
    other = b"!\xf9\x04" + struct.pack("<BHBB", 2 << 2 | 1, 3, 0, 0)
    yield Case("two controls for one image", [
        Image(ramp(16, 12)), Image(ramp(6, 6), (3, 3), transparent=2, disposal=1, before=other), Image(ramp(1, 1)),
    ])  # fmt: skip
    yield Case("no trailer", tour(2), end=b"")
    yield Case("bytes behind the trailer", tour(3), end=b";" + bytes(range(200)))
    yield Case("zeros before the trailer", tour(2), end=b"\0\0\0;")
    yield Case("sub-blocks of one byte", [Image(ramp(16, 12), chain=1), Image(noise(16, 12, 8, 0), chain=3)])
    yield Case("table full and cleared", [Image(noise(160, 120, 256, n), bits=8) for n in (1, 2)], (160, 120), NOISE)
    kept = {"clear_when_full": False}
    yield Case("table full and kept", [Image(noise(160, 120, 256, n), bits=8, codes=kept) for n in (3, 4)], (160, 120), NOISE)
    long = np.zeros((300, 300), dtype=np.uint8)
    long[::17, ::13] = 1
    yield Case("long strings", [Image(long, codes=kept), Image(np.zeros((300, 300), dtype=np.uint8))], (300, 300))
    yield Case("no clear code first", [Image(ramp(16, 12), codes={"clear_first": False}), Image(ramp(4, 4), codes={"clear_first": False})])
    yield Case("no end code", [Image(ramp(16, 12), codes={"end": False}), Image(ramp(4, 4), (4, 4), codes={"end": False})])
    yield Case("more pixels than the image has", [Image(ramp(16, 12), codes={"more": 40}), Image(ramp(4, 4), (4, 4), codes={"more": 1})])
    yield Case("wide literals", [Image(ramp(16, 12), bits=8), Image(ramp(4, 4), (2, 2), bits=5)])
    one = [Image(ramp(16, 12, 2), bits=1), Image(noise(9, 9, 2, 5), (2, 2), bits=1)]
    yield Case("literals of one bit", one, palette=COLOURS[:2], pillow=False)
    yield Case("no width or height", [
        Image(ramp(16, 12)), Image(ramp(5, 6, start=1), (1, 1), declared=(5, 0), disposal=2),
        Image(ramp(5, 6, start=1), (1, 1), declared=(0, 6), disposal=3), Image(ramp(1, 1, start=1), declared=(0, 0)), Image(ramp(3, 3, 2)),
    ])  # fmt: skip
    yield Case("no width or height first", [Image(ramp(16, 12), declared=(0, 0)), Image(ramp(3, 3), (2, 2))])
    yield Case("one pixel", [Image(ramp(1, 1), transparent=index) for index in (None, 0, 1)], (1, 1))


def cut_cases() -> Iterator[tuple[bytes, int]]:
    """A file cut at every byte, and the number of its whole images where it is cut between two blocks (else 0)."""
    images = tour(2)
    data = Case("", images, end=b"").encode()
    ends = {len(Case("", images[:n], end=b"").encode()): n for n in range(1, len(images) + 1)}
    ends |= {end + 8: n for end, n in ends.items()}  # behind the control extension of the next image
    for length in range(6, len(data) + 1):
        yield data[:length], ends.get(length, 0)
