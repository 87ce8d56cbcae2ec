"""Keys and values of what is drawn already, so that drawing computes only what is new.

    full      [B, W + T*P]  words, then frame after frame; grows by doubling
    window    [B, W + n*P]  the oldest frame makes place for a new one
    spatial   [B, W + P]    the same with a window of one frame
    temporal  [B, P, heads, T]  a lane for each place and head

The keys of a frame's positions stand in the order in which they became known. Masked positions are seen by themselves alone, along
time: there their keys stand where those of the known position will.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2v_ds.models.attention import QKV, attend, causal_tail, or_nothing


@dataclass
class New:
    """Where new positions stand, of which the first are `known` and the others masked."""

    frame: int  # the last so far
    positions: slice | Tensor = field(default_factory=lambda: slice(None))  # of all clips, or each clip's own: int64 [B, n]
    done: int = 0  # how many positions of the frame are known already
    known: int | None = None  # None: all of them


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
            self._keys, self._values = (x.new_empty(b, self.positions, heads, 4, width) for x in (words.k, words.v))
        else:
            room = (self.reach or 2) * self.positions
            self._keys, self._values = (torch.cat([x, x.new_empty(b, room, heads, width)], dim=1) for x in (words.k, words.v))

    def attend(self, new: QKV, at: New, causal: bool) -> Tensor:
        """Keep the keys of what is known and attend to all that the new positions may see: [B, n, heads, D].

        Args:
            new: [B, n, heads, D], of positions of the last frame so far: first those that are known, then masked ones.
            at: where they stand.
            causal: whether each of them sees only those up to itself.
        """
        if not self._keys.numel():
            none = QKV(*(x[:, :0] for x in new))
            self.set_words(none if causal or self.kind == "temporal" else or_nothing(none))
        if self.kind == "temporal":
            return self._attend_lanes(new, at)
        if self.reach and at.frame - self._first >= self.reach:
            self._shift(at.frame - self._first - self.reach + 1)
        known = new.k.shape[1] if at.known is None else at.known
        begin = self.words + (at.frame - self._first) * self.positions + at.done
        end = begin + known
        if end > self._keys.shape[1]:
            self._grow(1)
        self._keys[:, begin:end], self._values[:, begin:end] = new.k[:, :known], new.v[:, :known]
        mask = causal_tail(known, end, new.q.device) if causal and known > 1 else None
        return attend(new.q, self._keys[:, :end], self._values[:, :end], mask)

    def _attend_lanes(self, new: QKV, at: New) -> Tensor:
        if at.frame >= self._keys.shape[3]:
            self._grow(3)
        if isinstance(at.positions, slice):
            self._keys[:, at.positions, :, at.frame], self._values[:, at.positions, :, at.frame] = new.k, new.v
            lanes = [x[:, at.positions, :, : at.frame + 1].flatten(0, 1) for x in (self._keys, self._values)]
        else:
            clips = torch.arange(len(new.k), device=new.k.device)[:, None]
            self._keys[clips, at.positions, :, at.frame], self._values[clips, at.positions, :, at.frame] = new.k, new.v
            rows = (clips * self.positions + at.positions).flatten()
            lanes = [x.flatten(0, 1)[:, :, : at.frame + 1].index_select(0, rows) for x in (self._keys, self._values)]
        keys, values = (x.transpose(1, 2) for x in lanes)
        return attend(new.q.flatten(0, 1)[:, None], keys, values).view_as(new.q)

    def _shift(self, frames: int) -> None:
        held = self.words + self.reach * self.positions
        for x in (self._keys, self._values):
            x[:, self.words : held - frames * self.positions] = x[:, self.words + frames * self.positions : held].clone()
        self._first += frames

    def _grow(self, dim: int) -> None:
        self._keys, self._values = (torch.cat([x, torch.empty_like(x)], dim=dim) for x in (self._keys, self._values))
