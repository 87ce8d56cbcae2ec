"""What accelerators have: memory, and matrix arithmetic of dense (not sparse) matrices.

The figures were not checked against the data sheets that they name, nor measured; `peak_tflops` and `memory` overrule them.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from t2v_ds.config import PlanConfig
from t2v_ds.errors import ConfigError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One GPU, or a process on a CPU."""

    name: str
    memory: float  # GiB, as its driver shows them
    bf16: float  # TFLOP/s, sums in fp32
    fp32: float  # TFLOP/s, without TF32, which PyTorch does not use for matrix products unless told to
    source: str


KNOWN = {
    "h100": Accelerator("H100 SXM", 79.6, 989.4, 66.9, "NVIDIA H100 Tensor Core GPU Architecture, 2022, table 2"),
    "h100-pcie": Accelerator("H100 PCIe", 79.6, 756.0, 51.2, "NVIDIA H100 Tensor Core GPU Architecture, 2022, table 2"),
    "h200": Accelerator("H200 SXM", 140.4, 989.4, 66.9, "NVIDIA H200 data sheet, 2024 (1,979 TFLOP/s with sparsity)"),
    "b200": Accelerator("B200", 179.0, 2250.0, 75.0, "NVIDIA Blackwell data sheet, 2024 (4,500 TFLOP/s with sparsity)"),
    "a100": Accelerator("A100 80 GB", 80.0, 312.0, 19.5, "NVIDIA A100 data sheet, 2021"),
    "a100-40gb": Accelerator("A100 40 GB", 39.6, 312.0, 19.5, "NVIDIA A100 data sheet, 2021"),
    "l40s": Accelerator("L40S", 45.0, 362.0, 91.6, "NVIDIA L40S data sheet, 2023"),
    "l4": Accelerator("L4", 22.5, 121.0, 30.3, "NVIDIA L4 data sheet, 2023 (242 TFLOP/s with sparsity)"),
    "rtx4090": Accelerator("GeForce RTX 4090", 24.0, 165.2, 82.6, "NVIDIA Ada GPU Architecture, 2022, table 2"),
    "cpu": Accelerator("CPU process", 0.0, 0.0, 0.0, ""),
}
# GiB that no tensor holds. On a GPU: the CUDA context, workspaces of cuBLAS and cuDNN, buffers of NCCL; a round figure, not measured.
# On a CPU: Python, PyTorch and DeepSpeed, measured (docs/plan.md).
OVERHEAD = {"gpu": 1.5, "cpu": 0.8}
# On a CPU freed memory is kept for the next step (`distributed.keep_freed_memory`), with holes: measured 0.3 to 0.8 of the tensors.
CPU_HOLES = 0.3


def find(config: PlanConfig) -> Accelerator:
    """The accelerator of `config`, with its memory and peak where those are given.

    Raises:
        ConfigError: an unknown name.
    """
    if config.accelerator not in KNOWN:
        raise ConfigError(f"setting 'accelerator' is '{config.accelerator}', which is not known: {nearest(config.accelerator, KNOWN)}")
    known = KNOWN[config.accelerator]
    memory = config.memory or known.memory or psutil.virtual_memory().total / GIB / config.gpus
    return Accelerator(known.name, memory, config.peak_tflops or known.bf16, config.peak_tflops or known.fp32, known.source)


def resident(tensors: int, config: PlanConfig) -> int:
    """Bytes that a process takes whose tensors hold so many."""
    cpu = config.accelerator == "cpu"
    overhead = config.overhead if config.overhead >= 0 else OVERHEAD["cpu" if cpu else "gpu"]
    return int(tensors * (1 + CPU_HOLES * cpu) + overhead * GIB)
