"""Shares, with how sure one can be of them."""

from __future__ import annotations

import math
from typing import Any

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %


def wilson(hits: int, count: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927, as given by Brown, Cai & DasGupta 2001): (low, high) in 0..1.

    Raises:
        ValueError: not 0 <= hits <= count, or nothing was counted.
    """
    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"{hits} hits of {count}")
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    # At no hits, or hits alone, the bound is 0 or 1 but for rounding.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == count else middle + half)


def share_of(hits: int, count: int) -> dict[str, Any]:
    """{"share", "low", "high", "hits", "of"}: a share with its 95 % interval, as it stands in reports."""
    low, high = wilson(hits, count)
    return {"share": hits / count, "low": low, "high": high, "hits": hits, "of": count}
