"""Nearest codebook rows in plain torch: what faster implementations are tested against, and what runs where none is built.

    latents [N, D] -> chunks of rows -> x·c - |c|²/2 in fp32 [rows, K] -> codes within twice the error bound of the best
                   -> one: done; several: distances in float64 -> still too close: integers -> codes [N]

The nearest row c of x minimises |x - c|² = |x|² - 2 (x·c - |c|²/2), so that the largest score wins. Both sides are centred on
the codebook's mean, which leaves distances as they are but would otherwise cancel catastrophically, and scaled by a power of
two, so that nothing overflows. Scores exist for a chunk of rows at a time: N x K of them would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Scores of a chunk: few enough for a CPU core's cache (4 MiB), many enough to fill a GPU.
_CPU_SCORES = 2**20
_GPU_SCORES = 2**26
_PAIRS = 2**22  # numbers of float64 at once, where a latent is compared with several codes


def lookup(latents: Tensor, codebook: Tensor) -> Tensor:
    """Nearest rows of `codebook` fp32 [K, D] for latents fp32 [N, D]: int64 [N]; -1 where a latent holds NaN or infinity."""
    with torch.autocast(latents.device.type, enabled=False), _full_fp32():
        distinct, first = _distinct_rows(codebook)
        mean = distinct.double().mean(0).float()  # [D]
        centred = distinct - mean
        scale = _power_of_two(centred)
        centred = centred * scale
        bias = centred.double().square().sum(1).mul_(-0.5).float()  # [K]
        codes = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
        chunk = max(64, (_CPU_SCORES if latents.device.type == "cpu" else _GPU_SCORES) // len(bias))
        for start in range(0, len(latents), chunk):
            part = slice(start, start + chunk)
            x = (latents[part] - mean) * scale  # [chunk, D]
            scores = torch.addmm(bias, x, centred.T)
            codes[part] = _decide(latents[part], distinct, scores, _error_bound(x, centred))
        return torch.where(codes < 0, codes, first[codes])


def statistics(latents: Tensor, codebook: Tensor, codes: Tensor, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codebook rows of codes [N, D], latents a code [K], sums of them [K, D]), all fp32, of codes >= 0.

    On CUDA the sums are added in no fixed order unless `deterministic`.
    """
    counts = torch.bincount(codes, minlength=len(codebook)).float()
    before, only_warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic or before, warn_only=only_warns)
    try:
        sums = torch.zeros_like(codebook).index_add_(0, codes, latents)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
    return codebook[codes], counts, sums


def _error_bound(x: Tensor, centred: Tensor) -> Tensor:
    """How far scores of centred, scaled latents [N, D] and codes [K, D] may be from the exact ones: float64 [N].

    Centring rounds each number by 2^-24 of itself, on both sides; a product or sum rounds by at most 2^-23 of the sum of the
    magnitudes (Higham 2002, 3.1: (D + 1) u, in any order; doubled). What underflows is below 1e-32.
    """
    code_norm = centred.double().norm(dim=1).max()
    norm = x.double().norm(dim=1)
    terms = norm * code_norm + 0.5 * code_norm**2
    return (terms * ((x.shape[1] + 6) * 2.0**-22) + 1e-32 * (1 + norm)) * (1 + 1e-6)


def _decide(latents: Tensor, codebook: Tensor, scores: Tensor, error: Tensor) -> Tensor:
    """Codes of a chunk from its scores [n, K] and their error bounds [n]."""
    best, codes = scores.max(1)
    sound = torch.isfinite(error) & torch.isfinite(best)  # else overflow: every code is a candidate
    threshold = (best.double() - 2 * error).where(sound, -torch.inf).float()
    near = scores >= torch.nextafter(threshold, threshold.new_tensor(-torch.inf))[:, None]  # rounded down
    near |= ~sound[:, None]
    finite = torch.isfinite(latents).all(1)
    several = (near.sum(1) > 1) & finite
    for row in several.nonzero().flatten().split(max(1, _PAIRS // codebook.numel())):
        codes[row] = _nearest_exactly(latents[row], codebook, near[row])
    return codes.where(finite, -1)


def _nearest_exactly(latents: Tensor, codebook: Tensor, near: Tensor) -> Tensor:
    """Nearest of the codes that `near` [n, K] leaves to each of latents [n, D]; the first of those equally near."""
    distances = (latents.double()[:, None] - codebook.double()).square().sum(2)  # [n, K], within a relative (D + 4) 2^-53
    distances = distances.masked_fill(~near, torch.inf)
    smallest, codes = distances.min(1)
    close = distances <= (smallest * (1 + 4 * (latents.shape[1] + 4) * 2.0**-52))[:, None]
    for row in (close.sum(1) > 1).nonzero().flatten().tolist():
        candidates = close[row].nonzero().flatten().tolist()
        x = _integers(latents[row])
        exact = [sum((a - b) ** 2 for a, b in zip(x, _integers(codebook[code]), strict=True)) for code in candidates]
        codes[row] = candidates[exact.index(min(exact))]
    return codes


def _integers(row: Tensor) -> list[int]:
    """Numbers of fp32 as multiples of 2^-149, the smallest there is: a double holds each without rounding."""
    return [int(math.ldexp(value, 149)) for value in row.tolist()]


def _power_of_two(centred: Tensor) -> float:
    """What brings the largest number of [K, D] into [1, 2), as far as fp32 has such a factor."""
    largest = float(centred.abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** max(-126, min(126, 1 - math.frexp(largest)[1]))


def _distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of [K, D] without repetitions, in order of their first appearance, and each one's lowest index [K']: int64.

    Copies would otherwise have to be told apart for every latent that lies near them.
    """
    _, group = torch.unique(rows, dim=0, return_inverse=True)  # [K]
    own = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(own, len(rows)).scatter_reduce_(0, group, own, reduce="amin")[group]
    lowest = (first == own).nonzero().flatten()
    return rows[lowest], lowest


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Keep TF32 and bf16 shortcuts out of fp32 matrix products, whatever the process has chosen elsewhere."""
    backends: Any = torch.backends  # typed without all that it has
    places = (backends.cuda.matmul, backends.mkldnn.matmul)
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the process uses torch's newer settings
        before = [place.fp32_precision for place in places]
        for place in places:
            place.fp32_precision = "ieee"
        try:
            yield
        finally:
            for place, precision in zip(places, before, strict=True):
                place.fp32_precision = precision
        return
    if legacy == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
