"""The embedded clips: a pure function of (seed, index), inside its bounds, and honest about what is held out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_ds.config import PrepareConfig
from t2v_ds.data import moving_shapes
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.moving_shapes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    RADII,
    SHAPES,
    SPEEDS,
    Attributes,
    caption,
    combinations,
    draw,
    draw_clip,
    held_out_combinations,
    is_held_out,
)
from t2v_ds.data.prepare import prepare


def test_a_clip_is_a_pure_function_of_seed_and_index() -> None:
    first = draw_clip(7, 3, 32, 15, 20)
    draw_clip(8, 3, 32, 15, 20)
    np.random.default_rng(0).random(5)
    again = draw_clip(7, 3, 32, 15, 20)
    assert np.array_equal(first[0], again[0])
    assert first[1:] == again[1:]
    for other in (draw_clip(8, 3, 32, 15, 20), draw_clip(7, 4, 32, 15, 20)):
        assert not np.array_equal(other[0][0], first[0][0])


def test_sizes_and_lengths_are_within_their_bounds() -> None:
    lengths = set()
    for index in range(60):
        frames, durations, text, attributes = draw_clip(index, 0, 16, 15, 22)
        assert frames.dtype == np.uint8
        assert frames.shape == (len(durations), 16, 16, 3)
        assert 15 <= len(frames) <= 22
        assert all(50 <= one <= 100 for one in durations)
        assert attributes["colour"] in text
        lengths.add(len(frames))
    assert lengths == set(range(15, 23))
    assert len(draw_clip(0, 0, 16, 3, 3)[0]) == 3
    assert len(draw_clip(0, 0, 16, 50, 60)[0]) >= 50


@pytest.mark.parametrize("size", RADII)
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_shape_is_whole_in_every_frame_and_moves_as_it_says(direction: str, speed: str, size: str) -> None:
    attributes = Attributes("red", "square", direction, size, speed, "dark")
    side = 64
    frames = draw(attributes, np.random.Generator(np.random.PCG64(5)), side, 15, 40).astype(int)
    red = frames[..., 0] - frames[..., 1] > 100  # [T, S, S]
    area = red.sum((1, 2))
    full = (2 * RADII[size] * side) ** 2
    assert (abs(area - full) < 0.15 * full).all()  # never cut by an edge
    assert np.abs(frames[..., 0, 0, 0] - frames[0, 0, 0, 0]).max() <= 205
    centres = np.array([[xs.mean(), ys.mean()] for ys, xs in (np.nonzero(one) for one in red)])
    steps = np.diff(centres @ np.array(DIRECTIONS[direction])).round(1)
    assert set(steps) <= {0, side / 32}
    moves = np.flatnonzero(steps) + 1  # the frames in which it has moved
    way = 32 * (1 - 2 * RADII[size])  # in steps, from touching one edge to touching the other
    pause = SPEEDS[speed] * max(1, int(np.ceil((len(frames) - 1) / way)))
    assert moves.tolist() == list(range(pause, len(frames), pause))


def test_held_out_combinations_are_never_drawn_and_all_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_shapes, "draw", lambda *_: np.zeros((15, 1, 1, 3), np.uint8))  # the attributes are drawn before it
    drawn = [draw_clip(index, seed, 8, 15, 40)[3] for seed in (0, 1) for index in range(3000)]
    triples = {(one["colour"], one["shape"], one["direction"]) for one in drawn}
    held_out = set(combinations(held_out=True))
    assert triples.isdisjoint(held_out)
    assert triples == set(combinations(held_out=False))
    assert triples | held_out == set(itertools.product(COLOURS, SHAPES, DIRECTIONS))
    assert len(held_out) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS) // 4
    for name, values in (("size", RADII), ("speed", SPEEDS), ("background", BACKGROUNDS)):
        counts = [sum(one[name] == value for one in drawn) for value in values]
        assert sum(counts) == len(drawn)
        assert min(counts) > 0.8 * len(drawn) / len(counts)


def test_every_value_and_every_pair_is_trained_on_and_held_out() -> None:
    kinds: list[tuple[str, ...]] = [tuple(COLOURS), SHAPES, tuple(DIRECTIONS)]
    for held_out in (False, True):
        triples = combinations(held_out)
        assert all(is_held_out(*triple) == held_out for triple in triples)
        for i, kind in enumerate(kinds):
            assert {triple[i] for triple in triples} == set(kind)
    trained = combinations(held_out=False)
    for i, j in itertools.combinations(range(3), 2):
        assert {(triple[i], triple[j]) for triple in trained} == set(itertools.product(kinds[i], kinds[j]))


def test_captions_say_what_is_shown() -> None:
    attributes = Attributes("blue", "triangle", "up", "small", "quickly", "light")
    assert caption(attributes) == "a small blue triangle moves up quickly on a light background"
    rng = np.random.Generator(np.random.PCG64(0))
    captions = {caption(attributes, rng) for _ in range(200)}
    assert len(captions) == 8  # size, speed and background are each left out now and then; what is judged never is
    assert all("blue triangle moves up" in one for one in captions)


def test_the_manifest_lists_what_is_held_out(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"clips": 4, "image_size": 16, "workers": 1, "max_frames": 16}
    prepare(PrepareConfig(source="moving-shapes", out=str(tmp_path / "raw"), **settings))
    assert Manifest.load(tmp_path / "raw", "raw").source["held_out"] == held_out_combinations()
    with ShardDataset(tmp_path / "raw", "raw") as dataset:
        for i in range(4):
            clip = dataset.read(i)
            frames, durations, text, attributes = draw_clip(i, 0, 16, 15, 16)
            assert np.array_equal(clip["frames"], frames)
            assert (clip["durations_ms"], clip["caption"], clip["attributes"]) == (durations, text, attributes)
