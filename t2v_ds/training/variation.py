"""What a clip is made into for one training step of the transformer: all that is random about it.

    clip -> caption kept or emptied -> whole or an excerpt -> some codes of what is fed replaced -> the passes of its frames

Everything is drawn in the loading threads from the sample's own random numbers, so that it is the same on whatever rank the sample
is loaded, and on all ranks that share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2v_ds.config import TransformerRunConfig
from t2v_ds.data.collate import pack_codes
from t2v_ds.models.sampling import schedule

ALIKE = 16  # codes that count as looking like one
FEWEST_PASSES = 4  # with fewer, too many positions of a frame know nothing of each other


@dataclass
class Sample:
    """A clip as a step sees it."""

    codes: np.ndarray  # uint16 [T, h, w]: what is to be told
    context: np.ndarray | None  # the same shape: what is fed, where that is something else
    passes: np.ndarray | None  # int64 [T, P], for decoding "frame": when each position is told
    has_caption: bool  # else it counts as one with the empty caption
    start: int  # number of the first frame of an excerpt; -1: the clip is whole
    last_given: bool | None  # None: the model cannot be given a last frame


def lookalikes(codebook: Tensor) -> np.ndarray:
    """For each code of a codebook [K, D] those nearest to it, without itself: uint16 [K, up to 16]."""
    codebook, nearest = codebook.float(), []
    for rows in torch.arange(len(codebook), device=codebook.device).split(4096):  # the distances of 65,536 codes would take 17 GB
        distances = torch.cdist(codebook[rows], codebook).scatter(1, rows[:, None], float("inf"))
        nearest.append(distances.topk(min(ALIKE, len(codebook) - 1), largest=False).indices)
    return torch.cat(nearest).cpu().numpy().astype(np.uint16)


def vary(codes: np.ndarray, rng: np.random.Generator, config: TransformerRunConfig, alike: np.ndarray | None = None) -> Sample:
    """Make a clip [T, h, w] into a sample; `alike`: what `lookalikes` returns, for `context_confusion`.

    Without captions the model learns clips as such, for guidance. Most of what a clip shows is settled by its first
    frame and by how one frame follows from another; excerpts are cheap practice in both (compare the joint training on
    images and video of Ho et al. 2022).
    """
    start = -1
    has_caption = bool(rng.random() >= config.caption_dropout)
    if rng.random() < config.excerpt_share:
        frames = min(config.excerpt_frames, len(codes))
        start = int(rng.integers(len(codes) - frames + 1))
        codes = codes[start : start + frames]
    model = config.model
    context = _fed(codes, rng, config, alike) if config.replaces_context else None
    passes = _passes(len(codes), model.positions, rng, config.mask == "tube") if model.decoding == "frame" else None
    last_given = bool(start < 0 and rng.random() < config.last_frame_share) if model.last_frame else None
    return Sample(codes, context, passes, has_caption, start, last_given)


def _fed(codes: np.ndarray, rng: np.random.Generator, config: TransformerRunConfig, alike: np.ndarray | None) -> np.ndarray:
    """Replace a share of the codes, itself drawn between 0 and the most: a model must not trust all that it has drawn."""
    confused = config.context_confusion > 0 and (config.context_noise == 0 or rng.random() < 0.5)
    wrong = rng.random(codes.shape) < rng.uniform(0, config.context_confusion if confused else config.context_noise)
    if confused:
        assert alike is not None
        others = alike[codes, rng.integers(alike.shape[1], size=codes.shape)]
    else:
        others = rng.integers(config.model.codebook_size, size=codes.shape, dtype=codes.dtype)
    return np.where(wrong, others, codes)


def _passes(frames: int, positions: int, rng: np.random.Generator, tube: bool) -> np.ndarray:
    """In which pass each position is told: int64 [T, P].

    How many passes there are is drawn from 4 to one a position, evenly on a logarithmic scale, and how many positions each of them
    tells is as it is when clips are drawn. The order is random; with `tube` the same in all frames (Tong et al. 2022).
    """
    count = round(float(np.exp(rng.uniform(np.log(min(FEWEST_PASSES, positions)), np.log(positions)))))
    sizes = [upto - done for done, upto, _ in schedule(positions, count)]
    order = rng.random((1 if tube else frames, positions)).argsort(axis=1)
    return np.broadcast_to(np.repeat(np.arange(len(sizes)), sizes)[order], (frames, positions))


def join(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples -> a micro-batch.

    Returns:
        "codes" int64 [F, h, w] and "lengths" as `pack_codes` has them; "context" int64 [F, h, w] or None; "passes" int64 [F, P] or None;
        "starts", "last_given" (or None): lists of B.
    """
    batch: dict[str, Any] = pack_codes([one.codes for one in samples])
    context, passes = [one.context for one in samples], [one.passes for one in samples]
    batch["context"] = None if context[0] is None else pack_codes(context)["codes"]  # type: ignore[arg-type]
    batch["passes"] = None if passes[0] is None else torch.from_numpy(np.concatenate(passes))  # type: ignore[arg-type]
    batch["starts"] = [one.start for one in samples]
    # Also where it is False for all: at ZeRO stage 3 the ranks must call the same layers.
    batch["last_given"] = None if samples[0].last_given is None else [one.last_given for one in samples]
    return batch
