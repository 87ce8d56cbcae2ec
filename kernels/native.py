"""Finds or compiles the operators `torch.ops.t2v_vq` and loads them.

    built with the package (setup.py)  -> load
    else: sources, flags, torch's version -> a name -> in the cache: load; else compile into it -> load

The CPU's library holds code for every kind of processor and chooses when it runs, so that a cache that nodes share serves them
all. The GPU's is compiled where torch sees a GPU and nvcc is found. Ranks that start together may each compile; the renaming
makes whichever comes last harmless, and a kill leaves no lock behind.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

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
        torch.ops.load_library(str(_library(device)))
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]
    return ""


def find_library(device: str) -> Path | None:
    """The compiled library of these sources for "CPU" or "CUDA", as installed or as cached; None if there is none that is whole."""
    name = build.library_name(build.TARGETS[device])
    if build.is_whole(build.HERE / name):
        return build.HERE / name
    cached = _cache() / name
    return cached if build.is_whole(cached) else None


def _cache() -> Path:
    """The user's cache.

    Raises:
        RuntimeError: this process has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2v_ds"


def _library(device: str) -> Path:
    """The library for a device, compiled now if need be."""
    library = find_library(device)
    if library is None:
        build.compiler_of(device)  # before saying that it compiles
        library = _cache() / build.library_name(build.TARGETS[device])
        logger.info("compiling %s (once)", build.TARGETS[device].source)
        build.compile_library(device, library)
    return library
