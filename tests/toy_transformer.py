"""A small transformer with large weights, so that whatever it can see, it shows; and what it computes in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2v_ds.config import TransformerConfig
from t2v_ds.models.layout import Layout
from t2v_ds.models.sampling import Condition
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


def some_masked(lengths: list[int], positions: int, seed: int = 0) -> Tensor:
    """bool [F, P]: about half of the positions, at least one a frame."""
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(sum(lengths), positions, generator=generator) < 0.5
    masked[:, 0] = True
    return masked


@torch.no_grad()
def states_of(
    model: VideoTransformer, codes: Tensor, lengths: list[int], text: Tensor, mask: Tensor, masked: Tensor | None = None
) -> tuple[Tensor, Layout]:
    """States [S, F, P, width] of whole clips."""
    states, layout, _ = model.clip_states(codes, lengths, text, mask, [-1] * len(lengths), masked, None)
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
    """`sampling.States` without caches: every call computes the whole clip anew, as in training."""

    def __init__(self, model: VideoTransformer, condition: Condition) -> None:
        self.model, self.condition = model, condition

    def _states(self, frames: list[Tensor], masked: Tensor | None) -> Tensor:
        model, condition, count = self.model, self.condition, len(frames)
        codes = model.to_codes(torch.stack(frames, dim=1).flatten(0, 1))  # clip after clip
        clips = len(condition.text)
        every = masked
        if model.config.decoding == "frame":
            every = torch.zeros(clips, count, model.config.positions, dtype=torch.bool, device=codes.device)
            every[:, -1] = False if masked is None else masked
            every = every.flatten(0, 1)
        starts = [-1] * clips
        states, _, _ = model.clip_states(codes, [count] * clips, condition.text, condition.mask, starts, every, condition.goals)
        return states.unflatten(1, (clips, count))[:, :, -1]  # [S, B, P, width]

    def masked(self, frames: list[Tensor], current: Tensor, wanted: Tensor) -> Tensor:
        states = self._states([*frames, current.clamp_min(0)], current[..., 0] < 0)[1]
        return states.gather(1, wanted[..., None].expand(-1, -1, states.shape[-1]))

    def last(self, frames: list[Tensor]) -> Tensor:
        return self._states(frames, None)[0]

    def position(self, frames: list[Tensor], current: Tensor, position: int) -> Tensor:
        return self._states([*frames, current], None)[0][:, position : position + 1]
