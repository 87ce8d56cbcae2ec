"""The face of the lookups: checks what comes in, and chooses who computes.

    latents, codebook on a CPU, compiled operators there -> vq_cpu.cpp
    anything else                                        -> reference.py        the same codes, to the last one
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, reference


def vq_lookup(latents: Tensor, codebook: Tensor, dtype: torch.dtype = torch.int64, mark_bad: bool = False) -> Tensor:
    """Find the nearest codebook row of each latent: the argmin of the squared distance in exact arithmetic.

    The numbers given are taken as they are (after conversion to fp32, which is exact for bf16 and fp16); nothing that is
    rounded on the way can change a code. Of equally near rows the one with the lowest index is taken.

    Args:
        latents: floating point [N, D], in any memory layout.
        codebook: floating point [K, D] on the same device.
        dtype: integer type of the codes.
        mark_bad: give latents that hold NaN or infinity the code -1 instead of raising an error.

    Returns:
        codes [N] of type `dtype`.

    Raises:
        ValueError: shapes that do not fit, a `dtype` too small for K, or a row that holds NaN or infinity (names the row).
    """
    _check(latents, codebook, dtype)
    return _lookup(_plain(latents), _plain(codebook), mark_bad).to(dtype)


def vq_assign(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look up the nearest codebook rows and collect the statistics that move a codebook by moving averages.

    On a CPU the sums do not depend on the number of threads; on CUDA their last bits differ from run to run.

    Args:
        latents: floating point [N, D].
        codebook: floating point [K, D] on the same device.

    Returns:
        codes int64 [N]; quantized fp32 [N, D], the codebook rows; counts fp32 [K], latents a code; sums fp32 [K, D] of them.

    Raises:
        ValueError: as `vq_lookup`.
    """
    _check(latents, codebook, torch.int64)
    latents, codebook = _plain(latents), _plain(codebook)
    codes = _lookup(latents, codebook, mark_bad=False)
    collect = torch.ops.t2v_vq.statistics if _compiled(latents) else reference.statistics
    return codes, *collect(latents, codebook, codes)


def _lookup(latents: Tensor, codebook: Tensor, mark_bad: bool) -> Tensor:
    bad = (~torch.isfinite(codebook).all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"codebook row {int(bad[0])} holds NaN or infinity")
    codes: Tensor = torch.ops.t2v_vq.lookup(latents, codebook) if _compiled(latents) else reference.lookup(latents, codebook)
    if not mark_bad and len(codes) and int(codes.min()) < 0:
        raise ValueError(f"latents row {int((codes < 0).nonzero()[0])} holds NaN or infinity")
    return codes


def _compiled(latents: Tensor) -> bool:
    return latents.device.type == "cpu" and native.available()


def _plain(rows: Tensor) -> Tensor:
    return rows.detach().float().contiguous()


def _check(latents: Tensor, codebook: Tensor, dtype: torch.dtype) -> None:
    if latents.ndim != 2 or codebook.ndim != 2 or latents.shape[1] != codebook.shape[1]:
        raise ValueError(f"latents are {list(latents.shape)} and the codebook is {list(codebook.shape)}; expected [N, D] and [K, D]")
    if not latents.is_floating_point() or not codebook.is_floating_point():
        raise ValueError(f"latents are {latents.dtype} and the codebook is {codebook.dtype}; expected floating point")
    if latents.device != codebook.device:
        raise ValueError(f"latents are on {latents.device} and the codebook is on {codebook.device}; expected one device")
    if len(codebook) == 0 or codebook.shape[1] == 0:
        raise ValueError(f"the codebook is {list(codebook.shape)}; it needs at least one row of at least one number")
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or torch.iinfo(dtype).max < len(codebook) - 1:
        raise ValueError(f"codes of type {dtype} cannot name {len(codebook)} codebook rows; use an integer type that can: torch.int64")
