"""The compiled GIF decoder and Pillow's way on files that are hard to get right; tests/unit/test_gif_browser.py proves the drawings."""

from __future__ import annotations

import numpy as np
import pytest

from t2v_ds.data.gif import MAX_PIXELS, RejectedClip, decode_gif
from t2v_ds.kernels import gif as compiled
from tests.gif_cases import NOISE, Case, Image, cases, cut_cases, noise
from tests.gif_ways import WAYS, decoding_by

CASES = {case.name: case for case in cases()}


def decode(case: Case, way: str, size: int | None = None) -> np.ndarray:
    with decoding_by(way):
        return decode_gif(case.encode(), 40, size=size, require_trailer=bool(case.end)).frames


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_frames_and_times_are_as_drawn(case: Case, way: str) -> None:
    if way == "pillow" and not case.pillow:
        with pytest.raises(RejectedClip, match="undecodable"):
            decode(case, way)
        return
    assert (decode(case, way) == case.draw()).all()
    with decoding_by(way):
        assert decode_gif(case.encode(), 40, require_trailer=bool(case.end)).durations_ms == case.durations_ms()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_compiled_decoder_leaves_none_of_them_to_pillow(case: Case) -> None:
    assert compiled.available()
    frames = np.zeros(case.draw().shape, dtype=np.uint8)
    assert compiled.decode(case.encode(), MAX_PIXELS, frames, resize=False, require_trailer=bool(case.end)) is not None
    assert (frames == case.draw()).all()


SHAPES = [(1, 1), (16, 20), (5, 90), (90, 5), (33, 34), (34, 33), (1, 50), (50, 1), (128, 128), (200, 130), (130, 200)]


@pytest.mark.parametrize("size", [1, 7, 33, 128, 333])
@pytest.mark.parametrize("vector", [True, False], ids=["vector", "plain"])
def test_resizes_as_pillow_to_the_bit(size: int, vector: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not vector:
        monkeypatch.setenv("T2V_GIF_PLAIN", "1")
    for case in [*CASES.values(), *(noisy(*shape) for shape in SHAPES)]:
        if case.pillow:
            assert (decode(case, "compiled", size) == decode(case, "pillow", size)).all(), case.name


def noisy(width: int, height: int) -> Case:
    """Noise, and then noise in a part of it: only what depends on that part is resized anew."""
    part = (width + 2) // 3, (height + 1) // 2
    images = [Image(noise(width, height, 256, 1), bits=8), Image(noise(*part, 256, 2), (width // 4, height // 3), bits=8, disposal=2)]
    after = Image(noise(1, 1, 256, 3), (width - 1, height - 1), bits=8)
    return Case(f"{width} x {height}", [*images, after], (width, height), NOISE)


@pytest.mark.parametrize("way", WAYS)
def test_no_frame_of_a_cut_file_is_lost_in_silence(way: str) -> None:
    for data, whole in cut_cases():
        with decoding_by(way):
            with pytest.raises(RejectedClip, match="truncated"):
                decode_gif(data, 40)
            if whole:  # between two blocks: not to be told from a file without trailer
                assert len(decode_gif(data, 40, require_trailer=False).frames) == whole
            else:
                with pytest.raises(RejectedClip, match=r"truncated|too_short"):
                    decode_gif(data, 40, require_trailer=False)
