"""The loss in bits a code, beside what is reached without knowing anything of captions or of what came before.

    codes of training shards -> shares of the codes -> entropy: the loss of always foretelling these shares
    codes, captions -> generator -> bits a code; once more with the captions of other clips: what the captions are worth
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.evaluation.clips import ClipSet, spread
from t2v_ds.evaluation.intervals import Z95
from t2v_ds.models.facade import Generator

_READ = 64  # clips read at once


def unigram_bits(dataset: ShardDataset) -> float:
    """Entropy of the codes of all clips, whatever their place and time, in bits a code."""
    counts, buffer = np.zeros(dataset.manifest.codebook_size, dtype=np.int64), Buffer()
    with tqdm(total=len(dataset), desc="codes", unit="clip", dynamic_ncols=True) as bar:
        for start in range(0, len(dataset), _READ):
            numbers = np.arange(start, min(start + _READ, len(dataset)))
            counts += np.bincount(dataset.read_codes(numbers, buffer).reshape(-1), minlength=len(counts))
            bar.update(len(numbers))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def other_captions(captions: Sequence[str]) -> list[str] | None:
    """For each clip the caption of the next clip that has another one; None where all are the same."""
    if len(set(captions)) < 2:
        return None
    count = len(captions)
    return [next(c for c in (captions[(i + k) % count] for k in range(1, count)) if c != captions[i]) for i in range(count)]


def clip_bits(generator: Generator, clips: ClipSet, numbers: np.ndarray, captions: Sequence[str], batch: int, what: str) -> np.ndarray:
    """Bits a code of clips, fp64 [N], given these captions; clips of like length are computed together."""
    bits = np.empty(len(numbers))
    order = np.argsort(clips.tokens.lengths[numbers], kind="stable")
    with tqdm(total=len(order), desc=what, unit="clip", dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            codes = [clips.tokens.read(int(numbers[i]))["codes"] for i in some]
            bits[some] = generator.bits_per_code(codes, [captions[i] for i in some])
            bar.update(len(some))
    return bits


def measure_loss(generator: Generator, clips: ClipSet, most: int, batch: int) -> dict[str, Any]:
    """The loss on up to `most` clips (0: all), spread over the data.

    Returns:
        "clips", "bits" (mean over clips, each the mean over its codes, as in training), "low" and "high" (95 %, of the mean),
        "bits_with_captions_of_others" (None where all captions are the same).
    """
    numbers = spread(most or len(clips), len(clips))
    captions = clips.captions(numbers)
    bits = clip_bits(generator, clips, numbers, captions, batch, "loss")
    others = other_captions(captions)
    without = None if others is None else float(clip_bits(generator, clips, numbers, others, batch, "loss, other captions").mean())
    mean, error = float(bits.mean()), float(bits.std(ddof=1)) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    interval = {} if math.isnan(error) else {"low": mean - Z95 * error, "high": mean + Z95 * error}
    return {"clips": len(numbers), "bits": mean, **interval, "bits_with_captions_of_others": without}
