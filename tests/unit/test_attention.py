"""Every kind of attention equals a softmax under a dense mask written down from its definition, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from t2v_ds.models.attention import QKV, attend_frames, attend_words
from t2v_ds.models.layout import Layout

HEADS, KV_HEADS, WIDTH, P, W = 4, 2, 6, 5, 3


def dense_mask(kind: str, lengths: list[int], words: int, streams: int, window: int) -> Tensor:
    """Who sees whom among the rows of a layout, by definition: bool [N, N], True: is seen."""
    rows: list[tuple[int, int, int, int]] = [(b, -1, w, -1) for b in range(len(lengths)) for w in range(words)]
    for stream in range(streams):
        rows += [(b, t, p, stream) for b, length in enumerate(lengths) for t in range(length) for p in range(P)]
    mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for i, (clip, t, p, stream) in enumerate(rows):
        for j, (other, u, r, other_stream) in enumerate(rows):
            if clip != other:
                continue
            if t < 0:  # a word sees the words up to itself
                mask[i, j] = u < 0 and r <= p
            elif u < 0:
                mask[i, j] = kind != "temporal"
            else:
                near = t - u < {"full": 10**6, "window": window, "spatial": 1, "temporal": 10**6}[kind]
                place = r == p if kind == "temporal" else True
                causal = u < t or (u == t and r <= p)
                by_frame = (u < t and other_stream == 0) or (u == t and other_stream == stream)  # the own frame of the own stream
                time = causal if streams == 1 else by_frame
                mask[i, j] = near and place and time
    return mask


@pytest.mark.parametrize("lengths", [[3], [2, 4, 1, 2]])
@pytest.mark.parametrize("words", [0, W])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("kind", ["full", "window", "spatial", "temporal"])
def test_equals_dense_masked_attention(kind: str, streams: int, words: int, lengths: list[int]) -> None:
    layout = Layout(lengths, words, P, streams)
    generator = torch.Generator().manual_seed(0)
    rows = len(lengths) * words + streams * sum(lengths) * P

    def random(heads: int) -> Tensor:
        return torch.randn(rows, heads, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = inputs = QKV(random(HEADS), random(KV_HEADS), random(KV_HEADS))
    parts = [layout.split(x) for x in inputs]
    of_words, of_frames = (QKV(*(part[side] for part in parts)) for side in (0, 1))
    seen = attend_words(of_words) if words else of_words.q
    found = layout.join(seen, attend_frames(kind, of_frames, of_words, layout, window=2))

    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) / math.sqrt(WIDTH)
    scores = scores.masked_fill(~dense_mask(kind, lengths, words, streams, window=2), -math.inf)
    expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)

    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_layout_splits_and_joins_and_sums() -> None:
    layout = Layout([2, 3, 1], 2, 4, 2)
    rows = torch.arange(6 + 2 * 6 * 4)
    words, frames = layout.split(rows)
    assert words.shape == (3, 2)
    assert frames.shape == (2, 6, 4)
    assert torch.equal(layout.join(words, frames), rows)
    assert layout.clip.tolist() == [0, 0, 1, 1, 1, 2]
    assert layout.number.tolist() == [0, 1, 0, 1, 2, 0]
    assert layout.clip_sums(torch.tensor([1.0, 2, 3, 4, 5, 6])).tolist() == [3, 12, 6]
    doubled = layout.per_group(lambda group, x: x * group.length, torch.arange(6))
    assert doubled.tolist() == [0, 2, 6, 9, 12, 5]
