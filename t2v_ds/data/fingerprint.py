"""Clips that teach nothing: flat, still, or seen before.

    frames [T, S, S, 3] -> check_content: "flat", "still"                in the worker, from the clip alone
                        -> Fingerprint (kept in the block's result.json)
    fingerprints in the order of the rows -> Duplicates.judge: "duplicate", "near_duplicate"

What is a duplicate depends on the clips before, so it is judged where the blocks are packed, in row order: the same on
any number of workers and parts, and after any kill.

- duplicate: the same frames with the same caption (`duplicates: same_caption`). One GIF with several captions is what
  TGIF gives on purpose; `any_caption` keeps only the first, `keep` all.
- near_duplicate: other frames that look the same, whatever the captions say: a copy that was scaled or compressed again.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from t2v_ds.config import FilterConfig
from t2v_ds.data.gif import RejectedClip

_GRID = 32  # cells a side, about, that changes and contrast are measured on: noise of single pixels is averaged away
_LOOK_FRAMES, _LOOK_GRID = 4, 8  # of the picture by which near duplicates are found


def check_content(frames: np.ndarray, filters: FilterConfig) -> None:
    """Reject frames [T, S, S, 3] uint8 in which there is nothing to see, or nothing moves.

    Both are measured on about 32 x 32 cell means, in levels of 0 to 255 of one colour channel.

    Raises:
        RejectedClip: "flat": in no frame do two cells differ by `flat_below`; "still": in no cell do two frames differ by `still_below`.
    """
    if not filters.flat_below and not filters.still_below:
        return
    factor = max(1, frames.shape[1] // _GRID)
    contrast = change = 0
    lowest = highest = None
    for frame in frames:
        cells = frame if factor == 1 else np.asarray(Image.fromarray(frame).reduce(factor))  # [g, g, 3]
        contrast = max(contrast, int((cells.max(axis=(0, 1)) - cells.min(axis=(0, 1))).max()))
        lowest = cells if lowest is None else np.minimum(lowest, cells)
        highest = cells if highest is None else np.maximum(highest, cells)
        change = int((highest - lowest).max())
        if contrast >= filters.flat_below and change >= filters.still_below:
            return  # most clips are cleared by their first frames
    if contrast < filters.flat_below:
        raise RejectedClip("flat", f"the largest difference inside a frame is {contrast} of 255; at least {filters.flat_below:g}")
    if change < filters.still_below:
        raise RejectedClip("still", f"the largest change between frames is {change} of 255; at least {filters.still_below:g}")


@dataclass(frozen=True)
class Fingerprint:
    """By which a clip is compared with the ones before it."""

    key: str
    source: str  # file or URL, for the list of rejected clips
    frames: str  # hash
    caption: str  # hash
    look: str  # four frames of 8 x 8 pixels, base64; empty where near duplicates are not looked for

    @classmethod
    def of(cls, key: str, source: str, frames: np.ndarray, caption: str, filters: FilterConfig) -> Fingerprint:
        """The fingerprint of frames [T, S, S, 3] uint8 with a caption."""
        digest = hashlib.sha256(str(frames.shape).encode())
        digest.update(np.ascontiguousarray(frames).data)
        look = base64.b64encode(_look(frames)).decode() if filters.near_duplicate_below else ""
        return cls(key, source, digest.hexdigest()[:32], hashlib.sha256(caption.encode()).hexdigest()[:32], look)


def _look(frames: np.ndarray) -> bytes:
    """Four evenly spaced frames, averaged to 8 x 8 pixels: 768 bytes."""
    picked = ((np.arange(_LOOK_FRAMES) + 0.5) * len(frames) / _LOOK_FRAMES).astype(int)
    small = [Image.fromarray(frames[t]).resize((_LOOK_GRID, _LOOK_GRID), Image.Resampling.BOX) for t in picked]
    return b"".join(picture.tobytes() for picture in small)


class Duplicates:
    """Judges fingerprints in the order of the rows; remembers those of the clips that stay."""

    def __init__(self, filters: FilterConfig) -> None:
        self._filters = filters
        self._first: dict[tuple[str, str], str] = {}  # (frames, caption) -> key of the first clip
        self._same_frames: set[str] = set()
        self._looks = _Looks(filters.near_duplicate_below) if filters.near_duplicate_below else None

    def judge(self, fingerprints: Iterable[Fingerprint]) -> list[dict[str, Any]]:
        """The ones to reject, as they stand in `rejected.jsonl`."""
        rejected = []
        for one in fingerprints:
            verdict = self._judge(one)
            if verdict is not None:
                rejected.append({"key": one.key, "reason": verdict[0], "detail": verdict[1], "source": one.source})
        return rejected

    def _judge(self, one: Fingerprint) -> tuple[str, str] | None:
        same = (one.frames, one.caption if self._filters.duplicates == "same_caption" else "")
        if self._filters.duplicates != "keep" and same in self._first:
            what = "frames and caption" if same[1] else "frames"
            return "duplicate", f"the {what} of clip {self._first[same]}"
        if self._looks is not None and one.frames not in self._same_frames:
            near = self._looks.find_or_add(one.key, base64.b64decode(one.look))
            if near:
                return "near_duplicate", f"looks like clip {near}"
        self._first.setdefault(same, one.key)
        self._same_frames.add(one.frames)
        return None


class _Box:
    """Looks of about the same mean colour."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._means = np.empty((4, _LOOK_FRAMES * 3), dtype=np.float32)  # of each frame; grows by doubling
        self._pixels = np.empty((4, _LOOK_FRAMES * _LOOK_GRID**2 * 3), dtype=np.uint8)

    def add(self, key: str, means: np.ndarray, pixels: np.ndarray) -> None:
        count = len(self.keys)
        if count == len(self._means):
            self._means, self._pixels = np.concatenate([self._means] * 2), np.concatenate([self._pixels] * 2)
        self._means[count], self._pixels[count] = means, pixels
        self.keys.append(key)

    def find(self, means: np.ndarray, pixels: np.ndarray, below: float) -> str | None:
        """The first key whose pixels all differ by less than `below`."""
        maybe = np.flatnonzero(np.abs(self._means[: len(self.keys)] - means).max(axis=1) < below)
        for place in maybe:
            if np.abs(self._pixels[place] - pixels).max() < below:
                return self.keys[place]
        return None


class _Looks:
    """Small pictures, found again when no pixel of them differs by `below` levels or more.

    Then their mean colours differ by less than `below`, too: only the 27 boxes of that size around it are searched.
    """

    def __init__(self, below: float) -> None:
        self._below = below
        self._boxes: dict[tuple[int, ...], _Box] = {}

    def find_or_add(self, key: str, look: bytes) -> str:
        """The key of the first picture that looks like this one; empty, and it is remembered, if none does."""
        pixels = np.frombuffer(look, dtype=np.uint8).astype(np.int16)
        means = pixels.reshape(_LOOK_FRAMES, -1, 3).mean(axis=1, dtype=np.float32)  # [frames, 3]
        box = tuple(int(level // self._below) for level in means.mean(axis=0))
        around = (tuple(a + b for a, b in zip(box, step, strict=True)) for step in itertools.product((-1, 0, 1), repeat=3))
        found = [self._boxes[place].find(means.ravel(), pixels, self._below) for place in around if place in self._boxes]
        near = [name for name in found if name is not None]
        if near:
            return min(near)  # keys are in the order of the rows
        self._boxes.setdefault(box, _Box()).add(key, means.ravel(), pixels)
        return ""
