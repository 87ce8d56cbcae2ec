"""Clips of different lengths without padding: what lies where when they stand one behind the other.

    words [B, W] of all clips, then frames [F, P] clip after clip; with two streams once more, masked: rows [B*W + S*F*P]

F is the sum of the lengths. Only attention along time needs clips side by side, and there those of one length form a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The clips of one length."""

    length: int
    clips: Tensor  # int64 [n]
    frames: Tensor  # int64 [n, length]: their frames among the F


class Layout:
    """See the module's docstring. Made of plain numbers, so that nothing waits for a device.

    Args:
        lengths: frames of each clip.
        words: positions of a clip's prefix, W; 0: there is none.
        positions: of a frame that are here, P.
        streams: 1, or 2: all frames as they are, then all frames masked.
        device: of the index tensors.
    """

    def __init__(
        self, lengths: Sequence[int], words: int, positions: int, streams: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.lengths, self.words, self.positions, self.streams = tuple(lengths), words, positions, streams
        self.clips, self.frames = len(self.lengths), sum(self.lengths)
        firsts = [sum(self.lengths[:clip]) for clip in range(self.clips)]

        def tensor(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        self.clip_lengths = tensor(self.lengths)  # [B]
        self.clip = tensor([clip for clip, length in enumerate(self.lengths) for _ in range(length)])  # [F]
        self.number = tensor([number for length in self.lengths for number in range(length)])  # [F]: in what is given of its clip
        self.groups = []
        for length in sorted(set(self.lengths) - {0}):
            clips = [clip for clip, own in enumerate(self.lengths) if own == length]
            frames = [list(range(firsts[clip], firsts[clip] + length)) for clip in clips]
            self.groups.append(Group(length, tensor(clips), tensor(frames)))
        order = torch.cat([group.frames.flatten() for group in self.groups]) if self.groups else self.clip
        self._inverse = None if len(self.groups) <= 1 else order.argsort()

    def per_group(self, compute: Callable[..., Tensor], *frames: Tensor) -> Tensor:
        """Compute on the clips of each length: compute(group, [n, T, ...], ...) -> [n, T, ...]; frames and result are [F, ...]."""
        parts = []
        for group in self.groups:
            taken = [x.unflatten(0, group.frames.shape) if self._inverse is None else x[group.frames] for x in frames]
            parts.append(compute(group, *taken).flatten(0, 1))
        return parts[0] if self._inverse is None else torch.cat(parts)[self._inverse]

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B*W + S*F*P, ...] -> words [B, W, ...], frames [S, F, P, ...]."""
        words, frames = rows.split([self.clips * self.words, len(rows) - self.clips * self.words])
        return words.unflatten(0, (self.clips, self.words)), frames.unflatten(0, (self.streams, self.frames, self.positions))

    def join(self, words: Tensor, frames: Tensor) -> Tensor:
        """The opposite of `split`."""
        return torch.cat([words.flatten(0, 1), frames.flatten(0, 2)]) if self.words else frames.flatten(0, 2)

    def clip_sums(self, values: Tensor) -> Tensor:
        """Values of the frames [F] -> their sums a clip [B]."""
        member = self.clip == torch.arange(self.clips, device=values.device)[:, None]  # [B, F]
        return (values * member).sum(1)
