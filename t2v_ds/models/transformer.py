"""The transformer: text -> codes, frame after frame.

    codes [F, h, w] -> groups [F, P, G]   P positions a frame, each with G = group x group codes
    decoding "token": a position is fed what lies before it, and its state tells its codes
    decoding "frame": a frame is told in passes, some positions in each; all are fed twice, as they are and masked, and the state of a
                      masked one tells its codes
    states -> codes of the position, slot after slot (`head`), and every position's vote on "is this frame the last?"

`inputs` has what positions are fed, `attention` what they may look at, `blocks` the layers, `layout` how clips of different lengths
stand one behind the other: a clip of 17 frames costs 17 frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t2v_ds.config import TransformerConfig
from t2v_ds.models.attention import Passes, seen_of_frame
from t2v_ds.models.blocks import Block, Context, RMSNorm, SequenceParallel, rotary_turns
from t2v_ds.models.cache import LayerCache, New
from t2v_ds.models.head import GroupHead
from t2v_ds.models.inputs import Goals, Inputs, Where, computed_in
from t2v_ds.models.layout import Layout


class Losses(NamedTuple):
    """Of each clip, the mean over its own codes or frames: [B] each.

    With sequence parallelism a rank has those of its positions, weighted so that the mean over the ranks is the clip's.
    """

    codes: Tensor  # nats a code
    end: Tensor  # nats a frame, of "is it the last?"; 0 for parts of clips
    z: Tensor  # log(sum(exp(logits)))^2


class VideoTransformer(nn.Module):
    """See the module's docstring.

    Attributes:
        parallel: ranks among which the positions of each frame are divided; set by the training.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.parallel: SequenceParallel | None = None
        width = config.width
        self.inputs = Inputs(config)
        self.word = nn.Linear(config.text_width, width)
        self.caption = nn.Linear(config.text_width, width)
        self.no_word = nn.Parameter(torch.zeros(width))  # stands behind a caption's last word
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(width)
        self.head = GroupHead(config, self.inputs.tables)
        self.end = nn.Linear(width, 1)
        self.apply(self._init)
        self._init_special()

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _init_special(self) -> None:
        for table in (self.inputs.place, self.inputs.time):  # as loud as the codes that they are added to
            if table is not None:
                nn.init.normal_(table.weight, std=0.3)
        if self.inputs.unknown is not None:
            nn.init.normal_(self.inputs.unknown, std=0.3)
        for layer in (self.word, self.caption):
            nn.init.normal_(layer.weight, std=self.config.text_width**-0.5)
        for name, parameter in self.blocks.named_parameters():  # residual branches start small (Radford et al. 2019)
            if name.endswith((".out.weight", ".down.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5)

    @torch.no_grad()
    def initialise_codes(self, codebook: Tensor) -> None:
        """Start the embeddings and the logits of codes as random projections of the tokenizer's codebook [K, D].

        Codes that look alike then begin alike, and what is learned of one holds for its neighbours; from unrelated
        vectors this alone takes hundreds of steps.
        """
        centred = codebook.float() - codebook.float().mean(0)
        centred = centred / centred.square().mean().sqrt().clamp_min(1e-6)

        def project(weight: Tensor, std: float) -> None:
            weight.copy_(centred @ (torch.randn(centred.shape[1], weight.shape[1]) * std / centred.shape[1] ** 0.5))

        for table in (*self.inputs.tables, *self.head.given):
            project(table.get_parameter("weight"), 0.3)
        if not self.config.tied_head:
            for logits in self.head.logits:
                project(logits.get_parameter("weight"), 0.05)

    # -- codes <-> groups ------------------------------------------------------------------------------------------

    def to_groups(self, codes: Tensor) -> Tensor:
        """Codes [..., h, w] -> groups [..., P, G]."""
        s, g = self.config.side, self.config.group
        return codes.unflatten(-1, (s, g)).unflatten(-3, (s, g)).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def to_codes(self, groups: Tensor) -> Tensor:
        """Groups [..., P, G] -> codes [..., h, w]."""
        s, g = self.config.side, self.config.group
        return groups.unflatten(-1, (g, g)).unflatten(-3, (s, s)).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    # -- text ------------------------------------------------------------------------------------------------------

    def text_inputs(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Word vectors [B, W, text width], mask [B, W] -> words [B, W, width], caption [B, width]."""
        words = torch.where(mask[..., None], self.word(text), self.no_word)
        count = mask.sum(1, keepdim=True).clamp_min(1)
        # Divided by the square root: the sum of unrelated vectors grows with it.
        pooled = (text * mask[..., None]).sum(1) / count.sqrt()
        return words, self.caption(pooled)

    # -- states ----------------------------------------------------------------------------------------------------

    def states(self, x: Tensor, context: Context) -> Tensor:
        """Rows [N, width], as `context.layout` has them -> states [N, width]."""
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, context)
        normed: Tensor = self.norm(x)
        return normed

    def turns(self, where: Where, words: int, streams: int = 1) -> Tensor | None:
        """The rotary turns of words and of rows of frames, in the order of a layout."""
        if not self.config.rotary:
            return None
        side, device = self.config.side, where.number.device
        shape = (len(where.number), where.end - where.first, side)
        time = where.number[:, None, None].expand(shape).flatten()
        row = torch.arange(where.first, where.end, device=device)[:, None].expand(shape).flatten()
        column = torch.arange(side, device=device).expand(shape).flatten()
        before = torch.zeros(words, dtype=torch.long, device=device)
        time, row, column = (torch.cat([before, *[axis] * streams]) for axis in (time, row, column))
        return rotary_turns(time, row, column, self.config.width // self.config.heads)

    def start_caches(self, words: Tensor) -> list[LayerCache]:
        """A cache a layer, which holds the words [B, W, width] if the layers see them as a prefix."""
        config = self.config
        window = min(config.window_frames, config.max_frames)  # room is reserved for all of it
        caches = [LayerCache(config.layer_attention(i), window, config.positions) for i in range(config.layers)]
        if config.conditioning == "prefix":
            layout = Layout([0] * len(words), words.shape[1], config.positions, device=words.device)
            where, rows = Where(layout.clip, layout.number, 0, config.side), words.flatten(0, 1)
            self.states(rows, Context(layout, self.turns(where, len(rows)), caches=caches))
        return caches

    def new_states(self, x: Tensor, words: Tensor, caches: list[LayerCache], new: New) -> Tensor:
        """States of positions of the last frame so far: what they are fed [B, n, width] -> [B, n, width]."""
        b, n = x.shape[:2]
        turns = None
        if self.config.rotary:
            at = new.positions
            if isinstance(at, slice):
                at = torch.arange(self.config.positions, device=x.device)[at].repeat(b, 1)
            row, column = at.flatten() // self.config.side, at.flatten() % self.config.side
            turns = rotary_turns(torch.full_like(row, new.frame), row, column, self.config.width // self.config.heads)
        context = Context(Layout([1] * b, 0, n, device=x.device), turns, words, caches=caches, new=new)
        return self.states(x.flatten(0, 1), context).view_as(x)

    # -- training --------------------------------------------------------------------------------------------------

    def forward(
        self, codes: Tensor, lengths: Sequence[int], text: Tensor, mask: Tensor, starts: Sequence[int] | None = None,
        context: Tensor | None = None, passes: Tensor | None = None, last_given: Sequence[bool] | None = None,
    ) -> Losses:  # fmt: skip
        """Loss of clips.

        Args:
            codes: int64 [F, h, w], the frames of all clips, one behind the other.
            lengths: frames of each clip, B numbers >= 1.
            text: fp32 [B, W, text width] word vectors; mask: bool [B, W].
            starts: number in its clip of the first frame given; -1: the clip is whole. None: all are whole.
                A part of a clip is drawn as if nothing came before it, and says nothing about where clips end.
            context: what is fed instead of `codes`, which remain what is to be told.
            passes: int64 [F, P], for decoding "frame": in which pass each position is told, knowing those of the passes before.
            last_given: clips whose last frame is shown.
        """
        starts = starts or [-1] * len(lengths)
        fed = codes if context is None else context
        goals = None if last_given is None else self._goals(fed, lengths, starts, last_given)
        states, layout, own = self.clip_states(fed, lengths, text, mask, starts, passes, goals)
        targets = self.to_groups(codes)[:, own]  # [F, P', G]
        told = self.head(states[-1].flatten(0, 1), targets.flatten(0, 1)).unflatten(1, targets.shape[:2])
        size = 1 if self.parallel is None else self.parallel.size
        counts = layout.clip_lengths * self.config.positions * self.config.slots
        per_clip = [layout.clip_sums(one.sum((1, 2))) * size / counts for one in told]
        whole = torch.tensor([start < 0 for start in starts], device=codes.device)
        return Losses(per_clip[0], self._end_loss(states[0], layout) * whole, per_clip[1])

    def clip_states(
        self, codes: Tensor, lengths: Sequence[int], text: Tensor, mask: Tensor, starts: Sequence[int],
        passes: Tensor | None, goals: Goals | None,
    ) -> tuple[Tensor, Layout, slice]:  # fmt: skip
        """States [S, F, P', width] of whole clips, their layout, and which positions of each frame this rank has; see `forward`."""
        words, caption = self.text_inputs(text, mask)
        prefix = words.shape[1] if self.config.conditioning == "prefix" else 0
        first, end = self._own_rows()
        own = slice(first * self.config.side, end * self.config.side)
        layout = Layout(lengths, prefix, own.stop - own.start, 1 if passes is None else 2, codes.device)
        starting = torch.tensor([max(0, start) for start in starts], device=codes.device)
        where = Where(layout.clip, starting[layout.clip] + layout.number, first, end)
        groups = self.to_groups(codes)
        before = groups.roll(1, 0)  # of a clip's first frame, another's last: not looked at
        fed = self.inputs(groups, before, layout.number == 0, caption, where, goals, passes)
        x = layout.join(words[:, :prefix], fed)
        turns = self.turns(where, layout.clips * prefix, layout.streams)
        context = Context(layout, turns, words, self.parallel, None if passes is None else self._passes(passes, prefix))
        return layout.split(self.states(x, context))[1], layout, own

    def _passes(self, numbers: Tensor, words: int) -> Passes:
        kinds = {self.config.layer_attention(layer) for layer in range(self.config.layers)}
        mask = seen_of_frame(numbers, max(1, words), computed_in(self.word.weight)) if "spatial" in kinds else None
        return Passes(numbers, mask)

    def _own_rows(self) -> tuple[int, int]:
        side = self.config.side
        if self.parallel is None:
            return 0, side
        share = side // self.parallel.size
        return self.parallel.rank * share, (self.parallel.rank + 1) * share

    def _goals(self, codes: Tensor, lengths: Sequence[int], starts: Sequence[int], given: Sequence[bool]) -> Goals:
        """The last frames of clips, of which some are `given`; see `forward`."""
        ends = [end - 1 for end in itertools.accumulate(lengths)]
        whole = torch.tensor([max(0, start) + length for start, length in zip(starts, lengths, strict=True)], device=codes.device)
        return Goals(self.to_groups(codes[ends]), torch.tensor(given, device=codes.device), whole)

    def _end_loss(self, states: Tensor, layout: Layout) -> Tensor:
        """Binary cross entropy of "is this frame the last?", the mean of all positions' votes: states [F, P', width] -> [B]."""
        votes = self.end(states).squeeze(-1).float()  # [F, P']
        last = layout.number == layout.clip_lengths[layout.clip] - 1
        losses = F.binary_cross_entropy_with_logits(votes, last[:, None].expand_as(votes).float(), reduction="none")
        return layout.clip_sums(losses.mean(1)) / layout.clip_lengths
