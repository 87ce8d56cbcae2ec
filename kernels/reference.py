"""Nearest codebook rows in plain torch: the definition that faster implementations are tested against.

    latents [N, D] - mean(codebook) -> chunks of rows -> x·c - |c|²/2 [rows, K] -> first maximum -> codes [N]

The nearest row c of x minimises |x - c|² = |x|² - 2 (x·c - |c|²/2), so that the largest score wins and |x|² is never
needed. Subtracting the codebook's mean from both sides leaves distances as they are and removes the common offset, which
would otherwise cancel catastrophically in fp32. Scores exist for a chunk of rows at a time: N x K of them would not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Scores of a chunk: few enough for a CPU core's cache (4 MiB), many enough to fill a GPU.
_CPU_SCORES = 2**20
_GPU_SCORES = 2**26
_GROUP = 64  # codes whose maximum is taken with vector instructions, see `_first_max`


def vq_lookup(latents: Tensor, codebook: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Find the nearest codebook row of each latent, in fp32 whatever autocast says; of equal rows the first is taken.

    Args:
        latents: floating point [N, D].
        codebook: floating point [K, D] on the same device.
        dtype: integer type of the codes.

    Returns:
        codes [N] of type `dtype`.

    Raises:
        ValueError: shapes that do not fit, a `dtype` too small for K, or a row that holds NaN or infinity (names the row).
    """
    _check(latents, codebook, dtype)
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False), _full_fp32():
        rows = codebook.detach().float()
        mean = rows.mean(0)  # [D]
        centred, bias = _panels(rows - mean)
        codes = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
        best = torch.empty(len(latents), dtype=torch.float32, device=latents.device)
        budget = _CPU_SCORES if latents.device.type == "cpu" else _GPU_SCORES
        chunk = max(64, budget // len(bias))
        for start in range(0, len(latents), chunk):
            part = slice(start, start + chunk)
            x = latents[part].detach().float() - mean  # [chunk, D]
            best[part], codes[part] = _first_max(torch.addmm(bias, x, centred.T))
        if not bool(torch.isfinite(best).all()):  # NaN and infinity always reach the best score
            raise ValueError(_explain(latents, codebook, best))
        return _first_of_equal_rows(rows)[codes].to(dtype)


def vq_assign(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look up the nearest codebook rows and collect the statistics that move a codebook by moving averages.

    On CUDA the sums are added in no fixed order, so that their last bits differ from run to run.

    Args:
        latents: floating point [N, D].
        codebook: floating point [K, D] on the same device.

    Returns:
        codes int64 [N]; quantized fp32 [N, D], the codebook rows; counts fp32 [K], latents a code; sums fp32 [K, D] of them.

    Raises:
        ValueError: as `vq_lookup`.
    """
    codes = vq_lookup(latents, codebook)
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        rows = codebook.detach().float()
        counts = torch.bincount(codes, minlength=len(rows)).float()
        sums = torch.zeros_like(rows).index_add_(0, codes, latents.detach().float())
        return codes, rows[codes], counts, sums


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Keep TF32 and bf16 shortcuts out of fp32 matrix products, whatever the process has chosen elsewhere."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _panels(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Centred rows [K, D] -> the same padded to whole groups, and the bias -|c|²/2 of each (of padding: -infinity)."""
    padding = -len(centred) % _GROUP
    bias = centred.double().square().sum(1).mul_(-0.5).float()
    padded = torch.nn.functional.pad(centred, (0, 0, 0, padding))
    return padded, torch.nn.functional.pad(bias, (0, padding), value=-torch.inf)


def _first_max(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of [R, K] and the first index where it stands; K is a multiple of `_GROUP`.

    torch's argmax is scalar code on a CPU and takes as long as the matrix product before it. Its amax is vectorised: the
    maxima of groups come first, and only they and the winning group are searched for an index (3 to 7 times faster).
    """
    groups = scores.view(len(scores), -1, _GROUP)
    best, group = groups.amax(2).max(1)
    winners = groups[torch.arange(len(scores), device=scores.device), group]  # [R, _GROUP]
    return best, group * _GROUP + winners.argmax(1)


def _first_of_equal_rows(rows: Tensor) -> Tensor:
    """Map each row of [K, D] to the lowest index that holds the same row: int64 [K].

    A matrix product sums full and left-over panels of columns in different orders: equal rows can then differ in the
    last bit of their score, and the maximum would not be the first of them.
    """
    size = len(rows)
    own = torch.arange(size, device=rows.device)
    keys = rows.double().mul(torch.linspace(1.0, 2.0, rows.shape[1], dtype=torch.float64, device=rows.device)).sum(1)  # [K]
    _, group = torch.unique(keys, return_inverse=True)
    first = torch.full_like(own, size).scatter_reduce_(0, group, own, reduce="amin")[group]
    return torch.where((rows[first] == rows).all(1), first, own)  # different rows may share a key


def _check(latents: Tensor, codebook: Tensor, dtype: torch.dtype) -> None:
    if latents.ndim != 2 or codebook.ndim != 2 or latents.shape[1] != codebook.shape[1]:
        raise ValueError(f"latents are {list(latents.shape)} and the codebook is {list(codebook.shape)}; expected [N, D] and [K, D]")
    if not latents.is_floating_point() or not codebook.is_floating_point():
        raise ValueError(f"latents are {latents.dtype} and the codebook is {codebook.dtype}; expected floating point")
    if len(codebook) == 0:
        raise ValueError("the codebook has no rows")
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or torch.iinfo(dtype).max < len(codebook) - 1:
        raise ValueError(f"codes of type {dtype} cannot name {len(codebook)} codebook rows; use an integer type that can: torch.int64")


def _explain(latents: Tensor, codebook: Tensor, best: Tensor) -> str:
    bad = (~torch.isfinite(codebook).all(1)).nonzero().flatten()
    if len(bad):
        return f"codebook row {int(bad[0])} holds NaN or infinity"
    row = int((~torch.isfinite(best)).nonzero()[0])
    finite = bool(torch.isfinite(latents[row]).all())
    return f"latents row {row} holds {'numbers too large for fp32 distances' if finite else 'NaN or infinity'}"
