"""Drawing codes from the transformer: position after position, with a cache of keys and values.

    captions -> prefix -> cache -> for each frame: does the clip end here?
                                   for each position: logits (guided) -> temperature, top-k, top-p -> codes

Every clip has its own random stream, seeded by (seed, clip's number), so that what a prompt becomes does not depend
on the prompts that happen to be drawn with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from t2v_ds.config import SamplingConfig
from t2v_ds.models.packing import Packing
from t2v_ds.models.transformer import Cache, VideoTransformer


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k and top-p (nucleus sampling, Holtzman et al. 2020) leave out: [N, K] -> [N, K].

    The likeliest code always stays. top_k 0 and top_p 1 leave out nothing.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
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

    def uniform(self) -> Tensor:
        """One number in [0, 1) a clip: [B] fp64."""
        return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])


def draw(logits: Tensor, config: SamplingConfig, draws: Draws) -> Tensor:
    """Draw one code a clip from logits [B, K]: int64 [B]."""
    logits = logits.float()
    if config.temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits / config.temperature, config.top_k, config.top_p).softmax(-1).double()
    # Inverse of the cumulative distribution: one number a clip, however many codes there are.
    cumulative = probabilities.cumsum(-1)
    wanted = draws.uniform().to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


@dataclass
class _Guided:
    """Classifier-free guidance (Ho & Salimans 2022): the second half of a doubled batch has no caption."""

    scale: float

    @property
    def on(self) -> bool:
        return self.scale != 1

    def mix(self, logits: Tensor) -> Tensor:
        """[2B, ...] -> [B, ...] when guidance is on."""
        if not self.on:
            return logits
        given, free = logits.float().chunk(2)
        return free + self.scale * (given - free)

    def double(self, x: Tensor) -> Tensor:
        """[B, ...] -> [2B, ...] when guidance is on."""
        return torch.cat([x, x]) if self.on else x


@torch.no_grad()
def sample_codes(
    model: VideoTransformer,
    text: Tensor,
    mask: Tensor,
    config: SamplingConfig,
    min_frames: int = 1,
    max_frames: int | None = None,
    first_clip: int = 0,
) -> list[Tensor]:
    """Draw a clip for each caption.

    Args:
        model: in eval mode.
        text: fp32 [B, W, text width] word vectors; mask: bool [B, W].
        config: temperature, top-k, top-p, guidance, seed; frames > 0 fixes the length.
        min_frames, max_frames: bounds of the length where the model decides it; at most the model's max_frames.
        first_clip: number of the first clip, for the seed of its random stream.

    Returns:
        codes int64 [T, h, w] a caption, each with its own T.
    """
    longest = min(max_frames or model.config.max_frames, model.config.max_frames)
    if config.frames:
        min_frames = longest = config.frames
    guided, batch = _Guided(config.guidance), len(text)
    if guided.on:
        text, mask = torch.cat([text, torch.zeros_like(text)]), torch.cat([mask, torch.zeros_like(mask)])
    prefix, caption = model.text_inputs(text, mask)
    cache = Cache()
    model.states(prefix.flatten(0, 1), Packing(torch.full((len(prefix),), prefix.shape[1]), prefix.shape[1]), cache)
    draws = Draws(config.seed, list(range(first_clip, first_clip + batch)))
    decoder = _FrameDecoder(model, caption, cache, guided, config, draws)
    frames: list[Tensor] = []
    lengths = torch.full((batch,), longest)
    for t in range(longest):
        groups, ends = decoder.next_frame(t, frames)
        if t >= min_frames:
            lengths = torch.where((lengths == longest) & ends.cpu(), torch.tensor(t), lengths)
            if bool((lengths <= t).all()):
                break
        frames.append(groups)
    codes = model.to_codes(torch.stack(frames, dim=1))  # [B, T, h, w]
    return [one[:length] for one, length in zip(codes, lengths.tolist(), strict=True)]


class _FrameDecoder:
    """Draws the positions of one frame after another."""

    def __init__(
        self, model: VideoTransformer, caption: Tensor, cache: Cache, guided: _Guided, config: SamplingConfig, draws: Draws
    ) -> None:
        self.model, self.caption, self.cache, self.guided, self.config, self.draws = model, caption, cache, guided, config, draws
        self.last = model.start.expand(len(caption), -1)  # what the next position is fed as "codes of i - 1"
        self.one = Packing(torch.ones(len(caption), dtype=torch.long), 1)

    def next_frame(self, t: int, frames: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Draw frame `t` after `frames` (each [B, P, G]): (groups [B, P, G], whether the clip ended before it [B])."""
        model = self.model
        where = model.place_and_time(torch.tensor([t], device=self.caption.device))[0]  # [P, width]
        nothing = torch.zeros(len(self.caption), model.positions, model.config.width, device=self.caption.device)
        before = model.embed_codes(self.guided.double(frames[-1])) if frames else nothing
        current = nothing.clone()  # filled in as positions are drawn
        groups, ends = [], torch.zeros(0)
        for p in range(model.positions):
            row, column = divmod(p, model.side)
            if column == 0:
                near = model.neighbours(before, current, row)
            x = self.last + near[:, column] + where[p] + self.caption
            state = model.states(x, self.one, self.cache)
            if p == 0:
                ends = self.guided.mix(model.end(state)).squeeze(-1) > 0
            groups.append(self._draw_group(state))
            self.last = current[:, p] = model.embed_codes(self.guided.double(groups[-1]))
        return torch.stack(groups, dim=1), ends

    def _draw_group(self, state: Tensor) -> Tensor:
        """State [B or 2B, width] -> codes [B, G], slot after slot."""
        head, codes = self.model.head, []
        for slot in range(head.slots):
            logits = self.guided.mix(head.slot(state, slot))
            codes.append(draw(logits, self.config, self.draws))
            state = head.add(state, slot, self.guided.double(codes[-1]))
        return torch.stack(codes, dim=1)
