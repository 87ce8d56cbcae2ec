"""What this machine has and lacks, and what lacking it means. Nothing is built, downloaded or changed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from t2v_ds.kernels import build

Row = tuple[Literal["ok", "missing", "note"], str, str]

GIB = 2**30
SMALL_MEMORY = 8 * GIB
SMALL_DISK = 10 * GIB
SMALL_SHARED_MEMORY = GIB
DEEPSPEED_TIMEOUT_S = 180


def report() -> list[Row]:
    """Look at the machine.

    Returns:
        (status, what, detail) rows, each detail one line: "ok": there; "missing": something of t2v will not work without it;
        "note": worth knowing, nothing fails. A check that fails itself is a "note" saying so.
    """
    checks: list[Callable[[], Iterator[Row]]] = [
        _python,
        _torch,
        _gpus,
        _bf16_on_cpu,
        _cores_and_memory,
        _disk,
        _shared_memory,
        _deepspeed,
        _compilers,
        _kernels,
        _video,
        _tensorboard,
        _perceptual_weights,
        _slurm,
        _remote_shell,
    ]
    rows: list[Row] = []
    for check in checks:
        try:
            rows += check()
        except Exception as error:  # an odd machine must not hide the other rows
            what = check.__name__.strip("_").replace("_", " ")
            rows.append(("note", what, f"could not be checked: {_one_line(str(error)) or type(error).__name__}"))
    return rows


def _python() -> Iterator[Row]:
    version = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        yield "ok", "Python", version
    else:
        yield "note", "Python", f"{version}: tested with 3.11 only"


def _torch() -> Iterator[Row]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"
    yield "ok", "PyTorch", f"{torch.__version__} ({build})"


def _gpus() -> Iterator[Row]:
    if not torch.cuda.is_available():
        reason = "this build of PyTorch has no GPU support" if not (torch.version.cuda or torch.version.hip) else "none visible to PyTorch"
        yield "note", "GPU", f"{reason}: everything runs on the CPU, which is enough for the demo and slow at spec size"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield "ok", f"GPU {index}", f"{device.name}, {device.total_memory / GIB:.0f} GiB"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield "ok", "bf16 on GPU", "in hardware"
    else:
        yield "note", "bf16 on GPU", "not in hardware: train.precision=fp32 is faster"


def _bf16_on_cpu() -> Iterator[Row]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        yield "note", "bf16 on CPU", "unknown, as there is no /proc/cpuinfo: on the CPU, compare train.precision=bf16 and fp32"
        return
    words = set(info.read_text(encoding="utf-8", errors="replace").split())
    having = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in words]  # the last is ARM's
    if having:
        yield "ok", "bf16 on CPU", f"in hardware ({', '.join(having)})"
    else:
        yield "note", "bf16 on CPU", "not in hardware: when training on the CPU, train.precision=fp32 is faster"


def _cores_and_memory() -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "ok", "CPU cores", str(cores)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    if limit.is_file() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    detail = f"{memory / GIB:.1f} GiB"
    if memory < SMALL_MEMORY:
        yield "note", "memory", f"{detail} is little: lower train.batch if the system kills a stage"
    else:
        yield "ok", "memory", detail


def _disk() -> Iterator[Row]:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / GIB:.1f} GiB free in this folder"
    if free < SMALL_DISK:
        yield "note", "disk", f"{detail}: raw shards take about 50 KB a frame of 128 x 128, checkpoints three times the model each"
    else:
        yield "ok", "disk", detail


def _shared_memory() -> Iterator[Row]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield "note", "shared memory", "this system has no /dev/shm"
        return
    total = shutil.disk_usage(folder).total
    detail = f"{total / GIB:.2f} GiB in /dev/shm"
    if total < SMALL_SHARED_MEMORY:
        yield "note", "shared memory", f"{detail}: several GPUs on this node may fail to talk; start the container with --shm-size=4g"
    else:
        yield "ok", "shared memory", detail


def _deepspeed() -> Iterator[Row]:
    what = "DeepSpeed"
    lacking = "t2v cannot train (generating and decoding work): pip install deepspeed"
    if importlib.util.find_spec("deepspeed") is None:
        yield "missing", what, f"not installed: {lacking}"
        return
    # In a process of its own: importing it changes the process, and may fail on a damaged CUDA installation.
    code = "import deepspeed; print('version', deepspeed.__version__)"
    try:
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEEPSPEED_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        yield "missing", what, f"importing it takes over {DEEPSPEED_TIMEOUT_S} s, so that t2v cannot train"
        return
    versions = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("version ")]
    if result.returncode == 0 and versions:
        yield "ok", what, versions[-1]
    else:
        lines = result.stderr.strip().splitlines()
        yield "missing", what, f"installed, but cannot be imported ({_one_line(lines[-1]) if lines else 'no message'}): {lacking}"


def _compilers() -> Iterator[Row]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    exact = "nearest codes are then found with plain torch, the same ones but slower"
    yield _command("C++ compiler", f"not found: {exact}, unless the package was built with its kernel", names=("c++", "g++", "clang++"))
    yield _command("nvcc", f"not found: on a GPU, {exact}", places=[Path(home) / "bin"])
    yield _command(
        "ninja", "not found: only DeepSpeed's own operators, which t2v's settings do not use, need it", places=[Path(sys.executable).parent]
    )


def _kernels() -> Iterator[Row]:
    exact = "plain torch, exact as well but slower"
    names = {"CPU": ("CPU kernel", exact), "CUDA": ("CUDA kernel", exact)}
    names |= {"GIF": ("GIF reader", "Pillow, the same frames but slower"), "CLIPS": ("shard reader", "Python, the same bytes but slower")}
    if not torch.cuda.is_available():
        del names["CUDA"]
    for name, (what, instead) in names.items():
        library = build.find_library(name)
        try:
            build.compiler_of(name)
            otherwise = "compiled at the first use"
        except RuntimeError as error:
            otherwise = f"{instead}: {error}"
        yield ("ok" if library else "note"), what, str(library or otherwise)


def _video() -> Iterator[Row]:
    try:
        import av

        encoders = [name for name in ("libx264", "mpeg4") if _can_encode(av, name)]
        version = av.__version__
    except ImportError as error:
        yield "missing", "MP4 (PyAV)", f"cannot be imported ({_one_line(str(error))}), so .mp4 cannot be written; .gif can: pip install av"
        return
    if "libx264" in encoders:
        yield "ok", "MP4 (PyAV)", f"{version}, with H.264"
    elif encoders:
        yield "note", "MP4 (PyAV)", f"{version} without H.264: .mp4 is written as MPEG-4, which browsers do not show"
    else:
        yield "missing", "MP4 (PyAV)", f"{version} has no encoder for .mp4; .gif can be written: pip install --force-reinstall av"


def _can_encode(av: object, name: str) -> bool:
    try:
        av.codec.Codec(name, "w")  # type: ignore[attr-defined]
    except Exception:  # PyAV's class of this error has moved between versions
        return False
    return True


def _tensorboard() -> Iterator[Row]:
    if importlib.util.find_spec("tensorboard") is None:
        yield "missing", "TensorBoard", "not installed, so that training cannot be watched: pip install tensorboard"
    else:
        yield "ok", "TensorBoard", f"{importlib.metadata.version('tensorboard')}: tensorboard --logdir RUN"


def _perceptual_weights() -> Iterator[Row]:
    from torchvision import models

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    known = {"vgg16": models.VGG16_Weights.IMAGENET1K_V1.url, "squeezenet": models.SqueezeNet1_0_Weights.IMAGENET1K_V1.url}
    for network, url in known.items():
        if (folder / Path(url).name).is_file():
            yield "ok", f"perceptual weights, {network}", "in torch's cache"
        else:
            yield "note", f"perceptual weights, {network}", "not in torch's cache: losses.perceptual_weights=imagenet downloads them"


def _slurm() -> Iterator[Row]:
    absent = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if absent:
        yield "note", "SLURM", f"no {', '.join(absent)}: slurm/*.sbatch cannot be submitted from here"
    else:
        yield "ok", "SLURM", "sbatch, srun and scontrol"


def _remote_shell() -> Iterator[Row]:
    for name in ("pdsh", "ssh"):
        yield _command(name, "not found: `deepspeed --hostfile` needs it to start ranks on other nodes (SLURM and one node do not)")


def _command(what: str, lacking: str, names: tuple[str, ...] = (), places: list[Path] | None = None) -> Row:
    search = os.pathsep.join([os.environ.get("PATH", ""), *(str(place) for place in places or [])])
    for name in names or (what,):
        found = shutil.which(name, path=search)
        if found:
            return "ok", what, found
    return "note", what, lacking


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
