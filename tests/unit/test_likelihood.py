"""Bits a code: the exact likelihood of telling positions one after another, in raster order or in a random one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from t2v_ds.models.likelihood import _orders, bits_per_code
from tests.toy_transformer import K, captions, codes_of, make, states_of


def test_token_is_the_loss() -> None:
    model = make(decoding="token")
    text, mask = captions(2)
    with torch.no_grad():
        nats = model(codes_of(5), [3, 2], text, mask).codes
    torch.testing.assert_close(bits_per_code(model, codes_of(5), [3, 2], text, mask), nats.double() / math.log(2))


@pytest.mark.parametrize("group", [1, 2])
def test_frame_of_a_model_that_knows_nothing_is_the_log_of_the_codebook(group: int) -> None:
    model = make(group, decoding="frame")
    with torch.no_grad():
        for logits in model.head.logits:
            logits.weight.zero_()
            logits.bias.zero_()
    text, mask = captions(2)
    found = bits_per_code(model, codes_of(5), [3, 2], text, mask)
    torch.testing.assert_close(found, torch.full((2,), math.log2(K), dtype=torch.float64))
    assert torch.equal(found, bits_per_code(model, codes_of(5), [3, 2], text, mask))


@pytest.mark.parametrize("attention", ["full", "factorised"])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_probabilities_of_all_frames_add_up_to_one(passes: int, attention: str) -> None:
    """Whatever the passes: nothing is told with knowledge of itself or of what is told later."""
    model = make(1, decoding="frame", grid_size=2, codebook_size=3, attention=attention)
    frames = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    order = torch.tensor([2, 0, 3, 1]) % passes
    text, mask = (one.expand(len(frames), *one.shape[1:]) for one in captions(1))
    with torch.no_grad():
        nats = model(frames, [1] * len(frames), text, mask, passes=order.expand(len(frames), -1)).codes * 4
    assert float((-nats.double()).exp().sum()) == pytest.approx(1, abs=1e-4)
    assert float(nats.std()) > 0.1


def test_frame_is_what_telling_one_position_after_another_takes() -> None:
    model = make(2, decoding="frame", std=0.25)
    codes, (text, mask) = codes_of(3), captions(1)
    order, groups, nats = _orders(codes, 4), model.to_groups(codes), 0.0
    for frame in range(3):
        for told in range(4):
            passes = order[: frame + 1].clone()
            passes[frame] = torch.where(passes[frame] < told, passes[frame], 4)  # what comes later, no matter when
            states, _ = states_of(model, codes[: frame + 1], [frame + 1], text, mask, passes)
            position = int((order[frame] == told).nonzero())
            with torch.no_grad():
                nats += float(model.head(states[1, frame, position][None], groups[frame, position][None])[0].sum())
    found = float(bits_per_code(model, codes, [3], text, mask))
    assert found == pytest.approx(nats / 48 / math.log(2), rel=1e-5)


def test_a_clips_figure_does_not_depend_on_the_clips_beside_it() -> None:
    model, lengths = make(2, decoding="frame"), [3, 1, 2]
    codes, (text, mask) = codes_of(6), captions(3)
    together = bits_per_code(model, codes, lengths, text, mask)
    alone = [
        bits_per_code(model, clip, [len(clip)], text[i : i + 1], mask[i : i + 1])[0] for i, clip in enumerate(codes.split(lengths))
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=0)
