"""What a position may look at, computed without ever building a mask over the whole clip.

    layer's kind    token (one after another)                 frame (in passes: what is known, and what a pass is to tell)
    full            words, all positions before, itself       words, known positions: all before frame t, and of t those told
                                                              in passes before (a known one: up to) its own
    window          the same in the last n frames             the same in the last n frames
    spatial         words, its frame up to itself             the same in its frame
    temporal        its place in the frames up to t           its place in the frames before t, itself

With passes every position stands twice in training: known, and masked. Nothing looks at masked positions but they themselves, so that
the guess of a pass depends on what is known and on nothing else, and what is known never has to be computed again: drawing a
frame in random order computes every position twice, however many passes there are. (Two streams: Yang et al. 2019, "XLNet"; drawn in
parallel after any order: Li et al. 2025, "Autoregressive Image Generation with Randomized Parallel Decoding".) Frames before are seen
as they are, as when clips are drawn: complete teacher forcing (Zhou et al. 2025, "Taming Teacher Forcing for Masked Autoregressive
Video Generation").

Everything is a few calls of `scaled_dot_product_attention`: one for full causal attention, one for all frames within
themselves, one for all places along time, and one a frame for windows and for whole frames. Masks are at most as large as a frame
is against what it sees. FlexAttention is not used: on the CPU it has no backward pass and falls back to a dense mask without saying so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t2v_ds.models.layout import Group, Layout

SHORT = 128 * 64  # queries times keys up to which plain products beat torch's fused kernel on the CPU (its backward: 3 to 12 times)

MANY = 64  # of how many sequences the same holds for a single query (2 to 4 times)


class QKV(NamedTuple):
    """Queries [..., heads, head width], keys and values [..., kv heads, head width] of the same positions."""

    q: Tensor
    k: Tensor
    v: Tensor


class Passes(NamedTuple):
    """In which pass each position of some frames is told, and so what is seen of a frame by its own positions."""

    numbers: Tensor  # int64 [F, P], 0 for the first pass
    # What `seen_of_frame` returns, for "spatial" layers, if there are any. Made once for all of them: what attention keeps
    # for its backward pass is then one mask, not one a layer.
    mask: Tensor | None


def seen_of_frame(numbers: Tensor, before: int, dtype: torch.dtype) -> Tensor:
    """What known and masked positions see of `before` keys and of their frame: [F, 2P, before + P], 0 or -inf to be added to scores.

    Args:
        numbers: of their passes, int64 [F, P].
        before: how many keys all of them see.
        dtype: of the result.
    """
    frames, positions = numbers.shape
    keys = before + positions
    # Rows begin at multiples of 8: kernels on GPUs would copy the mask, and keep the copy, where they do not.
    mask = torch.zeros(frames, 2 * positions, -(-keys // 8) * 8, dtype=dtype, device=numbers.device)[..., :keys]
    asking, asked = numbers[:, :, None], numbers[:, None, :]
    mask[:, :positions, before:].masked_fill_(asked > asking, float("-inf"))
    mask[:, positions:, before:].masked_fill_(asked >= asking, float("-inf"))
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention: q [n, L, heads, D], k and v [n, M, kv heads, D] -> [n, L, heads, D].

    `mask`: bool [L, M], True: is seen; or [n, L, M], added to the scores, of the values' type.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
    short = q.device.type == "cpu" and (q.shape[2] > 1 or len(q) >= MANY) and q.shape[2] * k.shape[2] <= SHORT
    # Plain products know no grouped queries, and most GPUs have no fused kernel for them together with a mask.
    if q.shape[1] != k.shape[1] and (short or mask is not None):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if short:
        if causal:
            mask = causal_tail(q.shape[2], k.shape[2], q.device)
        return _attend_short(q, k, v, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` of [n, heads, L, D], with all weights at once."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(v.dtype) @ v


def causal_tail(queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask of queries that are the last of the keys, each seeing those up to itself: bool [queries, keys]."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attend_words(words: QKV) -> Tensor:
    """Of each word to the words up to it: [B, W, heads, D]."""
    # Copied, as what is kept for the backward pass would else be a view of the keys and values of all frames, and keep these.
    return attend(words.q, words.k.clone(), words.v.clone(), causal=True)


def attend_frames(kind: str, frames: QKV, words: QKV, layout: Layout, window: int, passes: Passes | None = None) -> Tensor:
    """Attention of the positions of frames.

    Args:
        kind: "full", "window", "spatial" or "temporal".
        frames: [S, F, P, heads, D]; with `passes` twice, as they are and masked.
        words: [B, W, heads, D], W may be 0; "temporal" does not look at them.
        layout: of the frames, whose P may be larger than its own.
        window: frames that "window" sees, the own one included.
        passes: in which positions are told; without, they are one after another.

    Returns:
        [S, F, P, heads, D]
    """
    if kind == "temporal":
        return _temporal(frames, layout)
    if passes is not None:
        words = or_nothing(words)
    if kind == "spatial":
        return _spatial(frames, words, layout, passes)
    if kind == "full" and passes is None:
        return _causal(frames, words, layout)
    return _frame_by_frame(frames, words, layout, window if kind == "window" else max(layout.lengths), passes)


def or_nothing(words: QKV) -> QKV:
    """Where there are no words, a key of zeros: a masked position of which nothing is known yet must look at something."""
    return words if words.k.shape[1] else QKV(*(x.new_zeros(len(x), 1, *x.shape[2:]) for x in words))


def _causal(frames: QKV, words: QKV, layout: Layout) -> Tensor:
    def compute(group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [n, T, P, heads, D]
        # The words' queries are there for the causal mask to have its corner; what they see is computed elsewhere.
        whole = QKV(*(torch.cat([w[group.clips], x.flatten(1, 2)], dim=1) for w, x in zip(words, (q, k, v), strict=True)))
        return attend(whole.q, whole.k, whole.v, causal=True)[:, layout.words :].unflatten(1, q.shape[1:3])

    return layout.per_group(compute, *(x[0] for x in frames))[None]


def _spatial(frames: QKV, words: QKV, layout: Layout, passes: Passes | None) -> Tensor:
    q, k, v = frames.q.transpose(0, 1).flatten(1, 2), frames.k[0], frames.v[0]  # [F, S*P, heads, D], [F, P, heads, D]
    if words.k.shape[1]:
        k, v = torch.cat([words.k[layout.clip], k], dim=1), torch.cat([words.v[layout.clip], v], dim=1)
    if passes is not None:
        assert passes.mask is not None
        y = attend(q, k, v, passes.mask.to(q.dtype))
    elif words.k.shape[1]:
        y = attend(q, k, v, causal_tail(q.shape[1], k.shape[1], q.device))
    else:
        y = attend(q, k, v, causal=True)
    return y.unflatten(1, (layout.streams, -1)).transpose(0, 1)


def _temporal(frames: QKV, layout: Layout) -> Tensor:
    def lanes(x: Tensor) -> Tensor:  # [n, T, P, heads, D] -> [n*P, T, heads, D]
        return x.transpose(1, 2).flatten(0, 1)

    def back(y: Tensor, like: Tensor) -> Tensor:
        return y.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)

    def clean(_: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return back(attend(lanes(q), lanes(k), lanes(v), causal=True), q)

    def masked(group: Group, q: Tensor, k: Tensor, v: Tensor, k_own: Tensor, v_own: Tensor) -> Tensor:
        square = torch.ones(group.length, group.length, dtype=torch.bool, device=q.device)
        mask = torch.cat([square.tril(-1), torch.eye(group.length, dtype=torch.bool, device=q.device)], dim=1)
        keys, values = torch.cat([lanes(k), lanes(k_own)], dim=1), torch.cat([lanes(v), lanes(v_own)], dim=1)
        return back(attend(lanes(q), keys, values, mask), q)

    q, k, v = frames
    parts = [layout.per_group(clean, q[0], k[0], v[0])]
    if layout.streams == 2:
        parts.append(layout.per_group(masked, q[1], k[0], v[0], k[1], v[1]))
    return torch.stack(parts)


def _frame_by_frame(frames: QKV, words: QKV, layout: Layout, reach: int, passes: Passes | None) -> Tensor:
    # In passes computed again in the backward pass: masks of all frames and layers would take more room than all else.
    again = functools.partial(checkpoint, _attend_near, use_reentrant=False, preserve_rng_state=False)
    attend_near: Callable[..., Tensor] = _attend_near if passes is None else again

    def compute(group: Group, q: Tensor, k: Tensor, v: Tensor, *numbers: Tensor) -> Tensor:  # [n, T, S*P, ...], [n, T, P, ...]
        # Taken apart once and put together per frame: the gradient of a slice would be as large as the whole clip.
        queries, keys, values = (x.unbind(1) for x in (q, k, v))
        k_words, v_words = words.k[group.clips], words.v[group.clips]
        seen = []
        for t in range(group.length):
            near = slice(max(0, t - reach + 1), t + 1)
            seen.append(attend_near(queries[t], [k_words, *keys[near]], [v_words, *values[near]], *(one[:, t] for one in numbers)))
        return torch.stack(seen, dim=1)

    given = [frames.q.movedim(0, 1).flatten(1, 2), frames.k[0], frames.v[0]] + ([] if passes is None else [passes.numbers])
    return layout.per_group(compute, *given).unflatten(1, (layout.streams, -1)).transpose(0, 1)


def _attend_near(q: Tensor, keys: list[Tensor], values: list[Tensor], numbers: Tensor | None = None) -> Tensor:
    """Of the positions of a frame (in passes, with `numbers` [n, P], twice) to words and to some frames, of which it is the last."""
    k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
    if numbers is None:
        return attend(q, k, v, causal_tail(q.shape[1], k.shape[1], k.device))
    return attend(q, k, v, seen_of_frame(numbers, k.shape[1] - numbers.shape[1], q.dtype))
