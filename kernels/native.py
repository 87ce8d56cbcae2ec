"""Loads the operators `torch.ops.t2v_vq`, which `build.py` finds or compiles.

The CPU's library holds code for every kind of processor and chooses when it runs, so that a cache that nodes share serves them
all. The GPU's is compiled where torch sees a GPU and nvcc is found.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from . import build

logger = logging.getLogger(__name__)

SWITCH = "T2V_VQ"  # environment variable: "reference" keeps the compiled operators out


@cache
def available() -> tuple[str, ...]:
    """Devices ("CPU", "CUDA") whose compiled operators are loaded now; says once, by its reason, what is not."""
    loaded: list[str] = []
    for device in ("CPU", "CUDA"):
        if device == "CUDA" and (not loaded or not torch.cuda.is_available()):
            break
        reason = _load(device)
        if reason:
            logger.warning("nearest codes on %s are found with plain torch, exact as well but slower: %s", device, reason)
        else:
            loaded.append(device)
    return tuple(loaded)


def _load(device: str) -> str:
    """Load a device's library; the reason why not, or nothing."""
    if os.environ.get(SWITCH) == "reference":
        return f"{SWITCH}=reference"
    try:
        torch.ops.load_library(str(build.library(device)))
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]
    return ""
