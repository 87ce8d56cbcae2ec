"""Compiles `vq_cpu.cpp` once a machine and loads it as the operators `torch.ops.t2v_vq`.

    sources, flags, torch's version -> a name -> in the cache: load; else g++ -> temporary file -> rename -> load

The library holds code for every kind of processor and chooses when it runs, so a cache that nodes share serves them all.
Ranks that start together may each compile; the renaming makes whichever comes last harmless, and a kill leaves no lock behind.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = ("vq_cpu.cpp", "vq.h")
SWITCH = "T2V_VQ"  # environment variable: "reference" keeps the compiled operators out
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020e000000000000")


@cache
def available() -> bool:
    """Whether `torch.ops.t2v_vq` can be used; the first call compiles or loads it, and says once why it cannot."""
    reason = _load()
    if reason:
        logger.warning("nearest codes are found with plain torch, exact as well but slower: %s", reason)
    return not reason


def _load() -> str:
    """Load the library; the reason why not, or nothing."""
    if os.environ.get(SWITCH) == "reference":
        return f"{SWITCH}=reference"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    here = Path(__file__).parent
    digest = hashlib.sha256("\0".join((torch.__version__, *_FLAGS)).encode())
    for name in SOURCES:
        digest.update((here / name).read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2v_ds"
    library = folder / f"vq-{digest.hexdigest()[:16]}.so"
    try:
        if not library.is_file():
            if compiler is None:
                return "there is no C++ compiler (g++) on the PATH"
            _compile(compiler, here / SOURCES[0], library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]
    return ""


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Compile `source` into `library`, which appears whole or not at all.

    Raises:
        OSError: the folder cannot be written, or the compiler not started.
        RuntimeError: the compiler reports an error (with its first line).
    """
    root = Path(torch.__file__).parent
    library.parent.mkdir(parents=True, exist_ok=True)
    logger.info("compiling %s (once)", source.name)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *_FLAGS, f"-I{root / 'include'}", "-o", str(made), str(source), f"-L{root / 'lib'}"]
        command += ["-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
            raise RuntimeError(f"{compiler} failed: {lines[0]}")
        os.replace(made, library)
