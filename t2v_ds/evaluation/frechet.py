"""Fréchet distance of two sets of feature vectors, and the frames of clips that the features are taken from.

    clips -> fixed_frames: the first T frames of each -> features [N, D] -> Gaussians (m, C) -> frechet_distance

The distance of two Gaussians is |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, equation 6); of features
of videos it is FVD (Unterthiner et al. 2018).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features, in fp64.

    Covariances divide by N - 1. No root of a matrix is taken: with centred features A [N, D] and B [M, D], the positive
    eigenvalues of C1 C2 are the squared singular values of A B^T / sqrt((N-1)(M-1)), so that tr (C1 C2)^(1/2) is their sum.
    That is exact where there are fewer clips than features and both covariances are singular, where a root of C1 C2 is not.

    Args:
        a: [N, D] features of one set, N >= 2.
        b: [M, D] of the other, M >= 2.

    Raises:
        ValueError: other shapes, too few vectors, or numbers that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features are {list(a.shape)} and {list(b.shape)}; expected [N, D] and [M, D], at least two of each")
    first, second = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("features are not finite")
    means = first.mean(axis=0), second.mean(axis=0)
    # An orthogonal factor on the left changes neither covariances nor singular values, and takes [N, D] to at most [D, D].
    roots = [np.linalg.qr(x - mean, mode="r") / np.sqrt(len(x) - 1) for x, mean in zip((first, second), means, strict=True)]
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    spread = sum(float((root**2).sum()) for root in roots)  # tr C1 + tr C2
    return max(0.0, float(((means[0] - means[1]) ** 2).sum()) + spread - 2 * float(overlap))


def fixed_frames(clip: np.ndarray, count: int) -> np.ndarray:
    """The first `count` frames of a clip [T, H, W, 3]; of a shorter one the last frame is repeated: [count, H, W, 3]."""
    return clip[np.minimum(np.arange(count), len(clip) - 1)]


def floor_of(real: np.ndarray, others: np.ndarray) -> dict[str, Any] | None:
    """The distance that two sets of real clips have: what a perfect generator would be measured to have.

    Args:
        real: features [N, D] of the clips that generated ones are compared with.
        others: features [M, D] of further real clips; M may be 0.

    Returns:
        {"distance", "clips"}: of `real` and N others, or, where there are not as many, of two halves of all there are (of fewer
        clips the distance is larger); None where there are fewer than four clips.
    """
    if len(others) >= len(real):
        halves = real, others[: len(real)]
    else:
        every = np.concatenate([real, others]) if len(others) else real
        halves = every[0::2][: len(every) // 2], every[1::2]
    if len(halves[0]) < 2:
        return None
    return {"distance": frechet_distance(*halves), "clips": len(halves[0])}
