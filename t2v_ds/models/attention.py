"""What a position may look at, computed without ever building a mask over the whole clip.

    layer's kind    token (one after another)                 frame (clean stream c, masked stream m)
    full            words, all positions before, itself       words, frames up to t of c | before t of c, and t of m
    window          the same in the last n frames             the same in the last n frames
    spatial         words, its frame up to itself             words, its whole frame of its own stream
    temporal        its place in the frames up to t           its place up to t of c | before t of c, and t of m

Everything is a few calls of `scaled_dot_product_attention`: one for full causal attention, one for all frames within
themselves, one for all places along time, and one a frame for windows and for whole frames. Masks are at most as large as a frame
is against what it sees. FlexAttention is not used: on the CPU it has no backward pass and falls back to a dense mask without saying so.

The masked stream beside the clean one is complete teacher forcing (Zhou et al. 2025, "Taming Teacher Forcing for Masked
Autoregressive Video Generation"): a frame is guessed after frames as they are, as it will be when clips are drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from t2v_ds.models.layout import Group, Layout

SHORT = 128 * 64  # queries times keys up to which plain products beat torch's fused kernel on the CPU (its backward: 3 to 12 times)


class QKV(NamedTuple):
    """Queries [..., heads, head width], keys and values [..., kv heads, head width] of the same positions."""

    q: Tensor
    k: Tensor
    v: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention: q [n, L, heads, D], k and v [n, M, kv heads, D] -> [n, L, heads, D]; `mask`: bool [L, M], True: is seen."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.shape[2] > 1 and q.shape[2] * k.shape[2] <= SHORT:
        if causal:
            mask = causal_tail(q.shape[2], k.shape[2], q.device)
        return _attend_short(q, k, v, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` of [n, heads, L, D], with all weights at once."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(v.dtype) @ v


def causal_tail(queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask of queries that are the last of the keys, each seeing those up to itself: bool [queries, keys]."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attend_words(words: QKV) -> Tensor:
    """Of each word to the words up to it: [B, W, heads, D]."""
    return attend(*words, causal=True)


def attend_frames(kind: str, frames: QKV, words: QKV, layout: Layout, window: int) -> Tensor:
    """Attention of the positions of frames.

    Args:
        kind: "full", "window", "spatial" or "temporal".
        frames: [S, F, P, heads, D].
        words: [B, W, heads, D], W may be 0; "temporal" does not look at them.
        layout: of the frames, whose P may be larger than its own; with 1 stream positions see those up to themselves, with 2 whole frames.
        window: frames that "window" sees, the own one included.

    Returns:
        [S, F, P, heads, D]
    """
    if kind == "spatial":
        return _spatial(frames, words, layout)
    if kind == "temporal":
        return _temporal(frames, layout)
    if kind == "full" and layout.streams == 1:
        return _causal(frames, words, layout)
    return _frame_by_frame(frames, words, layout, window if kind == "window" else max(layout.lengths))


def _causal(frames: QKV, words: QKV, layout: Layout) -> Tensor:
    def compute(group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [n, T, P, heads, D]
        # The words' queries are there for the causal mask to have its corner; what they see is computed elsewhere.
        whole = QKV(*(torch.cat([w[group.clips], x.flatten(1, 2)], dim=1) for w, x in zip(words, (q, k, v), strict=True)))
        return attend(whole.q, whole.k, whole.v, causal=True)[:, layout.words :].unflatten(1, q.shape[1:3])

    return layout.per_group(compute, *(x[0] for x in frames))[None]


def _spatial(frames: QKV, words: QKV, layout: Layout) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in frames)  # [S*F, P, heads, D]
    causal = layout.streams == 1
    if layout.words:
        clip = layout.clip.repeat(layout.streams)
        k, v = torch.cat([words.k[clip], k], dim=1), torch.cat([words.v[clip], v], dim=1)
        y = attend(q, k, v, causal_tail(q.shape[1], k.shape[1], q.device) if causal else None)
    else:
        y = attend(q, k, v, causal=causal)
    return y.unflatten(0, (layout.streams, layout.frames))


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


def _frame_by_frame(frames: QKV, words: QKV, layout: Layout, reach: int) -> Tensor:
    causal = layout.streams == 1

    def compute(group: Group, *streams: Tensor) -> Tensor:  # q, k, v of a stream, of the next: [n, T, P, heads, D]
        # Taken apart once and put together per frame: the gradient of a slice would be as large as the whole clip.
        (q, k, v), own = (x.unbind(1) for x in streams[:3]), [x.unbind(1) for x in streams[3:]]
        k_words, v_words = words.k[group.clips], words.v[group.clips]
        clean, masked = [], []
        for t in range(group.length):
            before = slice(max(0, t - reach + 1), t)
            k_before, v_before = [k_words, *k[before]], [v_words, *v[before]]
            keys = torch.cat([*k_before, k[t]], dim=1)
            mask = causal_tail(q[t].shape[1], keys.shape[1], keys.device) if causal else None
            clean.append(attend(q[t], keys, torch.cat([*v_before, v[t]], dim=1), mask))
            if not causal:
                q_own, k_own, v_own = (x[t] for x in own)
                masked.append(attend(q_own, torch.cat([*k_before, k_own], dim=1), torch.cat([*v_before, v_own], dim=1)))
        y = torch.stack(clean, dim=1)
        return y if causal else torch.stack([y, torch.stack(masked, dim=1)], dim=2)  # [n, T, (S,) P, heads, D]

    parts = [x[stream] for stream in range(layout.streams) for x in frames]
    y = layout.per_group(compute, *parts)
    return y[None] if causal else y.transpose(0, 1)
