"""How much of a clip survives the tokenizer: PSNR against the best constant colour, and how many codes are used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.subset import Selection
from t2v_ds.models.facade import Tokenizer


@dataclass(frozen=True)
class Reconstruction:
    """Means over frames; PSNR in dB (peak 255)."""

    psnr: float
    psnr_mean_colour: float  # of predicting each frame's mean colour everywhere
    codes_used: float  # share of the codebook that the clips use
    clips: int
    frames: int


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame in dB: uint8 [T, H, W, 3] twice -> fp64 [T]; 100 dB where they are equal."""
    squared = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    return 10 * np.log10(255**2 / np.maximum(squared.mean(axis=(1, 2, 3)), 255**2 * 1e-10))


def measure_reconstruction(tokenizer: Tokenizer, clips: list[np.ndarray]) -> Reconstruction:
    """Encode and decode clips (each uint8 [T, H, W, 3])."""
    own, mean, used, frames = [], [], set(), 0
    for clip in clips:
        codes = tokenizer.encode(clip)
        own.append(psnr(clip, tokenizer.decode(codes)))
        average = clip.mean(axis=(1, 2), keepdims=True).round().astype(np.uint8)
        mean.append(psnr(clip, np.broadcast_to(average, clip.shape)))
        used.update(np.unique(codes).tolist())
        frames += len(clip)
    share = len(used) / tokenizer.model.config.quantizer.codebook_size
    return Reconstruction(float(np.concatenate(own).mean()), float(np.concatenate(mean).mean()), share, len(clips), frames)


def some_clips(dataset: ShardDataset | Selection, count: int) -> list[np.ndarray]:
    """Up to `count` clips spread over the data: each uint8 [T, H, W, 3]."""
    numbers = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
    return [dataset.read(int(i))["frames"].copy() for i in numbers]
