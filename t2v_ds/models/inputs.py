"""What the positions of frames are fed.

    decoding "frame":  codes of the position (or "masked") + codes around it
    decoding "token":  codes of the position before        + codes in the rows above
    both:              + codes around it in the frame before + place + number of the frame + caption (+ what the last frame shows there)

What moves, moves little, and edges go on: convolutions over what is drawn already tell it to the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_ds.config import TransformerConfig


@dataclass
class Goals:
    """The last frames of clips where they are given."""

    groups: Tensor  # int64 [B, P, G]; of clips without, anything
    given: Tensor  # bool [B]
    lengths: Tensor  # int64 [B]: frames of the whole clip


@dataclass
class Where:
    """Which positions are fed: some rows of all frames."""

    clip: Tensor  # int64 [F]
    number: Tensor  # int64 [F]: of the frame in its clip
    first: int  # row of the frame
    end: int  # row behind the last


class Inputs(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, self.side = config, config.side
        width = config.width
        self.tables = nn.ModuleList(nn.Embedding(config.codebook_size, width) for _ in range(config.slots))
        self.margin = config.neighbourhood // 2
        size = config.neighbourhood
        rows_of_own = size if config.decoding == "frame" else self.margin  # of the rows above alone, or of all around
        self.around_before = nn.Conv2d(width, width, size, bias=False) if size else None
        self.around_own = nn.Conv2d(width, width, (rows_of_own, size), bias=False) if rows_of_own else None
        self.start = nn.Parameter(torch.zeros(width)) if config.decoding == "token" else None  # before the first position of a clip
        self.masked = nn.Parameter(torch.zeros(width)) if config.decoding == "frame" else None
        self.place = nn.Embedding(config.positions, width) if config.learned_positions else None
        self.time = nn.Embedding(config.max_frames, width) if config.learned_positions else None
        self.goal = nn.Conv2d(width, width, max(1, size), bias=False) if config.last_frame else None
        self.remaining = nn.Embedding(config.max_frames, width) if config.last_frame else None  # frames until the last one

    def embed(self, groups: Tensor) -> Tensor:
        """Groups [..., G], -1 where a position is masked -> [..., width]."""
        hidden = groups[..., :1] < 0
        known = groups.clamp_min(0)
        embedded: Tensor = self.tables[0](known[..., 0])
        for slot in range(1, self.config.slots):
            embedded = embedded + self.tables[slot](known[..., slot])
        return embedded if self.masked is None else torch.where(hidden, self.masked, embedded)

    def forward(
        self, streams: Sequence[Tensor], before: Tensor, opens: Tensor, caption: Tensor, where: Where, goals: Goals | None = None
    ) -> Tensor:
        """Inputs of rows of frames.

        Args:
            streams: of each stream int64 [F, P, G], the frames, of which decoding "token" sees what lies before each position.
            before: int64 [F, P, G], the frame before each of them.
            opens: bool [F], where there is none.
            caption: [B, width].
            where: which rows, of which clips and frames.
            goals: last frames that are given.

        Returns:
            [S, F, rows * side, width]
        """
        standing = self.standing(before, opens, caption, where, goals)
        return torch.stack([(self.moving(current, before, opens, where) + standing).flatten(1, 2) for current in streams])

    def moving(self, current: Tensor, before: Tensor, opens: Tensor, where: Where) -> Tensor:
        """The part of the inputs that depends on the frame itself: [F, rows, side, width]; see `forward`."""
        own = self.rows(current, where)  # [F, rows and margins, side, width]
        x = own[:, self.margin : own.shape[1] - self.margin]
        if self.config.decoding == "token":
            x = self._codes_before(x, current, before, opens, where)
        return x + self.near_own(own)

    def standing(self, before: Tensor, opens: Tensor, caption: Tensor, where: Where, goals: Goals | None = None) -> Tensor:
        """The part of the inputs that does not depend on the frame itself: [F, rows, side, width]; see `forward`."""
        past = self.rows(before, where).masked_fill(opens[:, None, None, None], 0)
        x = self._convolve(self.around_before, past) + self._told(caption, where)[:, None, None]
        if self.place is not None:
            places = torch.arange(where.first * self.side, where.end * self.side, device=x.device)
            x = x + self.place(places).unflatten(0, (-1, self.side))
        if self.goal is not None:
            x = x + self._goal(goals, where)
        return x

    def near_own(self, own: Tensor) -> Tensor:
        """Embeddings [F, rows and margins, side, width] of the frame itself -> [F, rows, side, width]."""
        if self.config.decoding == "token" and self.around_own is not None:
            own = own[:, : own.shape[1] - 1 - self.margin]  # the last row that a row of ours sees is the one above it
        return self._convolve(self.around_own, own)

    def _convolve(self, convolution: nn.Module | None, x: Tensor) -> Tensor:
        if convolution is None:  # of no neighbourhood, or of one that reaches no row above
            return torch.zeros_like(x[:, self.margin : x.shape[1] - self.margin])
        padded = F.pad(x, (0, 0, self.margin, self.margin)).permute(0, 3, 1, 2)
        y: Tensor = convolution(padded).permute(0, 2, 3, 1)
        return y

    def rows(self, groups: Tensor, where: Where) -> Tensor:
        """Embed some rows of frames [F, P, G] with a margin above and below, zeros outside: [F, rows + 2 margin, side, width]."""
        first, end = max(0, where.first - self.margin), min(self.side, where.end + self.margin)
        embedded = self.embed(groups[:, first * self.side : end * self.side]).unflatten(1, (-1, self.side))
        return F.pad(embedded, (0, 0, 0, 0, first - where.first + self.margin, where.end + self.margin - end))

    def _codes_before(self, own: Tensor, current: Tensor, before: Tensor, opens: Tensor, where: Where) -> Tensor:
        """For each position the embedding of the one before it in raster order, in the frame before if it is the first."""
        flat = own.flatten(1, 2)
        assert self.start is not None
        if where.first:
            at = where.first * self.side - 1
            # Used though it adds nothing: ranks that share a clip must have the same gradients to exchange.
            previous = self.embed(current[:, at : at + 1]) + 0 * self.start
        else:
            previous = torch.where(opens[:, None, None], self.start, self.embed(before[:, -1:]))
        return torch.cat([previous, flat[:, :-1]], dim=1).view_as(own)

    def _told(self, caption: Tensor, where: Where) -> Tensor:
        """What is the same at every place of a frame: [F, width]."""
        told = caption[where.clip]
        return told if self.time is None else told + self.time(where.number)

    def _goal(self, goals: Goals | None, where: Where) -> Tensor:
        assert self.goal is not None and self.remaining is not None
        if goals is None:
            return torch.zeros((), device=where.clip.device)
        rows = self.rows(goals.groups, where)
        near = self._convolve(self.goal, rows) * goals.given[:, None, None, None]  # [B, rows, side, width]
        left = (goals.lengths[where.clip] - 1 - where.number).clamp_min(0)
        return near[where.clip] + (self.remaining(left) * goals.given[where.clip, None])[:, None, None]
