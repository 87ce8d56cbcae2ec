"""The transformer's states while clips are drawn, with caches of keys and values: what is new is computed, what is known is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from t2v_ds.models.cache import New
from t2v_ds.models.inputs import Around, Goals, Where
from t2v_ds.models.transformer import VideoTransformer


@dataclass
class Condition:
    """What clips are drawn from: [B, ...] each, the empty captions of guidance included."""

    text: Tensor
    mask: Tensor
    goals: Goals | None = None


class States(Protocol):
    """The transformer's states of a frame after others. `frames`: those so far, each int64 [B, P, G]."""

    def in_pass(self, frames: list[Tensor], current: Tensor, known: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """For decoding "frame": take in what became known of a frame, and tell masked positions of it.

        Args:
            frames: those before it.
            current: int64 [B, P, G], the frame, -1 where it is masked.
            known: int64 [B, n]: positions that became known with the pass before, n may be 0.
            asked: int64 [B, m]: positions that are masked, m may be 0.

        Returns:
            [B, n, width] and [B, m, width]
        """
        ...

    def position(self, frames: list[Tensor], current: Tensor, position: int) -> Tensor:
        """For decoding "token": state [B, 1, width] that tells a position of `current`, of which what lies before it is known."""
        ...

    def last(self, frames: list[Tensor]) -> Tensor:
        """For decoding "token": states [B, P, width] of the last of `frames`, where its positions were not drawn one by one."""
        ...


class CachedStates:
    """`States` that keep the keys and values of what came before."""

    def __init__(self, model: VideoTransformer, condition: Condition) -> None:
        self.model, self.goals = model, condition.goals
        self.words, self.caption = model.text_inputs(condition.text, condition.mask)
        self.caches = model.start_caches(self.words)
        self.clip = torch.arange(len(self.words), device=self.words.device)
        around = model.inputs.around_own
        self._around = around.flat() if isinstance(around, Around) else None
        self._done = model.config.positions  # how many positions of the frame are known: at first no frame is begun

    def _where(self, frame: int) -> Where:
        return Where(self.clip, torch.full_like(self.clip, frame), 0, self.model.config.side)

    def _before(self, frames: list[Tensor], current: Tensor) -> tuple[Tensor, Tensor]:
        opens = torch.full_like(self.clip, not frames, dtype=torch.bool)
        return frames[-1] if frames else current.clamp_min(0), opens

    def _begin(self, frames: list[Tensor], current: Tensor) -> None:
        """Compute the part of the inputs of a frame's positions that stays the same while they are drawn."""
        before = self._before(frames, current)
        self._standing = self.model.inputs.standing(*before, self.caption, self._where(len(frames)), self.goals)

    def in_pass(self, frames: list[Tensor], current: Tensor, known: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        if self._done == self.model.config.positions or not known.shape[1]:
            self._begin(frames, current)
            self._done = 0
        positions, count = torch.cat([known, asked], dim=1), known.shape[1]
        standing = self._standing.flatten(1, 2)[self.clip[:, None], positions]
        new = New(len(frames), positions, self._done, count)
        states = self.model.new_states(self.model.inputs.some(current, positions, self._around) + standing, self.words, self.caches, new)
        self._done += count
        return states[:, :count], states[:, count:]

    def last(self, frames: list[Tensor]) -> Tensor:
        before, where = self._before(frames[:-1], frames[-1]), self._where(len(frames) - 1)
        fed = self.model.inputs(frames[-1], *before, self.caption, where, self.goals)[0]
        return self.model.new_states(fed, self.words, self.caches, New(len(frames) - 1))

    def position(self, frames: list[Tensor], current: Tensor, position: int) -> Tensor:
        inputs, side = self.model.inputs, self.model.config.side
        row, column = divmod(position, side)
        if position == 0:
            self._begin(frames, current)
            assert inputs.start is not None
            self._previous = inputs.embed(frames[-1][:, -1:]) if frames else inputs.start.expand(len(current), 1, -1)
        else:
            self._previous = inputs.embed(current[:, position - 1 : position])
        if column == 0:
            where = replace(self._where(len(frames)), first=row, end=row + 1)
            self._row = inputs.near_own(inputs.rows(current, where)).flatten(1, 2)
        fed = self._previous + self._row[:, column : column + 1] + self._standing[:, row, column : column + 1]
        new = New(len(frames), slice(position, position + 1), position)
        return self.model.new_states(fed, self.words, self.caches, new)
