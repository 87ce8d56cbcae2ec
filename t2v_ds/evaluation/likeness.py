"""How alike clips look, and whether drawn clips are copies of training clips.

    clip -> 8 evenly spaced frames -> a network's features in 4 x 4 cells, or 16 x 16 pixels -> a vector: its look
    looks of drawn clips, looks of training clips -> nearest -> memorisation, own_clips;   two draws a prompt -> distinctness

Distances are Euclidean, and the squared distance of two looks is a mean over frames (and layers of the network).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from t2v_ds.config import PerceptualConfig
from t2v_ds.errors import ConfigError
from t2v_ds.evaluation.intervals import share_of
from t2v_ds.losses import SMALLEST_IMAGE, PerceptualDistance
from t2v_ds.models.exported import content_id

FRAMES = 8  # of a clip, evenly spaced from its first to its last: clips differ in length
CELLS = 4  # a side, that a layer's features are averaged in
PIXELS = 16  # a side, without a network
NEAR = 1  # percentile of the distances between training clips, below which a drawn clip counts as a copy
_BLOCK = 256  # looks compared at once


@dataclass
class PerceptualSpace:
    """Where clips lie near one another when they look alike.

    Attributes:
        name: of the space, with the network and its file.
        unit: of distances.
        sha256: of the network's file; empty without one.
    """

    name: str
    unit: str
    sha256: str
    network: PerceptualDistance | None
    device: torch.device

    def look(self, clip: np.ndarray) -> np.ndarray:
        """A clip uint8 [T, H, W, 3] -> its look, fp32 [P]; P does not depend on the clip's length or size."""
        frames = clip[np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)]
        if self.network is None:
            small = [np.asarray(Image.fromarray(frame).resize((PIXELS, PIXELS), Image.Resampling.BOX)) for frame in frames]
            return np.stack(small).reshape(-1).astype(np.float32) / np.float32(np.sqrt(FRAMES * PIXELS * PIXELS * 3))
        with torch.inference_mode():
            layers = self.network.extract(torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).float() / 255)
            cells = [F.adaptive_avg_pool2d(layer, CELLS).flatten() for layer in layers]
            scale = (FRAMES * CELLS * CELLS * len(layers)) ** -0.5
            return (torch.cat(cells) * scale).cpu().numpy()

    def looks(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        """Clips -> fp32 [N, P]."""
        return np.stack([self.look(clip) for clip in clips])


def open_space(config: PerceptualConfig, image_size: int, device: torch.device) -> PerceptualSpace:
    """Load the network that `config` names, if any.

    Raises:
        ConfigError: the weights cannot be had, belong to another network, or frames of this size are too small for it.
    """
    if not config.weights:
        return PerceptualSpace(f"{FRAMES} frames of {PIXELS} x {PIXELS} pixels", "levels of 0 to 255", "", None, device)
    smallest = SMALLEST_IMAGE[config.network]
    if image_size < smallest:
        raise ConfigError(
            f"setting 'perceptual.network' is '{config.network}', which needs frames of at least {smallest} x {smallest} pixels; "
            f"these are {image_size} x {image_size}: leave out perceptual.weights"
        )
    network = PerceptualDistance(config.network, config.weights, "perceptual.weights")
    path = Path(config.weights).expanduser()
    is_file = config.weights not in ("imagenet", "random")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else content_id({}, dict(network.state_dict()))
    name = f"{config.network} with weights {path.name if is_file else config.weights}, {FRAMES} frames, {CELLS} x {CELLS} cells"
    return PerceptualSpace(name, "distance of unit features", sha256, network.to(device), device)


def nearest(looks: np.ndarray, others: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of `others` [M, P] to each look [N, P], or, where none are given, the nearest of the other looks.

    Returns:
        int64 [N] numbers and fp64 [N] distances.
    """
    itself = others is None
    candidates = looks if others is None else others
    found = np.empty(len(looks), dtype=np.int64)
    for start in range(0, len(looks), _BLOCK):
        squared = _squared(looks[start : start + _BLOCK], candidates)
        if itself:
            squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf
        found[start : start + _BLOCK] = squared.argmin(axis=1)
    # Anew in fp64: the difference of large sums above says which is nearest, and not how near it is.
    gaps = (np.linalg.norm(look.astype(np.float64) - candidates[i]) for look, i in zip(looks, found, strict=True))
    return found, np.fromiter(gaps, np.float64, len(looks))


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of looks [N, P] and [M, P]: fp64 [N, M], to about a millionth of the looks' squared spread."""
    middle = b.mean(axis=0)  # near zero less is lost to rounding
    x, y = a - middle, b - middle
    sums = [np.einsum("np,np->n", one, one, dtype=np.float64) for one in (x, y)]
    return np.maximum(sums[0][:, None] + sums[1] - 2 * (x @ y.T).astype(np.float64), 0)


@dataclass(frozen=True)
class OwnClips:
    """Which training clip each drawn one looks most like.

    Attributes:
        number: int64 [N], of the nearest training clip.
        distance: fp64 [N], to it.
        rank: int64 [N]: how many training clips are nearer than the nearest one whose caption is the prompt; 0: that one is the
            nearest; -1: no training clip has this caption.
    """

    number: np.ndarray
    distance: np.ndarray
    rank: np.ndarray

    @property
    def hits(self) -> int:
        """Drawn clips whose nearest training clip is their own."""
        return int((self.rank == 0).sum())


def own_clips(drawn: np.ndarray, training: np.ndarray, prompts: Sequence[str], captions: Sequence[str]) -> OwnClips:
    """Compare drawn clips with training clips by their looks.

    Args:
        drawn: looks [N, P]; training: looks [M, P].
        prompts: N, of the drawn clips; captions: M, of the training clips.
    """
    number, distance = nearest(drawn, training)
    texts = np.array(captions, dtype=object)
    ranks = []
    for look, prompt, best in zip(drawn, prompts, number, strict=True):
        own = texts == prompt
        if not own.any():
            ranks.append(-1)
        elif own[best]:
            ranks.append(0)
        else:
            squared = _squared(look[None], training)[0]
            ranks.append(max(1, int((squared < squared[own].min()).sum())))
    return OwnClips(number, distance, np.array(ranks, dtype=np.int64))


def nearest_is_own(
    drawn: Sequence[np.ndarray], training: Sequence[np.ndarray], prompts: Sequence[str], captions: Sequence[str], space: PerceptualSpace
) -> OwnClips:
    """`own_clips` of frames: clips uint8 [T, H, W, 3] each, with their prompts and captions."""
    return own_clips(space.looks(drawn), space.looks(training), prompts, captions)


def memorisation(own: OwnClips, training: np.ndarray) -> dict[str, Any]:
    """How near drawn clips are to training clips, beside how near those are to one another.

    Args:
        own: of the drawn clips.
        training: looks [M, P] of the training clips, M >= 2.

    Returns:
        medians of both nearest distances, their ratio, the 1st percentile of the training clips', the share of drawn clips
        nearer than that, and the share whose nearest clip is their own (None where no training clip has their caption).
    """
    _, typical = nearest(training)
    near = float(np.percentile(typical, NEAR))
    known = own.rank >= 0
    median, usual = float(np.median(own.distance)), float(np.median(typical))
    return {
        "training_clips": len(training),
        "nearest": median,
        "nearest_of_training": usual,
        "ratio": median / usual if usual else None,
        "near": near,
        "nearer_than_1st_percentile": share_of(int((own.distance < near).sum()), len(own.distance)),
        "nearest_is_own": share_of(own.hits, int(known.sum())) if known.any() else None,
        "median_rank_of_own": float(np.median(own.rank[known])) if known.any() else None,
    }


def distinctness(first: np.ndarray, second: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """Do prompts decide what is drawn, or seeds?

    Args:
        first: looks [N, P] of clips drawn for N different prompts.
        second: looks [N, P] of the same prompts with another seed.
        real: looks [N, P] of real clips with these captions.

    Returns:
        mean distances between clips of different prompts, between the two clips of a prompt, their ratio (None where the
        second draw equals the first), and between the real clips.
    """
    between, real_between = _mean_pairwise(first), _mean_pairwise(real)
    within = float(np.linalg.norm(first.astype(np.float64) - second, axis=1).mean())
    return {
        "prompts": len(first),
        "between_prompts": between,
        "between_seeds": within,
        "ratio": between / within if within else None,
        "between_real_clips": real_between,
    }


def _mean_pairwise(looks: np.ndarray) -> float:
    """Mean distance of all pairs of looks [N, P]."""
    wide = looks.astype(np.float64)
    return float(np.concatenate([np.linalg.norm(wide[i + 1 :] - one, axis=1) for i, one in enumerate(wide)]).mean())
