"""GIF -> frames by the compiled decoder of `gif.cpp`, where it is compiled and the file is whole and usual."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import numpy as np

from . import build

SWITCH = "T2V_GIF"  # environment variable: "pillow" keeps the compiled decoder out
_PLAIN = "T2V_GIF_PLAIN"  # environment variable: keeps vector instructions out


def available() -> bool:
    """Whether the compiled decoder is loaded now; says once, by its reason, if not."""
    return _library() is not None


def shape(data: bytes, max_pixels: int, require_trailer: bool = True) -> tuple[int, int, int] | None:
    """Number of frames, height and width of a GIF; None if it is damaged, declares more than `max_pixels`, or nothing is compiled."""
    library = _library()
    found = np.zeros(3, dtype=np.uint32)
    if library is None or library.t2v_gif_scan(data, len(data), max_pixels, require_trailer, found.ctypes.data):
        return None
    width, height, frames = (int(number) for number in found)
    return frames, height, width


def decode(data: bytes, max_pixels: int, frames: np.ndarray, resize: bool, require_trailer: bool = True) -> np.ndarray | None:
    """Decode a GIF as a browser shows it on a white page; the GIL is free meanwhile.

    Args:
        data: the file.
        max_pixels: as given to `shape`.
        frames: uint8 [T, H, W, 3], contiguous, to be filled; T as `shape` said.
        resize: make the frames H x W (equal) by Pillow's bilinear filter, to the bit; else H and W are as `shape` said.
        require_trailer: as given to `shape`.

    Returns:
        int32 [T]: the time that each frame is shown, in milliseconds; None if the pixels are damaged or unusual, and then what stands
        in `frames` is of no use.

    Raises:
        ValueError: `frames` does not fit.
    """
    library, declared = _library(), shape(data, max_pixels, require_trailer)
    if library is None or declared is None:
        return None
    count, height, width = declared
    size = frames.shape[1] if resize else 0
    expected = (count, size, size, 3) if resize else (count, height, width, 3)
    if frames.shape != expected or frames.dtype != np.uint8 or not frames.flags.c_contiguous or (resize and not size):
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; this file needs contiguous uint8 {list(expected)}")
    delays = np.empty(count, dtype=np.int32)
    plain = os.environ.get(_PLAIN) == "1"
    status = library.t2v_gif_decode(
        data, len(data), max_pixels, require_trailer, count, size, plain, frames.ctypes.data, delays.ctypes.data
    )
    return None if status else delays


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled decoder; says once, by its reason, if there is none."""
    library = build.load_plain("GIF", f"{SWITCH}=pillow", "GIFs are decoded by Pillow, to the same frames but slower")
    if library is not None:
        pointer, size, flag = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.t2v_gif_scan.argtypes = [ctypes.c_char_p, size, ctypes.c_int64, flag, pointer]
        library.t2v_gif_decode.argtypes = [
            ctypes.c_char_p, size, ctypes.c_int64, flag, ctypes.c_uint32, ctypes.c_uint32, flag, pointer, pointer,
        ]  # fmt: skip
    return library
