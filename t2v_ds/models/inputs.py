"""What the positions of frames are fed.

    decoding "frame":  codes of the position (or "masked") + codes around it, of those that it may see
    decoding "token":  codes of the position before        + codes in the rows above
    both:              + codes around it in the frame before + place + number of the frame + caption (+ what the last frame shows there)

What moves, moves little, and edges go on: convolutions over what is drawn already tell it to the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_ds.config import TransformerConfig

NEVER = 2**62  # the pass of places outside the frame


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


def computed_in(weight: Tensor) -> torch.dtype:
    """The type of what a layer with this weight computes: its own, or what autocast asks for."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class Around(nn.Conv2d):
    """What positions are fed of the codes around them, for decoding "frame": a convolution in which each sees what it may see."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, width, size, bias=False)
        self.size = size

    def flat(self) -> Tensor:
        """The weights as a matrix, in the type that autocast asks for: [width, size^2 * width], place by place, row by row."""
        return self.weight.flatten(2).mT.flatten(1).to(computed_in(self.weight))

    def forward(self, own: Tensor, passes: Tensor, where: Where, unknown: Tensor) -> Tensor:  # type: ignore[override]
        """Known positions see those up to their pass, masked ones those of the passes before; `unknown` stands for all others.

        Args:
            own: embeddings [F, rows and margins, side, width].
            passes: int64 [F, side, side], of whole frames.
            where: which rows.
            unknown: [width]

        Returns:
            [2, F, rows, side, width]
        """
        side, margin, rows = passes.shape[-1], self.size // 2, where.end - where.first
        grid = F.pad(passes, [margin] * 4, value=NEVER)[:, where.first : where.end + 2 * margin]
        places = self.weight.flatten(2).permute(2, 0, 1).flatten(0, 1)  # [size^2 * width, width]
        added = F.linear(F.pad(own, (0, 0, margin, margin)), places).unflatten(-1, (self.size**2, -1))
        instead = F.linear(unknown, places).unflatten(-1, (self.size**2, -1)).to(added.dtype)
        asking = grid[:, margin : margin + rows, margin : margin + side]
        near, hidden = torch.zeros((), device=own.device, dtype=added.dtype), []
        for place, codes in enumerate(added.unbind(-2)):  # apart, as the gradient of a slice is as large as what it is cut from
            down, right = slice(place // self.size, place // self.size + rows), slice(place % self.size, place % self.size + side)
            asked = grid[:, down, right]
            seen = torch.stack([asked <= asking, asked < asking])[..., None]  # [2, F, rows, side, 1]
            near = near + seen.to(added.dtype) * codes[:, down, right]
            hidden.append(((asked != NEVER)[..., None] & ~seen).to(added.dtype))
        return near + torch.cat(hidden, dim=-1) @ instead


class Inputs(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, self.side = config, config.side
        width = config.width
        self.tables = nn.ModuleList(nn.Embedding(config.codebook_size, width) for _ in range(config.slots))
        self.margin = config.neighbourhood // 2
        size = config.neighbourhood
        self.around_before = nn.Conv2d(width, width, size, bias=False) if size else None
        self.around_own: nn.Module | None
        if config.decoding == "frame":
            self.around_own = Around(width, size) if size else None
        else:  # of the rows above
            self.around_own = nn.Conv2d(width, width, (self.margin, size), bias=False) if self.margin else None
        self.start = nn.Parameter(torch.zeros(width)) if config.decoding == "token" else None  # before the first position of a clip
        self.unknown = nn.Parameter(torch.zeros(width)) if config.decoding == "frame" else None
        self.place = nn.Embedding(config.positions, width) if config.learned_positions else None
        self.time = nn.Embedding(config.max_frames, width) if config.learned_positions else None
        self.goal = nn.Conv2d(width, width, max(1, size), bias=False) if config.last_frame else None
        self.remaining = nn.Embedding(config.max_frames, width) if config.last_frame else None  # frames until the last one
        convolutions = ("around_before", "around_own", "goal")
        self.hidden_matrices: dict[str, list[int]] = {name: [] for name in convolutions if getattr(self, name) is not None}

    def embed(self, groups: Tensor) -> Tensor:
        """Groups [..., G], -1 where a position is masked -> [..., width]."""
        hidden = groups[..., :1] < 0
        known = groups.clamp_min(0)
        embedded: Tensor = self.tables[0](known[..., 0])
        for slot in range(1, self.config.slots):
            embedded = embedded + self.tables[slot](known[..., slot])
        return embedded if self.unknown is None else torch.where(hidden, self.unknown, embedded)

    def forward(
        self, current: Tensor, before: Tensor, opens: Tensor, caption: Tensor, where: Where, goals: Goals | None = None,
        passes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Inputs of rows of frames.

        Args:
            current: int64 [F, P, G], the frames.
            before: int64 [F, P, G], the frame before each of them.
            opens: bool [F], where there is none.
            caption: [B, width].
            where: which rows, of which clips and frames.
            goals: last frames that are given.
            passes: int64 [F, P], for decoding "frame": in which pass each position is told.

        Returns:
            [S, F, rows * side, width]: of what lies before each position, or with `passes` of known and of masked positions.
        """
        standing = self.standing(before, opens, caption, where, goals)
        own = self.rows(current, where)  # [F, rows and margins, side, width]
        x = own[:, self.margin : own.shape[1] - self.margin]
        if passes is None:
            moving = (self._codes_before(x, current, before, opens, where) + self.near_own(own))[None]
        else:
            assert self.unknown is not None
            moving = torch.stack([x, self.unknown.to(x.dtype).expand_as(x)])
            if self.around_own is not None:
                moving = moving + self.around_own(own, passes.unflatten(1, (self.side, self.side)), where, self.unknown)
        return (moving + standing).flatten(2, 3)

    def some(self, current: Tensor, positions: Tensor, around: Tensor | None) -> Tensor:
        """The part of the inputs that depends on the frame itself, of some of its positions, for decoding "frame".

        Args:
            current: int64 [B, P, G], -1 where a position is masked.
            positions: int64 [B, n]: which of them.
            around: the flat weights of `around_own`, which are the same for all positions of all frames; None: without it.

        Returns:
            [B, n, width]
        """
        own, clips = self.embed(current), torch.arange(len(current), device=current.device)[:, None]
        x = own[clips, positions]
        if around is None:
            return x
        padded = F.pad(own.to(around.dtype).unflatten(1, (self.side, self.side)), (0, 0, *[self.margin] * 4))
        row, column = (positions // self.side)[..., None], (positions % self.side)[..., None]
        offsets = torch.arange(self.config.neighbourhood**2, device=current.device)
        near = padded[clips[..., None], row + offsets // self.config.neighbourhood, column + offsets % self.config.neighbourhood]
        return x + F.linear(near.flatten(2), around)

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
        """What decoding "token" is fed of the rows above: embeddings [F, rows and margins, side, width] -> [F, rows, side, width]."""
        if self.around_own is not None:
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
