"""The face of the kernels: checks what comes in, and calls the operators of `ops.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops

MOST_CODES, MOST_NUMBERS = 65_536, 1024
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def vq_lookup(latents: Tensor, codebook: Tensor, dtype: torch.dtype = torch.int64, mark_bad: bool = False) -> Tensor:
    """Find the nearest codebook row of each latent: the argmin of the squared distance in exact arithmetic.

    The numbers given are taken as they are; nothing that is rounded on the way can change a code. Of equally near rows the one
    with the lowest index is taken.

    Args:
        latents: fp32, bf16 or fp16 [N, D], in any memory layout.
        codebook: fp32, bf16 or fp16 [K, D] on the same device.
        dtype: integer type of the codes.
        mark_bad: give latents that hold NaN or infinity the code -1 instead of raising an error.

    Returns:
        codes [N] of type `dtype`.

    Raises:
        ValueError: shapes or types that do not fit, a `dtype` too small for K, or a row that holds NaN or infinity (names the row;
            a RuntimeError with the same words in a compiled graph).
    """
    _check(latents, codebook, dtype)
    if mark_bad and not dtype.is_signed:
        raise ValueError(f"codes of type {dtype} cannot be -1, as mark_bad=True asks; use a signed type: torch.int64")
    ops.ready()
    codes: Tensor = _call(torch.ops.t2v_vq.lookup, latents.detach().contiguous(), _plain(codebook), mark_bad)
    return codes.to(dtype)


def vq_assign(latents: Tensor, codebook: Tensor, deterministic: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look up the nearest codebook rows and collect the statistics that move a codebook by moving averages.

    A gradient of `quantized` goes straight through to `latents` (van den Oord et al. 2017, section 3.2); the codebook gets none.

    Args:
        latents: fp32, bf16 or fp16 [N, D], in any memory layout.
        codebook: fp32, bf16 or fp16 [K, D] on the same device.
        deterministic: the same sums to the last bit in every run, on a CPU with any number of threads. False saves time on a
            GPU, where sums are then added in no fixed order; a CPU always does the former.

    Returns:
        codes int64 [N]; quantized fp32 [N, D], the codebook rows; counts fp32 [K], latents a code; sums fp32 [K, D] of them.

    Raises:
        ValueError: as `vq_lookup`.
    """
    _check(latents, codebook, torch.int64)
    ops.ready()
    quantized, codes, counts, sums = _call(torch.ops.t2v_vq.assign, latents.contiguous(), _plain(codebook), deterministic)
    return codes, quantized, counts, sums


def _call(operator: Callable[..., Any], *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:  # all that compiled code can raise
        bad = re.search(r"(latents|codebook) row \d+ holds NaN or infinity", str(error))
        if bad is None:
            raise
        raise ValueError(bad[0]) from None


def _plain(codebook: Tensor) -> Tensor:
    return codebook.detach().float().contiguous()


def _check(latents: Tensor, codebook: Tensor, dtype: torch.dtype) -> None:
    if latents.ndim != 2 or codebook.ndim != 2 or latents.shape[1] != codebook.shape[1]:
        raise ValueError(f"latents are {list(latents.shape)} and the codebook is {list(codebook.shape)}; expected [N, D] and [K, D]")
    if latents.dtype not in _TYPES or codebook.dtype not in _TYPES:
        raise ValueError(f"latents are {latents.dtype} and the codebook is {codebook.dtype}; expected float32, bfloat16 or float16")
    if latents.device != codebook.device:
        raise ValueError(f"latents are on {latents.device} and the codebook is on {codebook.device}; expected one device")
    if not 1 <= len(codebook) <= MOST_CODES or not 1 <= codebook.shape[1] <= MOST_NUMBERS:
        raise ValueError(f"the codebook is {list(codebook.shape)}; it can have 1 to {MOST_CODES} rows of 1 to {MOST_NUMBERS} numbers")
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or torch.iinfo(dtype).max < len(codebook) - 1:
        raise ValueError(f"codes of type {dtype} cannot name {len(codebook)} codebook rows; use an integer type that can: torch.int64")
