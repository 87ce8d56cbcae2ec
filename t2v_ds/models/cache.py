"""Keys and values of what is drawn already, so that drawing computes only what is new.

    full      [B, W + T*P]  words, then frame after frame; grows by doubling
    window    [B, W + n*P]  the oldest frame makes place for a new one
    spatial   [B, W + P]    the same with a window of one frame
    temporal  [B, P, T]     a lane for each place

What is written for a frame may be written again: a masked frame's keys are replaced by those of the next pass, and at last by those
of the finished frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2v_ds.models.attention import QKV, attend, causal_tail


class LayerCache:
    """Of one layer. `reach`: frames that it sees, the own one included; 0: all."""

    def __init__(self, kind: str, window: int, positions: int) -> None:
        self.kind, self.positions = kind, positions
        self.reach = {"full": 0, "window": window, "spatial": 1, "temporal": 0}[kind]
        self.words = 0
        self._first = 0  # the oldest frame held
        self._keys = self._values = torch.empty(0)  # until the first keys say on what device and of what kind

    def set_words(self, words: QKV) -> None:
        """Begin with the words' keys and values [B, W, kv heads, D]."""
        b, self.words, heads, width = words.k.shape
        if self.kind == "temporal":
            self._keys, self._values = (x.new_empty(b, self.positions, 4, heads, width) for x in (words.k, words.v))
        else:
            room = (self.reach or 2) * self.positions
            self._keys, self._values = (torch.cat([x, x.new_empty(b, room, heads, width)], dim=1) for x in (words.k, words.v))

    def attend(self, new: QKV, frame: int, positions: slice | Tensor, causal: bool) -> Tensor:
        """Keep the keys of `positions` of `frame`, the last so far, and attend to all that they may see.

        Args:
            new: [B, n, heads, D]; there may be fewer queries.
            positions: a slice that has n of them; "temporal" also takes each clip's own, int64 [B, n].
            causal: whether each of them sees only those up to itself.
        """
        if not self._keys.numel():
            self.set_words(QKV(*(x[:, :0] for x in new)))
        if self.kind == "temporal":
            return self._attend_lanes(new, frame, positions)
        assert isinstance(positions, slice)
        if self.reach and frame - self._first >= self.reach:
            self._shift(frame - self._first - self.reach + 1)
        begin = self.words + (frame - self._first) * self.positions + (positions.start or 0)
        end = begin + new.k.shape[1]
        if end > self._keys.shape[1]:
            self._grow(1)
        self._keys[:, begin:end], self._values[:, begin:end] = new.k, new.v
        keys, values = self._keys[:, :end], self._values[:, :end]
        mask = causal_tail(new.q.shape[1], end, new.q.device) if causal and new.q.shape[1] > 1 else None
        return attend(new.q, keys, values, mask)

    def _attend_lanes(self, new: QKV, frame: int, positions: slice | Tensor) -> Tensor:
        if frame >= self._keys.shape[2]:
            self._grow(2)
        clips = slice(None) if isinstance(positions, slice) else torch.arange(len(new.k), device=new.k.device)[:, None]
        self._keys[clips, positions, frame], self._values[clips, positions, frame] = new.k, new.v
        keys, values = (x[clips, positions, : frame + 1].flatten(0, 1) for x in (self._keys, self._values))
        return attend(new.q.flatten(0, 1)[:, None], keys, values).view_as(new.q)

    def _shift(self, frames: int) -> None:
        held = self.words + self.reach * self.positions
        for x in (self._keys, self._values):
            x[:, self.words : held - frames * self.positions] = x[:, self.words + frames * self.positions : held].clone()
        self._first += frames

    def _grow(self, dim: int) -> None:
        self._keys, self._values = (torch.cat([x, torch.empty_like(x)], dim=dim) for x in (self._keys, self._values))
