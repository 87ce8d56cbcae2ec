"""Bytes of a GIF <-> frames, as a browser would show them.

    bytes -> walk the blocks (nothing is decoded or allocated yet): sizes, number of frames, delays, disposal
          -> reject what is not a GIF, cut off, too large, too short or too long
          -> frame by frame: LZW -> drawn on a white canvas -> resized -> frames [T, S, S, 3] uint8

The compiled decoder (`kernels/gif.cpp`) does this for files that are whole and usual. All others, and all where nothing is
compiled, go the slow way written here, with Pillow for LZW: it gives the same frames, and knows why a file is rejected.

Why the blocks are walked and the frames composed here and not by Pillow: Pillow keeps a frame's disposal mode for the
frames after it, and disposes to an opaque background colour where every browser shows the page. A pixel of a GIF is
either opaque or transparent, so a white canvas that transparent pixels leave alone *is* RGBA over white.

Frames are resized plainly (bilinear with antialiasing): a clip that is not square is squeezed, and nothing is cut off.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from t2v_ds.data.video import check_frames, contact_sheet, write_mp4
from t2v_ds.kernels import gif as compiled

__all__ = [
    "DecodedGif",
    "GifBlocks",
    "GifImage",
    "RejectedClip",
    "contact_sheet",
    "decode_gif",
    "encode_gif",
    "parse_gif",
    "write_mp4",
]

MAX_PIXELS = 64 * 2**20
SHORTEST_DELAY_MS = 20  # browsers show a shorter delay ...
DEFAULT_DELAY_MS = 100  # ... as this one
_TRAILER, _EXTENSION, _IMAGE = 0x3B, 0x21, 0x2C


class RejectedClip(Exception):
    """A clip that does not enter the data set: a short `reason` to count by and a `detail` to read."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives the way back from a worker process
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class DecodedGif:
    """A decoded clip: frames [T, H, W, 3] uint8 and the time that each is shown, [T] in milliseconds."""

    frames: np.ndarray
    durations_ms: list[int]
    width: int  # of the file, before resizing
    height: int


@dataclass(frozen=True)
class GifImage:
    """One image block of a GIF: where it goes, how it is shown, and where its compressed pixels lie."""

    box: tuple[int, int, int, int]  # left, top, right, bottom on the canvas
    interlaced: bool
    palette: bytes  # RGB triples: its own colour table, else the global one
    data: tuple[int, int]  # from the LZW code size to the end of the last sub-block
    delay_ms: int  # as a browser shows it
    disposal: int  # 0, 1: keep; 2: clear; 3: restore what was there
    transparent: int  # palette index; -1: none

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


@dataclass(frozen=True)
class GifBlocks:
    """What the blocks of a GIF declare."""

    width: int
    height: int
    global_palette: bytes
    loops: int | None  # of the NETSCAPE extension: 0 is forever; None: no such extension
    images: list[GifImage]


class _Reader:
    """A cursor over bytes that rejects a clip as truncated instead of reading past the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise RejectedClip("truncated", f"the file ends after {len(self.data)} bytes, inside a block")
        self.at += count
        return piece

    def byte(self) -> int:
        return self.take(1)[0]

    def sub_blocks(self) -> bytes:
        """Pass over a chain of sub-blocks; returns the first one."""
        first = self.take(self.byte())
        size = len(first)
        while size:
            size = self.byte()
            self.at += size
        return first


def parse_gif(data: bytes, max_pixels: int = MAX_PIXELS, require_trailer: bool = True) -> GifBlocks:
    """Walk the blocks of a GIF without decoding a pixel.

    Raises:
        RejectedClip: "not_a_gif", "truncated" (with `require_trailer` also where only the trailer is missing: a tail may be, too),
            "undecodable", or "too_large" when the screen or an image declares more than `max_pixels`.
    """
    if not data:
        raise RejectedClip("not_a_gif", "the file is empty")
    if data[:6] not in (b"GIF87a", b"GIF89a"):
        raise RejectedClip("not_a_gif", f"the file begins with {data[:16]!r}")
    reader = _Reader(data)
    reader.at = 6
    width, height, flags, _background, _aspect = struct.unpack("<HHBBB", reader.take(7))
    _check_pixels(width, height, max_pixels, "the file")
    global_palette = reader.take(3 << ((flags & 7) + 1)) if flags & 0x80 else b""
    images: list[GifImage] = []
    loops: int | None = None
    control = (0, 0, -1)  # delay in ms, disposal, transparent index: of the next image only
    while require_trailer or reader.at < len(data):
        kind = reader.byte()
        if kind == _TRAILER:
            break
        if kind == _EXTENSION:
            label = reader.byte()
            start = reader.at
            first = reader.sub_blocks()
            if label == 0xF9 and len(first) >= 4:
                packed, delay, transparent = struct.unpack("<BHB", first[:4])
                control = (delay * 10, (packed >> 2) & 7, transparent if packed & 1 else -1)
            elif label == 0xFF and first[:11] == b"NETSCAPE2.0" and data[start + 12 : start + 14] == b"\x03\x01":
                loops = int(struct.unpack("<H", data[start + 14 : start + 16])[0])
        elif kind == _IMAGE:
            image = _parse_image(reader, global_palette, control, max_pixels)
            if not images:  # browsers grow the screen to hold the first image, and cut later ones at its edges
                width, height = max(width, image.box[2]), max(height, image.box[3])
                _check_pixels(width, height, max_pixels, "the file")
            images.append(image)
            control = (0, 0, -1)
        elif kind != 0:  # zero bytes between blocks are padding
            raise RejectedClip("undecodable", f"byte {kind:#04x} at {reader.at - 1} where a block should begin")
    return GifBlocks(width, height, global_palette, loops, images)


def _parse_image(reader: _Reader, global_palette: bytes, control: tuple[int, int, int], max_pixels: int) -> GifImage:
    left, top, width, height, flags = struct.unpack("<HHHHB", reader.take(9))
    palette = reader.take(3 << ((flags & 7) + 1)) if flags & 0x80 else global_palette
    _check_pixels(width, height, max_pixels, "an image")
    start = reader.at
    reader.byte()  # LZW code size
    reader.sub_blocks()
    delay, disposal, transparent = control
    return GifImage(
        box=(left, top, left + width, top + height),
        interlaced=bool(flags & 0x40),
        palette=palette,
        data=(start, reader.at),
        delay_ms=delay if delay >= SHORTEST_DELAY_MS else DEFAULT_DELAY_MS,
        disposal=3 if disposal == 4 else disposal,  # an old specification numbered it so
        transparent=transparent,
    )


def _check_pixels(width: int, height: int, max_pixels: int, what: str) -> None:
    if width * height > max_pixels:
        raise RejectedClip("too_large", f"{what} declares {width} x {height} pixels; at most {max_pixels} are decoded")


def decode_gif(
    data: bytes,
    max_frames: int,
    max_pixels: int = MAX_PIXELS,
    *,
    size: int | None = None,
    min_frames: int = 1,
    require_trailer: bool = True,
) -> DecodedGif:
    """Decode a GIF as a browser shows it on a white page.

    Args:
        data: the file.
        max_frames: more are rejected as "too_long", fewer than `min_frames` as "too_short", before decoding.
        max_pixels: largest canvas; without `size`, also the largest T * H * W.
        size: resize each frame to size x size as soon as it is composed; None: keep the canvas's size.
        require_trailer: reject as "truncated" a file that ends without the trailer. A browser shows such a file, but then a file that
            was cut between two frames is shown as well: allow it for files that are known to be whole.

    Raises:
        RejectedClip: not_a_gif, truncated, undecodable, too_large, too_short, too_long.
    """
    return (
        _decode_compiled(data, max_frames, max_pixels, size, min_frames, require_trailer)
        or _decode_slowly(data, max_frames, max_pixels, size, min_frames, require_trailer)
    )  # fmt: skip


def _decode_compiled(
    data: bytes, max_frames: int, max_pixels: int, size: int | None, min_frames: int, require_trailer: bool
) -> DecodedGif | None:
    """By the compiled decoder; None for whatever it leaves to the slow way."""
    shape = compiled.shape(data, max_pixels, require_trailer)
    if shape is None or not min_frames <= shape[0] <= max_frames:
        return None
    count, height, width = shape
    if not height or not width or (size is None and count * height * width > max_pixels):
        return None
    frames = np.empty((count, size or height, size or width, 3), dtype=np.uint8)  # [T, H, W, 3]
    delays = compiled.decode(data, max_pixels, frames, size is not None, require_trailer)
    return None if delays is None else DecodedGif(frames, delays.tolist(), width, height)


def _decode_slowly(data: bytes, max_frames: int, max_pixels: int, size: int | None, min_frames: int, require_trailer: bool) -> DecodedGif:
    """By Pillow; raises as `decode_gif` does."""
    blocks = parse_gif(data, max_pixels, require_trailer)
    count = len(blocks.images)
    if count < min_frames:
        raise RejectedClip("too_short", f"{count} frames; at least {min_frames}")
    if count > max_frames:
        raise RejectedClip("too_long", f"{count} frames; at most {max_frames}")
    if blocks.width == 0 or blocks.height == 0:
        raise RejectedClip("undecodable", f"the screen is {blocks.width} x {blocks.height} pixels")
    if size is None:
        _check_pixels(blocks.width * count, blocks.height, max_pixels, f"the {count} frames together")
    width, height = (blocks.width, blocks.height) if size is None else (size, size)
    frames = np.empty((count, height, width, 3), dtype=np.uint8)  # [T, H, W, 3]
    for t, canvas in enumerate(_compose(data, blocks)):
        frames[t] = np.asarray(canvas if size is None else _resize(canvas, size))
    return DecodedGif(frames, [image.delay_ms for image in blocks.images], blocks.width, blocks.height)


def _resize(canvas: Image.Image, size: int) -> Image.Image:
    """Resize to size x size, the longer side first: Pillow's versions differ in the order, and so in rounding."""
    between = (canvas.width, size) if canvas.height > canvas.width else (size, canvas.height)
    return canvas.resize(between, Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BILINEAR)


def _compose(data: bytes, blocks: GifBlocks) -> Iterator[Image.Image]:
    """Yield the canvas after each image; the same object, drawn on again for the next."""
    canvas = Image.new("RGB", (blocks.width, blocks.height), "white")
    for t, image in enumerate(blocks.images):
        if 0 in image.size:  # shown as a frame that changes nothing, whatever its data
            yield canvas
            continue
        before = canvas.crop(image.box) if image.disposal == 3 else None
        pixels = _decode_image(data, image, t)
        mask = None
        if image.transparent >= 0:
            mask = pixels.point([0 if index == image.transparent else 255 for index in range(256)], "L")
        canvas.paste(pixels.convert("RGB"), image.box, mask)
        yield canvas
        if image.disposal == 2:
            canvas.paste("white", image.box)
        elif before is not None:
            canvas.paste(before, image.box)


def _decode_image(data: bytes, image: GifImage, t: int) -> Image.Image:
    """Decode one image block to palette indices, by giving Pillow a GIF of its own that holds nothing else."""
    bits = data[image.data[0]]
    if not 2 <= bits <= 8:  # browsers read 1 as well, which Pillow reads otherwise
        raise RejectedClip("undecodable", f"frame {t}: its palette indices are of {bits} bits")
    palette = image.palette.ljust(3 * 256, b"\0")  # indices beyond it are black; Pillow would take a short grey one for no palette
    header = b"GIF89a" + struct.pack("<HHBBB", *image.size, 0x87, 0, 0) + palette
    descriptor = b"," + struct.pack("<HHHHB", 0, 0, *image.size, 0x40 if image.interlaced else 0)
    single = header + descriptor + data[image.data[0] : image.data[1]] + b";"
    try:
        decoded = Image.open(io.BytesIO(single), formats=["GIF"])
        decoded.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, EOFError, ValueError, ... on damaged pixels
        raise RejectedClip("undecodable", f"frame {t}: {error}") from error
    return decoded


def encode_gif(frames: np.ndarray, durations_ms: Sequence[int]) -> bytes:
    """Encode frames [T, H, W, 3] uint8 as a GIF with one global palette of 256 colours that loops forever.

    Delays are kept to the GIF's hundredths of a second, rounded so that the total is right; below 20 ms a browser
    would show 100 ms, so shorter ones become 20 ms. Every frame is written whole, also one equal to the frame before.
    Written block by block here because Pillow's writer merges equal frames and gives each frame a palette of its own.
    """
    count, height, width = check_frames(frames, durations_ms)
    mosaic = Image.fromarray(np.ascontiguousarray(frames).reshape(count * height, width, 3))
    # Without the k-means pass the median cut wastes palette entries on large flat areas.
    indexed = mosaic.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    palette = bytes(indexed.getpalette("RGB") or b"")[:768].ljust(768, b"\0")
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0xF7, 0, 0), palette]
    parts.append(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # loop forever
    for t, delay in enumerate(_centiseconds(durations_ms)):
        pixels = indexed.crop((0, t * height, width, (t + 1) * height))
        parts.append(b"\x21\xf9\x04" + struct.pack("<BHBB", 1 << 2, delay, 0, 0))
        parts.append(b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + _lzw(pixels))
    return b"".join([*parts, b";"])


def _lzw(pixels: Image.Image) -> bytes:
    """The compressed pixels of a palette image, from the LZW code size to the terminator."""
    buffer = io.BytesIO()
    pixels.save(buffer, format="GIF", optimize=False, interlace=0)  # optimize would renumber the palette
    data = buffer.getvalue()
    start, stop = parse_gif(data).images[0].data
    return data[start:stop]


def _centiseconds(durations_ms: Sequence[int]) -> list[int]:
    """Delays in 1/100 s whose running total stays within half a unit of the true one."""
    delays, total, written = [], 0.0, 0
    for duration in durations_ms:
        total += max(duration, SHORTEST_DELAY_MS) / 10
        delay = min(max(round(total - written), SHORTEST_DELAY_MS // 10), 0xFFFF)
        written += delay
        delays.append(delay)
    return delays
