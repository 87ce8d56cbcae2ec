"""Arrays of clips of different lengths -> tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def frames_batch(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The frames of a micro-batch as a tensor: {"frames": uint8 [N, S, S, 3]}."""
    return {"frames": torch.from_numpy(batch["frames"])}


def pack_codes(clips: Sequence[np.ndarray]) -> dict[str, Any]:
    """Join token clips [T, h, w] of different lengths, one behind the other.

    Returns:
        "codes": int64 [F, h, w]; "lengths": frames of each, a list of B numbers, which never need to come back from a device.
    """
    codes = np.concatenate(list(clips)).astype(np.int64)
    return {"codes": torch.from_numpy(codes), "lengths": [len(clip) for clip in clips]}


def pad_text(vectors: np.ndarray, lengths: np.ndarray, tokens: int) -> dict[str, torch.Tensor]:
    """Text vectors fp16 [n of all clips, width], `lengths` (int64 [B]) of them a clip, as a text encoder gives them.

    Returns:
        "text": fp32 [B, tokens, width], 0 where there is no token; "mask": bool [B, tokens].
    """
    mask = np.arange(tokens) < lengths[:, None]  # [B, tokens]
    text = np.zeros((*mask.shape, vectors.shape[1]), dtype=np.float32)
    text[mask] = vectors
    return {"text": torch.from_numpy(text), "mask": torch.from_numpy(mask)}
