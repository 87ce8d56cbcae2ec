"""Every kind of attention equals a softmax under a dense mask written down from its definition, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from t2v_ds.models.attention import QKV, Passes, attend_frames, attend_words, seen_of_frame
from t2v_ds.models.layout import Layout

HEADS, KV_HEADS, WIDTH, P, W = 4, 2, 6, 5, 3


def dense_mask(kind: str, lengths: list[int], words: int, passes: Tensor | None, window: int) -> Tensor:
    """Who sees whom among the rows of a layout, by definition: bool [N, N], True: is seen."""
    rows: list[tuple[int, int, int, int]] = [(b, -1, w, -1) for b in range(len(lengths)) for w in range(words)]
    for stream in range(1 if passes is None else 2):
        rows += [(b, t, p, stream) for b, length in enumerate(lengths) for t in range(length) for p in range(P)]
    firsts = [sum(lengths[:clip]) for clip in range(len(lengths))]
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
                if passes is None:
                    seen = u < t or (u == t and r <= p)
                elif kind == "temporal":
                    seen = (u < t and other_stream == 0) or i == j
                else:
                    asking, asked = int(passes[firsts[clip] + t, p]), int(passes[firsts[clip] + u, r])
                    seen = other_stream == 0 and (u < t or (u == t and asked <= asking - stream))
                mask[i, j] = near and place and seen
    return mask


@pytest.mark.parametrize("lengths", [[3], [2, 4, 1, 2]])
@pytest.mark.parametrize("words", [0, W])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("kind", ["full", "window", "spatial", "temporal"])
def test_equals_dense_masked_attention(kind: str, streams: int, words: int, lengths: list[int]) -> None:
    layout = Layout(lengths, words, P, streams)
    generator = torch.Generator().manual_seed(0)
    passes = torch.randint(3, (sum(lengths), P), generator=generator) if streams == 2 else None
    rows = len(lengths) * words + streams * sum(lengths) * P

    def random(heads: int) -> Tensor:
        return torch.randn(rows, heads, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = inputs = QKV(random(HEADS), random(KV_HEADS), random(KV_HEADS))
    parts = [layout.split(x) for x in inputs]
    of_words, of_frames = (QKV(*(part[side] for part in parts)) for side in (0, 1))
    seen = attend_words(of_words) if words else of_words.q
    made = None if passes is None else Passes(passes, seen_of_frame(passes, max(1, words), q.dtype))
    found = layout.join(seen, attend_frames(kind, of_frames, of_words, layout, 2, made))

    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) / math.sqrt(WIDTH)
    scores = scores.masked_fill(~dense_mask(kind, lengths, words, passes, window=2), -math.inf)
    if streams == 2 and not words and kind != "temporal":  # there is something more to look at: a key and a value of zeros
        scores = torch.cat([scores, torch.zeros(HEADS, rows, 1, dtype=torch.float64)], dim=2)
        values = torch.cat([values, torch.zeros(1, HEADS, WIDTH, dtype=torch.float64)])
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
