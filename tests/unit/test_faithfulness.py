"""The program that judges: right on true clips, at chance on shuffled ones, and silent where there is nothing to see."""

from __future__ import annotations

import numpy as np
import pytest

from t2v_ds.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, Attributes, draw, draw_clip
from t2v_ds.evaluation.faithfulness import (
    OTHER_WORDS,
    Reading,
    accuracy,
    choose_prompts,
    judge,
    paraphrase_of,
    read_clip,
    true_clips,
)

CLIPS = 120
NAMES = ("colour", "shape", "direction")


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return true_clips(choose_prompts(CLIPS), 0, 64, 15, 20)


def test_true_clips_are_read_and_shuffled_ones_are_at_chance(clips: list[np.ndarray]) -> None:
    prompted = choose_prompts(CLIPS)
    assert sum(one[3] for one in prompted) == CLIPS // 2
    rotated = clips[1:] + clips[:1]
    results = judge(prompted, rotated, clips)
    assert set(results) == {"seen", "held out", "true clips", "true clips, shuffled captions"}
    assert all(results["true clips"][name] >= 0.99 for name in (*NAMES, "all"))
    for name, chance in zip(NAMES, (1 / 6, 1 / 3, 1 / 4), strict=True):
        # 120 clips: three standard deviations.
        assert results["true clips, shuffled captions"][name] == pytest.approx(chance, abs=3 * (chance * (1 - chance) / CLIPS) ** 0.5)
    assert results["seen"]["all"] < 0.2  # what is judged are the clips that were drawn, here those of the neighbour
    few = choose_prompts(4)
    assert judge(few, clips[:4], true_clips(few, 0, 64, 15, 20))["true clips, shuffled captions"]["all"] == 0  # none keeps its own
    own = judge(prompted, clips, rotated)
    assert own["seen"]["all"] >= 0.98
    assert own["held out"]["all"] >= 0.98


def test_noise_of_compression_does_not_matter(clips: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    noisy = [(clip + rng.normal(0, 8, clip.shape)).clip(0, 255).astype(np.uint8) for clip in clips[::2]]
    wanted = [one[:3] for one in choose_prompts(CLIPS)[::2]]
    assert accuracy([read_clip(clip) for clip in noisy], wanted)["all"] >= 0.98


def test_nothing_is_read_where_there_is_nothing() -> None:
    rng = np.random.default_rng(0)
    nothing = Reading(None, None, None)
    for value in (0, 127, 255):
        assert read_clip(np.full((16, 32, 32, 3), value, np.uint8)) == nothing
    assert read_clip(rng.integers(0, 256, (16, 32, 32, 1), dtype=np.uint8).repeat(3, axis=-1)) == nothing
    assert read_clip(rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)) == nothing
    assert read_clip(np.full((16, 32, 32, 3), COLOURS["red"], np.uint8)) == nothing  # a red wall is no shape
    attributes = Attributes("red", "circle", "right", "large", "slowly", "dark")
    clip = draw(attributes, rng, 32, 16, 16)
    assert read_clip(clip) == Reading("red", "circle", "right")
    clip[4:] = 0  # gone for most of the clip
    assert read_clip(clip) == nothing
    assert read_clip(draw(attributes, rng, 32, 16, 16)[:1].repeat(16, axis=0)) == Reading("red", "circle", None)  # does not move
    assert read_clip(draw(attributes, rng, 32, 16, 16)[::-1]).direction == "left"


def test_every_value_can_be_read() -> None:
    rng = np.random.default_rng(3)
    for i, colour in enumerate(COLOURS):
        for j, shape in enumerate(SHAPES):
            direction = list(DIRECTIONS)[(i + j) % 4]
            attributes = Attributes(colour, shape, direction, "small", "quickly", "light")
            assert read_clip(draw(attributes, rng, 64, 15, 16)) == Reading(colour, shape, direction)


def test_accuracy_by_hand() -> None:
    nothing = Reading(None, None, None)
    readings = [Reading("red", "circle", "left"), Reading("red", "square", None), nothing, Reading("blue", "circle", "up")]
    wanted = [("red", "circle", "left"), ("red", "circle", "up"), ("red", "circle", "up"), ("blue", "circle", "up")]
    assert accuracy(readings, wanted) == {"colour": 0.75, "shape": 0.5, "direction": 0.5, "all": 0.5}
    with pytest.raises(ValueError, match="zip"):
        accuracy(readings, wanted[:1])


def test_paraphrases_say_the_same_in_words_that_no_caption_holds() -> None:
    assert set(OTHER_WORDS) == {*COLOURS, *SHAPES, *DIRECTIONS}
    said = {word for i in range(300) for word in draw_clip(i, 0, 16, 2, 3)[2].split()}
    assert {*COLOURS, *SHAPES, *DIRECTIONS} <= said
    for prompted in choose_prompts(20):
        words = set(paraphrase_of(prompted).split())
        assert words & said <= {"a", *DIRECTIONS}  # "to the left" must say left
        assert len(words & {OTHER_WORDS[word].split()[-1] for word in prompted[:3]}) == 3
