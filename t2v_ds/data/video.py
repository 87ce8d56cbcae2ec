"""Frames -> the other things that people look at: an MP4 file and a contact sheet."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from t2v_ds.files import write_atomically

_MARGIN = 4  # pixels around the tiles of a contact sheet
_FONT_SIZE = 13


def write_mp4(path: str | Path, frames: np.ndarray, durations_ms: Sequence[int]) -> None:
    """Write frames [T, H, W, 3] uint8 as an MP4 (H.264 where the installed PyAV has it, else MPEG-4), each shown for its duration.

    An odd height or width is padded by one row or column, as yuv420p needs. The file appears only when whole.
    """
    import av  # slow to import, and needed by nothing else here

    count, height, width = check_frames(frames, durations_ms)
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codec.codecs_available else "mpeg4"
    milliseconds = Fraction(1, 1000)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with av.open(str(temporary), "w", format="mp4") as container:
        # The rate only guides the encoder: every frame carries its own time.
        stream = container.add_stream(codec, rate=max(1, round(1000 * count / max(1, sum(durations_ms)))))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = padded.shape[2], padded.shape[1], "yuv420p"
        stream.codec_context.time_base = milliseconds
        # No B-frames: they would reorder packets, and the durations below are given to packets in order.
        stream.codec_context.max_b_frames = 0
        if codec == "libx264":
            stream.options = {"crf": "16"}
        else:
            stream.bit_rate = 8 * padded.shape[1] * padded.shape[2] * 10
        packets: list[Any] = []
        at = 0
        for frame, duration in zip(padded, durations_ms, strict=True):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = at, milliseconds
            packets += stream.encode(picture)
            at += duration
        packets += stream.encode(None)
        for packet, duration in zip(packets, durations_ms, strict=True):
            packet.duration = int(duration * milliseconds / packet.time_base)
            container.mux(packet)
    os.replace(temporary, path)


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write an image uint8 [H, W, 3]."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def contact_sheet(clips: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8) -> np.ndarray:
    """Draw one row a clip: its caption and under it `columns` evenly spaced frames.

    Args:
        clips: frames [T, H, W, 3] uint8 each; sizes may differ.
        captions: one a clip; cut with an ellipsis where the row is too narrow.

    Returns:
        the picture, [H, W, 3] uint8.
    """
    if not clips or len(clips) != len(captions) or columns < 1:
        raise ValueError(f"{len(clips)} clips, {len(captions)} captions, {columns} columns")
    font = ImageFont.load_default(_FONT_SIZE)
    text_height = _FONT_SIZE + 6
    width = max(columns * (clip.shape[2] + _MARGIN) + _MARGIN for clip in clips)
    height = sum(text_height + clip.shape[1] + _MARGIN for clip in clips) + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for clip, caption in zip(clips, captions, strict=True):
        draw.text((_MARGIN, top), _fit(caption, draw, font, width - 2 * _MARGIN), fill="black", font=font)
        top += text_height
        for column, t in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
            sheet.paste(Image.fromarray(clip[t]), (_MARGIN + column * (clip.shape[2] + _MARGIN), top))
        top += clip.shape[1] + _MARGIN
    return np.asarray(sheet).copy()


def _fit(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def check_frames(frames: np.ndarray, durations_ms: Sequence[int]) -> tuple[int, int, int]:
    """Return (T, H, W) of frames [T, H, W, 3] uint8 with T durations; ValueError if they are not that."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, 3]")
    if len(durations_ms) != len(frames):
        raise ValueError(f"{len(durations_ms)} durations for {len(frames)} frames")
    return frames.shape[0], frames.shape[1], frames.shape[2]
