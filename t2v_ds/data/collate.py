"""Arrays of clips of different lengths -> tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def frames_batch(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The frames of a micro-batch as a tensor: {"frames": uint8 [N, S, S, 3]}."""
    return {"frames": torch.from_numpy(batch["frames"])}


def pad_codes(clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Join token clips [T, h, w] of different lengths.

    Returns:
        "codes": int64 [B, Tmax, h, w], 0 past a clip's end; "lengths": int64 [B] frames.
    """
    lengths = [len(clip) for clip in clips]
    codes = np.zeros((len(clips), max(lengths), *clips[0].shape[1:]), dtype=np.int64)
    for row, clip in zip(codes, clips, strict=True):
        row[: len(clip)] = clip
    return {"codes": torch.from_numpy(codes), "lengths": torch.tensor(lengths, dtype=torch.int64)}


def pad_text(vectors: np.ndarray, lengths: np.ndarray, tokens: int) -> dict[str, torch.Tensor]:
    """Text vectors fp16 [n of all clips, width], `lengths` (int64 [B]) of them a clip, as a text encoder gives them.

    Returns:
        "text": fp32 [B, tokens, width], 0 where there is no token; "mask": bool [B, tokens].
    """
    mask = np.arange(tokens) < lengths[:, None]  # [B, tokens]
    text = np.zeros((*mask.shape, vectors.shape[1]), dtype=np.float32)
    text[mask] = vectors
    return {"text": torch.from_numpy(text), "mask": torch.from_numpy(mask)}
