"""A small transformer with large weights, so that whatever it can see, it shows; and what it computes in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2v_ds.config import TransformerConfig
from t2v_ds.models.layout import Layout
from t2v_ds.models.states import Condition
from t2v_ds.models.transformer import VideoTransformer

K, TEXT, LONGEST = 13, 5, 6


def make(group: int = 2, seed: int = 0, std: float = 0.4, end: float | None = None, **settings: Any) -> VideoTransformer:
    """`end`: what the model always says about ending."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "max_frames": LONGEST, "grid_size": 4, "codebook_size": K}
    model = VideoTransformer(TransformerConfig(group=group, text_width=TEXT, **{**values, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
        if end is not None:
            model.end.weight.zero_()
            model.end.bias.fill_(end)
    return model.eval()


def captions(b: int, words: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(b, words, TEXT, generator=generator)
    mask = torch.arange(words)[None] < torch.randint(1, words + 1, (b, 1), generator=generator)
    return text * mask[..., None], mask


def codes_of(frames: int, seed: int = 0, side: int = 4) -> Tensor:
    return torch.randint(0, K, (frames, side, side), generator=torch.Generator().manual_seed(seed))


def some_passes(lengths: list[int], positions: int, seed: int = 0) -> Tensor:
    """In which of three passes positions are told, at random: int64 [F, P]."""
    return torch.randint(3, (sum(lengths), positions), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def states_of(
    model: VideoTransformer, codes: Tensor, lengths: list[int], text: Tensor, mask: Tensor, passes: Tensor | None = None
) -> tuple[Tensor, Layout]:
    """States [S, F, P, width] of whole clips."""
    states, layout, _ = model.clip_states(codes, lengths, text, mask, [-1] * len(lengths), passes, None)
    return states, layout


@torch.no_grad()
def logits_of(model: VideoTransformer, states: Tensor, groups: Tensor) -> Tensor:
    """States [F, P, width] and what is told, [F, P, G] -> logits [F, P, G, K], each slot given those before it."""
    state, given, slots = states.flatten(0, 1), groups.flatten(0, 1), []
    for slot in range(model.config.slots):
        slots.append(model.head.slot(state, slot))
        state = model.head.add(state, slot, given[:, slot])
    return torch.stack(slots, dim=1).unflatten(0, groups.shape[:2])


class Recomputed:
    """`states.States` without caches: every call computes the whole clip anew, as in training."""

    def __init__(self, model: VideoTransformer, condition: Condition) -> None:
        self.model, self.condition = model, condition
        self._passes: list[Tensor] = []  # of each frame so far: [B, P]
        self._count = 0  # of the passes of the last of them

    def _states(self, frames: list[Tensor]) -> Tensor:
        model, condition, count = self.model, self.condition, len(frames)
        codes = model.to_codes(torch.stack(frames, dim=1).flatten(0, 1))  # clip after clip
        clips = len(condition.text)
        passes = torch.stack(self._passes, dim=1).flatten(0, 1) if model.config.decoding == "frame" else None
        starts = [-1] * clips
        states, _, _ = model.clip_states(codes, [count] * clips, condition.text, condition.mask, starts, passes, condition.goals)
        return states.unflatten(1, (clips, count))[:, :, -1]  # [S, B, P, width]

    def in_pass(self, frames: list[Tensor], current: Tensor, known: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._passes) == len(frames):
            self._passes.append(torch.full(current.shape[:2], self.model.config.positions))
            self._count = 0
        self._passes[-1].scatter_(1, known, self._count)
        self._count += bool(known.numel())
        later = self._passes[-1] == self.model.config.positions
        assert torch.equal(later, current[..., 0] < 0)
        states = self._states([*frames, current.clamp_min(0)])
        return tuple(x.gather(1, at[..., None].expand(-1, -1, x.shape[-1])) for x, at in zip(states, (known, asked), strict=True))  # type: ignore[return-value]

    def last(self, frames: list[Tensor]) -> Tensor:
        return self._states(frames)[0]

    def position(self, frames: list[Tensor], current: Tensor, position: int) -> Tensor:
        return self._states([*frames, current])[0][:, position : position + 1]
