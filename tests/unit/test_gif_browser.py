"""Frames as a real browser shows them: Chromium decodes every case and draws it on a white page; nothing may differ by more than a level.

Needs a Chromium (package `chromium`); without one the file is not collected, and conftest.py says so.
"""

from __future__ import annotations

import numpy as np
import pytest

from t2v_ds.data.gif import RejectedClip, decode_gif
from tests import chromium
from tests.gif_cases import Case, cases, cut_cases
from tests.gif_ways import WAYS, decoding_by

CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def shown() -> dict[str, chromium.Shown]:
    """What one run of the browser shows of all cases."""
    return dict(zip(CASES, chromium.show([case.encode() for case in CASES.values()]), strict=True))


def is_same(frames: np.ndarray, others: np.ndarray) -> bool:
    return frames.shape == others.shape and bool((np.abs(frames.astype(int) - others) <= 1).all())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_drawing_that_other_tests_compare_with_is_the_browsers(case: Case, shown: dict[str, chromium.Shown]) -> None:
    assert not shown[case.name].error
    assert is_same(case.draw(), shown[case.name].frames)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_frames_and_times_are_the_browsers(case: Case, way: str, shown: dict[str, chromium.Shown]) -> None:
    if way == "pillow" and not case.pillow:
        return  # rejected there: tests/unit/test_gif_cases.py
    with decoding_by(way):
        decoded = decode_gif(case.encode(), 40, require_trailer=bool(case.end))
    assert is_same(decoded.frames, shown[case.name].frames)
    # A page shows what is at most 10 ms as 100 ms; the decoder alone tells what the file says.
    assert decoded.durations_ms == [delay if delay > 10 else 100 for delay in shown[case.name].durations_ms]


def test_a_file_that_is_cut_is_rejected_where_the_browser_shows_a_part() -> None:
    cut = list(cut_cases())
    partly = 0
    for (data, _), browser in zip(cut, chromium.show([data for data, _ in cut]), strict=True):
        partly += not browser.error
        for way in WAYS:
            with decoding_by(way), pytest.raises(RejectedClip, match="truncated"):
                decode_gif(data, 40)
    assert 0 < partly < len(cut)
