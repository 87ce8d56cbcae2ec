"""Drawing codes: the cache changes nothing, filters are exact, seeds belong to clips, lengths are kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from t2v_ds.config import SamplingConfig
from t2v_ds.models.sampling import Draws, draw, filter_logits, sample_codes, schedule
from tests.toy_transformer import LONGEST, captions, codes_of, make, states_of


@pytest.mark.parametrize("decoding", ["token", "frame"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_length_is_what_the_whole_forward_pass_says(guidance: float, decoding: str) -> None:
    model = make(decoding=decoding)
    text, mask = captions(12)

    def votes(codes: Tensor, one: slice, given: bool = True) -> Tensor:
        """"Is this frame the last?" of each frame [T]."""
        passes = torch.zeros(len(codes), model.config.positions, dtype=torch.long) if decoding == "frame" else None
        states, _ = states_of(model, codes, [len(codes)], text[one] * given, mask[one] & given, passes)
        return model.end(states[0]).squeeze(-1).mean(1)

    with torch.no_grad():  # ends neither always nor never
        model.end.weight.normal_()
        some = [votes(codes_of(LONGEST, seed=b), slice(b, b + 1)) for b in range(12)]
        model.end.bias -= torch.cat(some).quantile(0.7)
        drawn = sample_codes(model, text, mask, SamplingConfig(guidance=guidance, seed=3, passes=1))
        assert len({len(codes) for codes in drawn}) > 1
        for b, codes in enumerate(drawn):
            one = slice(b, b + 1)
            ends = votes(codes, one)
            if guidance != 1:
                free = votes(codes, one, given=False)
                ends = free + guidance * (ends - free)
            assert not bool((ends[:-1] > 0).any())
            assert float(ends[-1]) > 0 or len(codes) == LONGEST


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("decoding", ["token", "frame"])
def test_a_clip_depends_on_its_seed_and_number_and_not_on_those_beside_it(guidance: float, decoding: str) -> None:
    model = make(decoding=decoding)
    text, mask = captions(4)
    config = SamplingConfig(guidance=guidance, seed=7, temperature=1.5)
    together = sample_codes(model, text, mask, config)
    for clip in range(4):
        one = slice(clip, clip + 1)
        [alone] = sample_codes(model, text[one], mask[one], config, first_clip=clip)
        assert torch.equal(alone, together[clip])
    pair = sample_codes(model, text[2:], mask[2:], config, first_clip=2)
    assert all(torch.equal(a, b) for a, b in zip(pair, together[2:], strict=True))
    again = sample_codes(model, text, mask, config)
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
    other = sample_codes(model, text, mask, SamplingConfig(guidance=guidance, seed=8, temperature=1.5))
    assert not torch.equal(other[0][:1], together[0][:1])
    same_text = sample_codes(model, text[:1].expand(2, -1, -1), mask[:1].expand(2, -1), config)
    assert not torch.equal(same_text[0][:1], same_text[1][:1])  # one prompt twice: two clips


def kept(logits: list[float], top_k: int = 0, top_p: float = 1.0) -> list[int]:
    filtered = filter_logits(torch.tensor([logits]), top_k, top_p)[0]
    assert all(value in (-math.inf, before) for value, before in zip(filtered.tolist(), torch.tensor(logits).tolist(), strict=True))
    return filtered.isfinite().nonzero().flatten().tolist()


def test_top_k_and_top_p_keep_exactly_what_they_say() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.05, 0.3, 0.15)]
    assert kept(logits) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=1) == [1]
    assert kept(logits, top_k=3) == [1, 3, 4]
    assert kept(logits, top_k=5) == kept(logits, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(logits, top_p=0.01) == [1]  # the likeliest always stays
    assert kept(logits, top_p=0.39) == [1]
    assert kept(logits, top_p=0.41) == [1, 3]
    assert kept(logits, top_p=0.69) == [1, 3]
    assert kept(logits, top_p=0.71) == [1, 3, 4]
    assert kept(logits, top_p=0.96) == [0, 1, 2, 3, 4]
    # Together: the nucleus of what top-k left, whose shares are then 4/7 and 3/7.
    assert kept(logits, top_k=2, top_p=0.55) == [1]
    assert kept(logits, top_k=2, top_p=0.58) == [1, 3]
    rows = torch.tensor([logits, logits[::-1]])
    assert filter_logits(rows, 2, 1.0).isfinite().tolist() == [[False, True, False, True, False], [False, True, False, True, False]]


def test_draws_follow_the_filtered_distribution() -> None:
    n = 4000
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().expand(n // 2, 2, -1)  # two draws a clip
    wanted = {
        (1.0, 0, 1.0): [0.1, 0.4, 0.05, 0.3, 0.15],
        (1.0, 2, 1.0): [0, 4 / 7, 0, 3 / 7, 0],
        (1.0, 0, 0.8): [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85],
        (0.5, 0, 1.0): [p * p / 0.285 for p in (0.1, 0.4, 0.05, 0.3, 0.15)],
        (0.0, 0, 1.0): [0, 1, 0, 0, 0],
        (1e-42, 0, 1.0): [0, 1, 0, 0, 0],
    }
    for (temperature, top_k, top_p), shares in wanted.items():
        config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        drawn = draw(logits, config, Draws(0, list(range(n // 2))))
        found = torch.bincount(drawn.flatten(), minlength=5) / n
        for share, expected in zip(found.tolist(), shares, strict=True):
            assert share == pytest.approx(expected, abs=0 if expected in (0, 1) else 4 * (0.25 / n) ** 0.5)


def test_every_position_is_drawn_once_in_as_many_passes_as_asked_for() -> None:
    for positions in (1, 4, 16, 1024):
        for passes in (1, 2, 8, 2000):
            steps = schedule(positions, passes)
            assert len(steps) == min(passes, positions)
            assert [done for done, _, _ in steps] == [0, *(upto for _, upto, _ in steps[:-1])]
            assert all(done < upto for done, upto, _ in steps)
            assert steps[-1][1] == positions
            assert steps[0][2] == (len(steps) == 1)  # a single pass has the whole guidance
            assert steps[-1][2] == 1


def test_a_single_pass_is_guided_in_full() -> None:
    text, mask = captions(2)
    constant, rising = (SamplingConfig(frames=2, passes=1, guidance=4.0, guidance_schedule=one) for one in ("constant", "passes"))
    drawn = [sample_codes(make(decoding="frame"), text, mask, config) for config in (constant, rising)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize("decoding", ["token", "frame"])
def test_a_clip_that_is_continued_has_a_new_frame(decoding: str) -> None:
    """Though the model says of the last one given that the clip ends there."""
    text, mask = captions(2)
    first = codes_of(2)[:, None].transpose(0, 1).expand(2, -1, -1, -1)
    drawn = sample_codes(make(decoding=decoding, end=9.0), text, mask, SamplingConfig(passes=2), first_frames=first)
    assert [len(codes) for codes in drawn] == [3, 3]
    bounded = sample_codes(make(decoding=decoding, end=9.0), text, mask, SamplingConfig(passes=2), max_frames=2, first_frames=first)
    assert [len(codes) for codes in bounded] == [2, 2]


def test_a_loop_ends_on_its_first_frame_and_a_given_last_frame_is_kept() -> None:
    text, mask = captions(2)
    for decoding in ("token", "frame"):
        model = make(decoding=decoding, last_frame=True)
        looped = sample_codes(model, text, mask, SamplingConfig(frames=4, loop=True, passes=2))
        assert all(len(codes) == 4 and torch.equal(codes[0], codes[-1]) for codes in looped)
        assert any(not torch.equal(codes[0], codes[1]) for codes in looped)
        first, last = codes_of(2, seed=1)[:, None], codes_of(2, seed=2)
        given = sample_codes(model, text, mask, SamplingConfig(frames=5, passes=2), first_frames=first, last_frame=last)
        for b, codes in enumerate(given):
            assert torch.equal(codes[0], first[b, 0])
            assert torch.equal(codes[-1], last[b])
        other = sample_codes(model, text, mask, SamplingConfig(frames=5, passes=2), first_frames=first, last_frame=last.flip(1))
        assert not torch.equal(other[0][1:-1], given[0][1:-1])  # what comes between knows where it goes


def test_temperature_0_ignores_the_seed() -> None:
    model = make()
    text, mask = captions(2)
    first, second = (sample_codes(model, text, mask, SamplingConfig(temperature=0, seed=seed)) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_lengths_are_kept(guidance: float) -> None:
    text, mask = captions(3)

    def lengths(end: float, frames: int = 0, **bounds: Any) -> set[int]:
        config = SamplingConfig(guidance=guidance, frames=frames)
        return {len(codes) for codes in sample_codes(make(end=end), text, mask, config, **bounds)}

    always, never = 5.0, -5.0
    assert lengths(always) == {1}
    assert lengths(always, min_frames=3) == {3}
    assert lengths(never) == {LONGEST}
    assert lengths(never, max_frames=4) == {4}
    assert lengths(never, max_frames=99) == {LONGEST}
    for end in (always, never):
        assert lengths(end, min_frames=2, max_frames=5, frames=4) == {4}
        assert lengths(end, frames=LONGEST) == {LONGEST}
        assert lengths(end, frames=1) == {1}
