"""Drawing codes from the transformer, frame after frame.

    captions -> states (`states`) -> for each frame, drawn -> is it the last?
      decoding "token":  for each position: logits (guided) -> temperature, top-k, top-p -> codes
      decoding "frame":  all positions masked -> some of them drawn and kept, in each of a few passes (cosine schedule of
                         Chang et al. 2022, "MaskGIT"), which also takes in, once and for all, what the pass before has drawn

Every clip has its own random stream, seeded by (seed, clip's number), so that what a prompt becomes does not depend
on the prompts that happen to be drawn with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from t2v_ds.config import SamplingConfig
from t2v_ds.models.inputs import Goals
from t2v_ds.models.states import CachedStates, Condition, States
from t2v_ds.models.transformer import VideoTransformer

COLDEST = 1e-6  # divided by less, logits would overflow


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k and top-p (nucleus sampling, Holtzman et al. 2020) leave out: [..., K] -> [..., K].

    The likeliest code always stays. top_k 0 and top_p 1 leave out nothing.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # Left out: everything behind the codes that together reach top_p.
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return logits


class Draws:
    """One random stream a clip, the same whatever else is drawn beside it."""

    def __init__(self, seed: int, clips: list[int]) -> None:
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + clip) % 2**63) for clip in clips]

    def uniform(self, count: int) -> Tensor:
        """Numbers in [0, 1) for each clip: [B, count] fp64."""
        return torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in self.generators])

    def order(self, count: int) -> Tensor:
        """A random order of 0 to count - 1 for each clip: int64 [B, count]."""
        return torch.stack([torch.randperm(count, generator=g) for g in self.generators])


def draw(logits: Tensor, config: SamplingConfig, draws: Draws) -> Tensor:
    """Draw codes from logits [B, n, K]: int64 [B, n]."""
    logits = logits.float()
    if config.temperature < COLDEST:
        return logits.argmax(-1)
    probabilities = filter_logits(logits / config.temperature, config.top_k, config.top_p).softmax(-1).double()
    # Inverse of the cumulative distribution: one number a draw, however many codes there are.
    cumulative = probabilities.cumsum(-1)
    wanted = draws.uniform(logits.shape[1]).to(logits.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def sample_codes(
    model: VideoTransformer, text: Tensor, mask: Tensor, config: SamplingConfig, min_frames: int = 1, max_frames: int | None = None,
    first_clip: int = 0, first_frames: Tensor | None = None, last_frame: Tensor | None = None,
    states: Callable[[VideoTransformer, Condition], States] = CachedStates,
) -> list[Tensor]:  # fmt: skip
    """Draw a clip for each caption.

    Args:
        model: in eval mode.
        text: fp32 [B, W, text width] word vectors; mask: bool [B, W].
        config: temperature, top-k, top-p, guidance, passes, seed; frames > 0 fixes the length.
        min_frames, max_frames: bounds of the length where the model decides it; at most the model's max_frames.
        first_clip: number of the first clip, for the seed of its random stream.
        first_frames: int64 [B, T, h, w]: codes with which the clips begin.
        last_frame: int64 [B, h, w]: codes with which they end, after `config.frames` (else `max_frames`) frames.
        states: what computes states.

    Returns:
        codes int64 [T, h, w] a caption, each with its own T.
    """
    longest = min(max_frames or model.config.max_frames, model.config.max_frames)
    if config.frames or config.loop or last_frame is not None:
        min_frames = longest = config.frames or longest
    drawing = _Drawing(model, text, mask, config, longest, Draws(config.seed, list(range(first_clip, first_clip + len(text)))), states)
    frames = [] if first_frames is None else list(model.to_groups(first_frames).unbind(1))[:longest]
    min_frames = min(longest, max(min_frames, len(frames) + 1))  # at least one is drawn, whatever the model says of those given
    last = None if last_frame is None else model.to_groups(last_frame)
    if config.loop and last is None:
        if not frames:
            drawing.start(None)
            frames.append(drawing.next_frame([])[0])
        last = frames[0]
    drawing.start(last)
    lengths = torch.full((len(text),), longest)
    ends = drawing.given(frames)
    while True:
        if len(frames) >= min_frames:
            lengths = torch.where((lengths == longest) & ends, torch.tensor(len(frames)), lengths)
        if len(frames) == longest or (frames and bool((lengths <= len(frames)).all())):
            break
        if last is not None and len(frames) == longest - 1:
            frames.append(last)  # the clip ends on it exactly
            break
        frame, ends = drawing.next_frame(frames)
        frames.append(frame)
    codes = model.to_codes(torch.stack(frames, dim=1))  # [B, T, h, w]
    return [one[:length] for one, length in zip(codes, lengths.tolist(), strict=True)]


class _Drawing:
    """Draws one frame after another. Classifier-free guidance (Ho & Salimans 2022): a second half of the batch has no caption."""

    def __init__(
        self, model: VideoTransformer, text: Tensor, mask: Tensor, config: SamplingConfig, longest: int, draws: Draws,
        states: Callable[[VideoTransformer, Condition], States],
    ) -> None:  # fmt: skip
        self.model, self.config, self.longest, self.draws, self.make_states = model, config, longest, draws, states
        self.guided = config.guidance != 1
        self.text, self.mask = text, mask
        self.scale = config.guidance

    def start(self, last: Tensor | None) -> None:
        """Begin a clip that ends on `last` [B, P, G]."""
        text, mask = self.text, self.mask
        if self.guided:
            text, mask = torch.cat([text, torch.zeros_like(text)]), torch.cat([mask, torch.zeros_like(mask)])
        goals = None
        if last is not None:
            every = torch.ones(len(text), dtype=torch.bool, device=text.device)
            goals = Goals(self._double(last), every, torch.full((len(text),), self.longest, device=text.device))
        self.states = self.make_states(self.model, Condition(text, mask, goals))

    def given(self, frames: list[Tensor]) -> Tensor:
        """Take in frames that are given: whether the clip ends behind the last of them [B]."""
        ends = torch.zeros(len(self.text), dtype=torch.bool)
        for count, frame in enumerate(frames):
            if self.model.config.decoding == "token":
                states = self.states.last([self._double(one) for one in frames[: count + 1]])
            else:
                states = self._take_in([self._double(one) for one in frames[:count]], frame)
            ends = self._ends(states)
        return ends

    def next_frame(self, frames: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Draw the frame after `frames` (each [B, P, G]): (groups [B, P, G], whether the clip ends behind it [B])."""
        self.scale = self._scale_of_frame(len(frames))
        doubled = [self._double(frame) for frame in frames]
        current = torch.full((len(self.text), self.model.config.positions, self.model.config.slots), -1, device=self.text.device)
        one_by_one = self.model.config.decoding == "token"
        states = self._by_position(doubled, current.zero_()) if one_by_one else self._in_passes(doubled, current)
        return current, self._ends(states)

    def _by_position(self, frames: list[Tensor], current: Tensor) -> Tensor:
        states = []
        for position in range(current.shape[1]):
            states.append(self.states.position(frames, self._double(current), position))
            current[:, position : position + 1], _ = self._draw(states[-1])
        return torch.cat(states, dim=1)

    def _take_in(self, frames: list[Tensor], frame: Tensor) -> Tensor:
        """Let `frame` become known as if it was drawn: states [B or 2B, P, width] of its positions as they became known."""
        current, states = torch.full_like(frame, -1), []
        order = self.draws.order(frame.shape[1]).to(frame.device)  # [B, P]
        rows = torch.arange(len(frame), device=frame.device)[:, None]
        for done, upto, _ in schedule(frame.shape[1], self.config.passes):
            known = order[:, done:upto]
            current[rows, known] = frame[rows, known]
            states.append(self.states.in_pass(frames, self._double(current), self._double(known), self._double(order[:, :0]))[0])
        return torch.cat(states, dim=1)

    def _in_passes(self, frames: list[Tensor], current: Tensor) -> Tensor:
        """Draw all of `current`, which is masked: states [B or 2B, P, width] of its positions as they became known."""
        positions = current.shape[1]
        order = self.draws.order(positions).to(current.device)  # [B, P]
        rows = torch.arange(len(current), device=current.device)[:, None]
        ramp, confident = self.scale, self.config.unmask == "confident"
        states, known, none = [], order[:, :0], order[:, :0]
        for done, upto, share in schedule(positions, self.config.passes):
            if self.config.guidance_schedule == "passes":
                self.scale = 1 + (ramp - 1) * share
            asked = order[:, done:] if confident else order[:, done:upto]  # [B, n]
            seen, told = self.states.in_pass(frames, self._double(current), self._double(known), self._double(asked))
            known, codes = self._choose(told, order, done, upto, share)
            current[rows, known] = codes
            states.append(seen)
        seen, _ = self.states.in_pass(frames, self._double(current), self._double(known), self._double(none))
        return torch.cat([*states, seen], dim=1)

    def _choose(self, told: Tensor, order: Tensor, done: int, upto: int, share: float) -> tuple[Tensor, Tensor]:
        """Draw the codes of a pass: positions [B, n] and codes [B, n, G]; `order` [B, P] is changed where they are the surest."""
        positions = order.shape[1]
        ranks = self.config.unmask == "confident" and upto < positions
        codes, sure = self._draw(told, ranks)
        if ranks:  # the ones drawn most surely come first, with noise that fades (Chang et al. 2022)
            noise = -(-self.draws.uniform(positions - done).clamp_min(1e-12).log()).log().to(sure.device)
            ranked = (sure + self.config.temperature * (1 - share) * noise).argsort(dim=1, descending=True)
            order[:, done:] = order[:, done:].gather(1, ranked)
            codes = codes.gather(1, ranked[..., None].expand_as(codes))[:, : upto - done]
        return order[:, done:upto], codes

    def _draw(self, state: Tensor, ranks: bool = False) -> tuple[Tensor, Tensor]:
        """States [B or 2B, n, width] -> codes [B, n, G], slot after slot, and, with `ranks`, the log of their probability [B, n]."""
        head, codes, sure = self.model.head, [], torch.zeros((), device=state.device, dtype=torch.float64)
        state = state.float()
        for slot in range(head.slots):
            logits = self._mix(head.slot(state, slot))
            codes.append(draw(logits, self.config, self.draws))
            if ranks:
                sure = sure + logits.double().log_softmax(-1).gather(-1, codes[-1][..., None]).squeeze(-1)
            state = head.add(state, slot, self._double(codes[-1]))
        return torch.stack(codes, dim=-1), sure

    def _ends(self, states: Tensor) -> Tensor:
        return self._mix(self.model.end(states).squeeze(-1).float().mean(1)).cpu() > 0

    def _scale_of_frame(self, number: int) -> float:
        if self.config.guidance_schedule == "frames" and self.longest > 1:
            return 1 + (self.config.guidance - 1) * (1 - number / (self.longest - 1))
        return self.config.guidance

    def _mix(self, logits: Tensor) -> Tensor:
        """[2B, ...] -> [B, ...] when guidance is on."""
        if not self.guided:
            return logits
        given, free = logits.float().chunk(2)
        return free + self.scale * (given - free)

    def _double(self, x: Tensor) -> Tensor:
        """[B, ...] -> [2B, ...] when guidance is on."""
        return torch.cat([x, x]) if self.guided else x


def schedule(positions: int, passes: int) -> list[tuple[int, int, float]]:
    """For each pass how many positions are known before and after it, and how far along it is (0 to 1; a single one: 1)."""
    passes = min(passes, positions)
    steps, done = [], 0
    for number in range(passes):
        upto = positions - int(positions * math.cos(math.pi / 2 * (number + 1) / passes))
        upto = min(max(upto, done + 1), positions - (passes - 1 - number))
        steps.append((done, upto, number / (passes - 1) if passes > 1 else 1.0))
        done = upto
    return steps
