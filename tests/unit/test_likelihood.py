"""Bits a code: exact where positions come one after another, a bound that holds in expectation where frames are drawn whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from t2v_ds.models.likelihood import bits_per_code
from tests.toy_transformer import K, captions, codes_of, make


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


def test_frame_equals_the_chain_rule_over_random_orders() -> None:
    """Of one frame of four positions: the mean over all orders of -log p, computed one position at a time."""
    model = make(2, decoding="frame", std=0.25)
    codes, (text, mask) = codes_of(1), captions(1)
    total = []
    for order in itertools.permutations(range(4)):
        nats = 0.0
        for known in range(4):
            masked = torch.ones(1, 4, dtype=torch.bool)
            masked[0, list(order[:known])] = False
            only = model.to_groups(codes).clone()
            with torch.no_grad():
                states, _, _ = model.clip_states(codes, [1], text, mask, [-1], masked, None)
                position = order[known]
                nats += float(model.head(states[1, 0, position][None], only[0, position][None])[0].sum())
        total.append(nats / 16 / math.log(2))
    expected = sum(total) / len(total)
    found = float(bits_per_code(model, codes, [1], text, mask))  # four strata: every k once, with one random choice of positions
    assert found == pytest.approx(expected, rel=0.15)


def test_a_clips_figure_does_not_depend_on_the_clips_beside_it() -> None:
    model, lengths = make(2, decoding="frame"), [3, 1, 2]
    codes, (text, mask) = codes_of(6), captions(3)
    together = bits_per_code(model, codes, lengths, text, mask)
    alone = [
        bits_per_code(model, clip, [len(clip)], text[i : i + 1], mask[i : i + 1])[0] for i, clip in enumerate(codes.split(lengths))
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=0)
