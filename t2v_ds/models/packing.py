"""Clips of different lengths without padding: what lies where when they stand one behind the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Packing:
    """Packs the valid positions of a padded batch, and unpacks them: [B, L, ...] <-> [N, ...].

    `groups` holds, where lengths differ much, for clips of like length their rows of the packed batch and a packing of
    their own: attention pads a clip to at most twice its own length, however long the longest of the batch is.
    """

    def __init__(self, lengths: Tensor, longest: int) -> None:
        self.shape = (len(lengths), longest)
        valid = torch.arange(longest, device=lengths.device)[None] < lengths[:, None]  # [B, L]
        self.full = bool(valid.all())
        self.index = valid.flatten().nonzero().flatten()  # [N]
        self.groups: list[tuple[Tensor, Packing]] = []
        octave = lengths.clamp_min(1).log2().floor().long()  # [B]
        if bool((octave != octave[0]).any()):
            clip = self.index // longest  # [N]
            for one in octave.unique():
                rows = (octave[clip] == one).nonzero().flatten()
                members = lengths[octave == one]
                self.groups.append((rows, Packing(members, int(members.max()))))

    def pack(self, padded: Tensor) -> Tensor:
        """[B, L, ...] -> [N, ...]."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.full else flat[self.index]

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, ...] -> [B, L, ...], zeros where nothing is."""
        if self.full:
            return packed.view(*self.shape, *packed.shape[1:])
        flat = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return flat.index_copy(0, self.index, packed).view(*self.shape, *packed.shape[1:])


class Layout:
    """Where the parts of a batch of clips lie when they are packed: clip after clip its prefix, its frames, its end.

    Args:
        lengths: int64 [B], frames of each clip.
        prefix: positions of each clip's prefix, W.
        positions: of a frame, P.
    """

    def __init__(self, lengths: Tensor, prefix: int, positions: int) -> None:
        device, clips = lengths.device, len(lengths)
        self.lengths = lengths
        self.clip = torch.arange(clips, device=device).repeat_interleave(lengths)  # [F]: the clip of each frame
        first = lengths.cumsum(0) - lengths  # [B]: each clip's first frame
        self.number = torch.arange(len(self.clip), device=device) - first[self.clip]  # [F]: the frame's number in what is given
        total = prefix + lengths * positions + 1  # [B]
        start = total.cumsum(0) - total
        frame = (start[self.clip] + prefix + self.number * positions)[:, None] + torch.arange(positions, device=device)  # [F, P]
        words = start[:, None] + torch.arange(prefix, device=device)  # [B, W]
        self._rows = torch.cat([words.flatten(), frame.flatten(), start + total - 1])
        self._sizes = [words.numel(), frame.numel(), clips]
        self.packing = Packing(total, int(total.max()))

    def pack(self, prefix: Tensor, frames: Tensor, ends: Tensor) -> Tensor:
        """[B*W, width], [F*P, width], [B, width] -> packed [N, width]."""
        parts = torch.cat([prefix, frames, ends])
        return torch.empty_like(parts).index_copy(0, self._rows, parts)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Packed [N, width] -> frames [F*P, width], ends [B, width]."""
        _, frames, ends = packed[self._rows].split(self._sizes)
        return frames, ends

    def clip_sums(self, values: Tensor) -> Tensor:
        """Values of the frames [F] -> their sums a clip [B]."""
        member = self.clip == torch.arange(len(self.lengths), device=values.device)[:, None]  # [B, F]
        return (values * member).sum(1)
