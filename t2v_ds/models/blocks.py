"""The layers of the transformer.

    x -> norm -> queries, keys (normalised, turned by their place), values -> attention -> + x
      -> norm -> look at the words                                                      -> + x     (conditioning "cross")
      -> norm -> gated MLP                                                              -> + x

Pre-norm with RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), normalised queries and keys (Dehghani et al. 2023), grouped
queries (Ainslie et al. 2023), rotary embeddings (Su et al. 2021) along three axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_ds.config import TransformerConfig
from t2v_ds.models.attention import QKV, Passes, attend, attend_frames, attend_words
from t2v_ds.models.cache import LayerCache, New
from t2v_ds.models.layout import Layout

ROTARY_BASE = 100.0  # of places that differ by tens, not by thousands (Heo et al. 2024, "Rotary Position Embedding for Vision Transformer")


class SequenceParallel(Protocol):
    """Ranks that hold the frames' positions in equal parts, rank after rank, and heads instead while they attend."""

    size: int
    rank: int

    def attend(self, attention: Callable[[QKV], Tensor], frames: QKV) -> Tensor:
        """Call `attention` with all positions of this rank's heads: [S, F, P / size, heads, D] in and out of this."""
        ...


@dataclass
class Context:
    """What every layer is told about the rows that it computes."""

    layout: Layout
    turns: Tensor | None  # of the rows' queries and keys: complex64 [N, 1, D / 2]
    words: Tensor | None = None  # [B, W, width], for layers that look at them apart
    parallel: SequenceParallel | None = None
    passes: Passes | None = None  # of all positions of the frames, where they are told in passes
    caches: list[LayerCache] | None = None
    new: New | None = None  # with caches, where the rows stand


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), in fp32 whatever comes in: bf16 has no fused kernel on the CPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> fp32 [..., width]."""
        return F.rms_norm(x.float(), (len(self.weight),), self.weight, 1e-6)


def rotary_turns(time: Tensor, row: Tensor, column: Tensor, head_width: int) -> Tensor:
    """Turns of positions as unit complex numbers: three times int64 [N] -> complex64 [N, 1, head_width / 2].

    A third of the pairs of numbers turns with the row, a third with the column, the rest with time.
    """
    pairs = head_width // 2
    along = pairs // 3
    angles = []
    for place, count in ((time, pairs - 2 * along), (row, along), (column, along)):
        frequencies = ROTARY_BASE ** (-torch.arange(count, device=place.device) / max(1, count))
        angles.append(place[:, None].float() * frequencies)
    angle = torch.cat(angles, dim=1)[:, None]
    return torch.polar(torch.ones_like(angle), angle)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Turn fp32 [N, heads, D] by complex64 [N, 1, D / 2]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


class Attention(nn.Module):
    """Queries, keys and values, of which `kind` says who sees whom."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.kind, self.window, self.layer = config.layer_attention(layer), config.window_frames, layer
        self.causal = config.decoding == "token"
        head_width = config.width // config.heads
        self.heads = [config.heads, config.kv_heads, config.kv_heads]
        self.qkv = nn.Linear(config.width, sum(self.heads) * head_width, bias=False)
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.hidden_matrices = {"qkv": [heads * head_width for heads in self.heads], "out": []}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[N, width] -> [N, width]"""
        q, k, v = self.qkv(x).unflatten(1, (sum(self.heads), -1)).split(self.heads, dim=1)  # [N, heads, D]
        q, k = self.query_norm(q), self.key_norm(k)
        if context.turns is not None:
            q, k = turn(q, context.turns), turn(k, context.turns)
        y: Tensor = self.out(self._attend(QKV(q.to(v.dtype), k.to(v.dtype), v), context).flatten(1))
        return y

    def _attend(self, rows: QKV, context: Context) -> Tensor:
        layout = context.layout
        if context.caches is not None and context.new is not None:
            new = QKV(*(x.unflatten(0, (layout.clips, -1)) for x in rows))
            return context.caches[self.layer].attend(new, context.new, self.causal).flatten(0, 1)
        parts = [layout.split(x) for x in rows]
        words, frames = QKV(*(part[0] for part in parts)), QKV(*(part[1] for part in parts))
        if context.caches is not None:
            context.caches[self.layer].set_words(words)
        seen = attend_words(words) if layout.words else words.q
        return layout.join(seen, self._attend_frames(frames, words, context) if layout.frames else frames.q)

    def _attend_frames(self, frames: QKV, words: QKV, context: Context) -> Tensor:
        layout, parallel = context.layout, context.parallel
        if parallel is None or self.kind == "temporal":  # places are apart there: nothing to exchange
            return attend_frames(self.kind, frames, words, layout, self.window, context.passes)
        own = QKV(*(x.chunk(parallel.size, dim=2)[parallel.rank] for x in words))
        return parallel.attend(lambda gathered: attend_frames(self.kind, gathered, own, layout, self.window, context.passes), frames)


class WordAttention(nn.Module):
    """Positions look at the words of their caption."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.kv = nn.Linear(config.width, 2 * config.width, bias=False)
        self.query_norm = RMSNorm(config.width // config.heads)
        self.key_norm = RMSNorm(config.width // config.heads)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.hidden_matrices = {"q": [], "kv": [config.width] * 2, "out": []}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[N, width] -> [N, width]; every frame (or block of positions of one) asks the words of its clip."""
        assert context.words is not None
        layout = context.layout
        k, v = self.kv(context.words).unflatten(-1, (2 * self.heads, -1)).chunk(2, dim=2)  # [B, W, heads, D]
        q = self.query_norm(self.q(x).unflatten(-1, (self.heads, -1)))
        clip = layout.clip.repeat(layout.streams)
        q = q.to(v.dtype).unflatten(0, (len(clip), -1))  # [S*F, P, heads, D]
        y: Tensor = self.out(attend(q, self.key_norm(k).to(v.dtype)[clip], v[clip]).flatten(2).flatten(0, 1))
        return y


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        width = config.width
        hidden = -(-int(config.mlp_ratio * width) // 16) * 16
        self.dropout = config.dropout
        self.norm1 = RMSNorm(width)
        self.attention = Attention(config, layer)
        self.norm_words = RMSNorm(width) if config.conditioning == "cross" else None
        self.word_attention = WordAttention(config) if config.conditioning == "cross" else None
        self.norm2 = RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.hidden_matrices = {"gate_up": [hidden] * 2, "down": []}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Rows [N, width] -> [N, width]."""
        x = x + self._drop(self.attention(self.norm1(x), context))
        if self.norm_words is not None and self.word_attention is not None:
            x = x + self._drop(self.word_attention(self.norm_words(x), context))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self._drop(self.down(F.silu(gate) * up))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
