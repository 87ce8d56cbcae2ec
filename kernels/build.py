"""Compiles the libraries of this folder, and finds those that are compiled; needs a compiler, and torch for its operators only.

    python kernels/build.py [cpu] [cuda] [gif] [clips] [--into FOLDER]

    built with the package (setup.py) -> there; else in the cache -> there; else compiled into the cache

A library's name holds a digest of its sources, its flags and torch's version: one that is there under its name is the right one.
Processes that start together may each compile; the renaming makes whichever comes last harmless, and a kill leaves no lock behind.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
_PLAIN = ("-std=c++17", "-O3", "-fPIC", "-shared")  # a C interface; needs no library
_STABLE = ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020e000000000000")  # torch's stable ABI, as of 2.14


@dataclass(frozen=True)
class Target:
    """A library and what it is made of."""

    source: str
    headers: tuple[str, ...]
    flags: tuple[str, ...]
    with_torch: bool = True


TARGETS = {
    "CPU": Target(
        source="vq_cpu.cpp",
        headers=("vq.h", "vq_cpu_common.h", "vq_cpu_vector.h", "vq_cpu_vector.inc", "vq_cpu_amx.h"),
        flags=("-O3", "-fPIC", "-shared", "-Wno-psabi", *_STABLE),
    ),
    "CUDA": Target(
        source="vq_cuda.cu",
        headers=(
            "vq.h", "vq_cuda_device.cuh", "vq_cuda_codebook.cuh", "vq_cuda_filter.cuh", "vq_cuda_refine.cuh", "vq_cuda_statistics.cuh",
            "vq_cuda_ops.h",
        ),
        # Machine code for A100 and H100, and PTX from which the driver compiles for what comes later.
        flags=(
            "-O3", "-Xcompiler=-fPIC", "-shared", "-DUSE_CUDA", *_STABLE,
            "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90",
        ),
    ),
    "GIF": Target("gif.cpp", (), _PLAIN, with_torch=False),
    "CLIPS": Target("clips.cpp", (), _PLAIN, with_torch=False),
}  # fmt: skip


def library_name(target: Target) -> str:
    """File name of a target's library, different for different sources, flags and versions of torch."""
    torch_version = _torch().__version__ if target.with_torch else ""
    digest = hashlib.sha256("\0".join((torch_version, platform.machine(), *target.flags)).encode())
    for name in (target.source, *target.headers):
        digest.update((HERE / name).read_bytes())
    return f"{Path(target.source).stem}-{digest.hexdigest()[:16]}.so"


def _torch() -> Any:
    """Imported only where it is needed: reading GIFs takes a tenth of the time that importing torch does."""
    import torch

    return torch


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, of the usual place, or on the PATH."""
    places = [Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places += [Path("/usr/local/cuda/bin/nvcc")]
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    return next((place for place in places if place.is_file()), None)


def compiler_of(device: str) -> list[str]:
    """The command of the compiler for a target.

    Raises:
        RuntimeError: there is none.
    """
    if device != "CUDA":
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or ""]
        if not compiler[0]:
            raise RuntimeError("there is no C++ compiler (g++) on the PATH")
        return compiler
    if _torch().version.cuda is None:
        raise RuntimeError("this torch is built without CUDA")
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc: not in CUDA_HOME, /usr/local/cuda or on the PATH")
    return [str(nvcc)]


def compile_library(device: str, library: Path) -> None:
    """Compile the sources of a target into `library`, which appears whole or not at all.

    Raises:
        RuntimeError: there is no compiler, or it reports an error (with its first line).
        OSError: the compiler cannot be started, or the folder not be written.
    """
    compiler, target = compiler_of(device), TARGETS[device]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        made = Path(temporary) / library.name
        command = [*compiler, *target.flags, "-o", str(made), str(HERE / target.source)]
        if target.with_torch:
            root = Path(_torch().__file__).parent
            command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
            raise RuntimeError(f"{compiler[0]} failed: {lines[0]}")
        with made.open("ab") as file:  # behind what the loader reads: a library that was cut would kill the process
            file.write(hashlib.sha256(made.read_bytes()).digest())
        os.replace(made, library)


def is_whole(library: Path) -> bool:
    """Whether a library is there as `compile_library` left it."""
    if not library.is_file():
        return False
    data = library.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def find_library(name: str) -> Path | None:
    """The compiled library of a target, as installed or as cached; None if there is none that is whole."""
    file_name = library_name(TARGETS[name])
    if is_whole(HERE / file_name):
        return HERE / file_name
    cached = _cache() / file_name
    return cached if is_whole(cached) else None


def library(name: str) -> Path:
    """The library of a target, compiled now if need be.

    Raises:
        RuntimeError, OSError: see `compile_library`.
    """
    found = find_library(name)
    if found is None:
        compiler_of(name)  # before saying that it compiles
        found = _cache() / library_name(TARGETS[name])
        logger.info("compiling %s (once)", TARGETS[name].source)
        compile_library(name, found)
    return found


def load_plain(name: str, off: str, instead: str) -> ctypes.CDLL | None:
    """The library of a target with a C interface, compiled now if need be; None, and a warning with the reason, if there is none.

    Args:
        name: of the target.
        off: "VARIABLE=value": where the environment says so, the library is kept out.
        instead: what is done then, for the warning.
    """
    variable, _, value = off.partition("=")
    reason = off
    if os.environ.get(variable) != value:
        try:
            return ctypes.CDLL(str(library(name)))
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
    logger.warning("%s: %s", instead, reason)
    return None


def _cache() -> Path:
    """The user's cache.

    Raises:
        RuntimeError: this process has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2v_ds"


def main() -> None:
    """Compile what is named: all that can be, unless asked for less."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="*", metavar="cpu|cuda|gif|clips")
    parser.add_argument("--into", type=Path, default=HERE)
    flags = parser.parse_args()
    for device in [one.upper() for one in flags.devices] or list(TARGETS):
        if device not in TARGETS:
            parser.error(f"{device.lower()} is not a target; use {', '.join(TARGETS).lower()}")
        try:
            compile_library(device, flags.into / library_name(TARGETS[device]))
        except (OSError, RuntimeError) as error:
            sys.exit(f"{device.lower()}: {error}")


if __name__ == "__main__":
    main()
