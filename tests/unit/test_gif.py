"""GIF bytes <-> frames: composition as in a browser, bounds, damage, and what the encoder writes."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from t2v_ds.data.gif import RejectedClip, contact_sheet, decode_gif, encode_gif, parse_gif, write_mp4

WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
PALETTE = bytes([*RED, *GREEN, *BLUE, 9, 9, 9])  # index 3 is used as transparent
SIZE = 8


def lzw(indices: np.ndarray) -> bytes:
    """Uncompressed LZW: 3-bit codes with a clear code before the table grows; independent of the code under test."""
    codes = []
    for n, index in enumerate(indices.ravel()):
        if n % 2 == 0:
            codes.append(4)
        codes.append(int(index))
    codes.append(5)
    bits = sum(code << (3 * n) for n, code in enumerate(codes))
    data = bits.to_bytes((3 * len(codes) + 7) // 8, "little")
    blocks = [data[i : i + 255] for i in range(0, len(data), 255)]
    return b"\x02" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def image(
    indices: np.ndarray, at: tuple[int, int] = (0, 0), delay: int = 10, disposal: int = 0, transparent: bool = True, palette: bytes = b""
) -> bytes:
    """One frame: delay in hundredths of a second, `at` = (left, top)."""
    height, width = indices.shape
    control = b"!\xf9\x04" + struct.pack("<BHBB", disposal << 2 | transparent, delay, 3, 0)
    flags = 0x81 if palette else 0
    return control + b"," + struct.pack("<HHHHB", *at, width, height, flags) + palette + lzw(indices)


def gif(*images: bytes, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", *size, 0x81, 0, 0) + PALETTE + b"".join(images) + b";"


def full(index: int, size: int = SIZE) -> np.ndarray:
    return np.full((size, size), index, dtype=np.uint8)


@pytest.mark.parametrize(("disposal", "under"), [(0, GREEN), (1, GREEN), (2, WHITE), (3, RED), (4, RED)])
def test_disposal_decides_what_lies_under_the_next_frame(disposal: int, under: tuple[int, int, int]) -> None:
    data = gif(image(full(0)), image(full(1, 4), at=(2, 2), disposal=disposal), image(full(2, 1)))
    frames = decode_gif(data, 40).frames
    assert tuple(frames[1, 3, 3]) == GREEN
    assert tuple(frames[1, 0, 0]) == RED
    assert tuple(frames[2, 3, 3]) == under
    assert tuple(frames[2, 7, 7]) == RED
    assert tuple(frames[2, 0, 0]) == BLUE


def test_disposal_is_of_one_frame_only() -> None:
    """Pillow applies a frame's disposal to the following frames that state none."""
    data = gif(image(full(0), disposal=2), image(full(1, 4)), image(full(2, 1), at=(7, 7)))
    assert tuple(decode_gif(data, 40).frames[2, 0, 0]) == GREEN


def test_transparent_pixels_show_the_frame_before_and_then_white() -> None:
    hole = full(1)
    hole[:4] = 3
    frames = decode_gif(gif(image(hole), image(full(3)), image(hole, transparent=False)), 40).frames
    assert tuple(frames[0, 0, 0]) == WHITE
    assert tuple(frames[0, 7, 0]) == GREEN
    assert (frames[1] == frames[0]).all()
    assert tuple(frames[2, 0, 0]) == (9, 9, 9)


def test_local_palette_interlacing_and_parts_outside_the_screen() -> None:
    local = bytes([1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0])
    rows = np.arange(SIZE, dtype=np.uint8)[:, None].repeat(SIZE, 1) % 3
    stored = np.concatenate([rows[0::8], rows[4::8], rows[2::4], rows[1::2]])
    part = bytearray(image(stored))
    part[8 + 9] |= 0x40
    frames = decode_gif(gif(image(full(0)), image(full(1), at=(6, 6), palette=local), bytes(part)), 40).frames
    assert frames.shape == (3, SIZE, SIZE, 3)
    assert tuple(frames[1, 7, 7]) == (4, 5, 6)
    assert tuple(frames[1, 5, 5]) == RED
    colours = np.array([RED, GREEN, BLUE])
    assert (frames[2] == colours[rows]).all()


def test_delays_as_browsers_show_them() -> None:
    assert decode_gif(gif(*(image(full(0), delay=delay) for delay in (0, 1, 2, 7))), 40).durations_ms == [100, 100, 20, 70]


def test_resizes_each_frame() -> None:
    half = full(0)
    half[:, 4:] = 2
    frames = decode_gif(gif(image(half)), 40, size=4).frames
    assert frames.shape == (1, 4, 4, 3)
    assert tuple(frames[0, 0, 0]) == RED
    assert tuple(frames[0, 0, 3]) == BLUE


GOOD = gif(*(image(full(n % 3)) for n in range(5)))


def reason(data: bytes, **bounds: int) -> str:
    with pytest.raises(RejectedClip) as caught:
        decode_gif(data, **{"max_frames": 40, **bounds})
    return caught.value.reason


def test_rejects_with_the_right_reason() -> None:
    assert reason(b"") == "not_a_gif"
    assert reason(b"<!DOCTYPE html><html>404</html>") == "not_a_gif"
    assert reason(GOOD, max_frames=4) == "too_long"
    assert reason(GOOD, min_frames=6) == "too_short"
    few = image(full(0, 2))  # a screen's worth declared, pixels for 2 x 2
    few = few[:8] + b"," + struct.pack("<HHHHB", 0, 0, SIZE, SIZE, 0) + few[18:]
    assert reason(gif(few)) == "undecodable"
    assert reason(gif(b"\x42" + image(full(0)))) == "undecodable"
    pixels = bytearray(GOOD)
    start = parse_gif(GOOD).images[2].data[0]
    pixels[start + 2 : start + 12] = b"\xff" * 10
    assert reason(bytes(pixels)) == "undecodable"


def test_a_cut_file_is_rejected_wherever_it_is_cut() -> None:
    for length in range(6, len(GOOD)):
        assert reason(GOOD[:length]) == "truncated", length


def test_bombs_are_rejected_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(Image, "new", forbidden)
    monkeypatch.setattr(np, "empty", forbidden)
    assert reason(gif(image(full(0)), size=(65535, 65535))) == "too_large"
    inner = bytearray(image(full(0)))
    inner[8 + 5 : 8 + 9] = b"\xff\xff\xff\xff"  # a small screen, and an image block that declares 65535 x 65535
    assert reason(gif(bytes(inner))) == "too_large"
    assert reason(GOOD, max_pixels=4 * SIZE * SIZE) == "too_large"  # fits one by one, not together


def test_a_rejection_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(RejectedClip("too_long", "59 frames")))
    assert (error.reason, error.detail) == ("too_long", "59 frames")


def clip(count: int = 6, height: int = 24, width: int = 32) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([x * 8 % 256, y * 10 % 256, np.full_like(x, 40 * t)], -1) for t in range(count)]
    return np.array(frames, dtype=np.uint8)


def test_encodes_with_one_palette_every_frame_and_every_delay() -> None:
    frames = clip()
    frames[3] = frames[2]  # Pillow's writer would merge these two
    durations = [50, 60, 70, 80, 330, 40]
    blocks = parse_gif(encode_gif(frames, durations))
    assert blocks.loops == 0
    assert len(blocks.global_palette) == 768
    assert [image.delay_ms for image in blocks.images] == durations
    assert all(image.palette == blocks.global_palette for image in blocks.images)
    decoded = decode_gif(encode_gif(frames, durations), 40)
    assert np.abs(decoded.frames.astype(int) - frames).mean() < 8
    assert (decoded.frames[3] == decoded.frames[2]).all()
    with Image.open(io.BytesIO(encode_gif(frames, durations))) as other:  # another reader agrees
        assert other.n_frames == 6
        other.seek(5)
        assert (np.asarray(other.convert("RGB")) == decoded.frames[5]).all()


def test_few_colours_are_kept_exactly() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (100, 3), dtype=np.uint8)
    frames = colours[np.random.default_rng(1).integers(0, 100, (4, 16, 16))]
    assert (decode_gif(encode_gif(frames, [100] * 4), 40).frames == frames).all()


def test_delays_between_hundredths_keep_the_total() -> None:
    blocks = parse_gif(encode_gif(clip(6), [33, 33, 34, 33, 33, 34]))
    assert sum(image.delay_ms for image in blocks.images) == 200
    short = parse_gif(encode_gif(clip(2), [1, 1]))
    assert [image.delay_ms for image in short.images] == [20, 20]


@pytest.mark.parametrize("size", [(24, 32), (17, 31)])
def test_mp4_has_every_frame_at_its_time(tmp_path: Path, size: tuple[int, int]) -> None:
    frames, durations = clip(6, *size), [50, 60, 70, 200, 30, 40]
    write_mp4(tmp_path / "x.mp4", frames, durations)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
        length = float(stream.duration * stream.time_base)
    assert [round(float(frame.time) * 1000) for frame in decoded] == [0, 50, 110, 180, 380, 410]
    assert length == pytest.approx(0.45, abs=0.002)
    shown = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])[:, : size[0], : size[1]]
    assert np.abs(shown.astype(int) - frames).mean() < 12  # yuv420p halves the colour's resolution
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_contact_sheet_shows_first_to_last_frame_under_each_caption() -> None:
    frames = np.stack([np.full((16, 16, 3), t * 10, dtype=np.uint8) for t in range(20)])
    sheet = contact_sheet([frames, frames[:3]], ["a caption " * 20, "b"], columns=4)
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3
    row = sheet[4 + 19 + 8]
    assert [int(row[4 + 20 * column + 8, 0]) for column in range(4)] == [0, 60, 130, 190]
    assert (sheet[4:21] < 100).any()  # text
    with pytest.raises(ValueError, match="2 clips"):
        contact_sheet([frames, frames], ["one"])
