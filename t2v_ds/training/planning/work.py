"""How much a step has to do: which clips a micro-batch holds at most, and on average.

    data's manifest, or clips / frames / longest  -> lengths of clips, how many of each
        -> the largest micro-batch of the run     decides about memory
        -> the mean over all clips                decides about time
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.config import PlanConfig, TransformerRunConfig, VQVAERunConfig, require
from t2v_ds.data.manifest import Manifest
from t2v_ds.errors import ConfigError
from t2v_ds.training.ds_config import accumulation_steps
from t2v_ds.training.loop import total_steps
from t2v_ds.training.run import require_image_size

RunConfig = TransformerRunConfig | VQVAERunConfig


@dataclass
class Work:
    """What a run goes through."""

    micro: int  # clips of a micro-batch
    accumulation: int  # micro-batches a step, on each rank
    clips: int  # of the data; 0: not known
    steps: int  # of the run; 0: not known
    lengths: dict[int, int]  # frames -> clips

    @property
    def longest(self) -> int:
        """Frames of the longest clip."""
        return max(self.lengths)

    @property
    def mean_frames(self) -> float:
        """Frames of a clip, whole."""
        return sum(length * count for length, count in self.lengths.items()) / sum(self.lengths.values())


def read_work(plan: PlanConfig, run: RunConfig) -> tuple[Work, RunConfig]:
    """The work of `run`, and `run` with what the data decides filled in.

    Raises:
        DataError: --data is no finished folder of this kind.
        ConfigError: a batch that does not divide, clips longer than the model knows, a text encoder of unknown width, or ranks that
            share clips.
    """
    shared = run.train.sequence_parallel
    require(shared == 1, "train.sequence_parallel", shared, "1, because what ranks save by sharing clips is not planned yet")
    micro, accumulation = accumulation_steps(run.train, plan.gpus)
    manifest = None
    if run.data:
        manifest = Manifest.load(Path(run.data), "tokens" if isinstance(run, TransformerRunConfig) else "raw")
        if not manifest.total_clips:
            raise ConfigError(f"--data {run.data} holds no clip")
        if isinstance(run, VQVAERunConfig):
            require_image_size(run, manifest)
    lengths = {1: 1}  # the VQ-VAE takes frames_per_clip of each clip, whatever its length
    if isinstance(run, TransformerRunConfig):
        run = _fill_in(plan, run, manifest)
        lengths = _lengths(plan, run, manifest)
        if max(lengths) > run.model.max_frames:
            raise ConfigError(f"setting 'model.max_frames' is {run.model.max_frames}, but the longest clip has {max(lengths)} frames")
    clips = plan.clips or (manifest.total_clips if manifest else 0)
    steps = total_steps(run.train, clips) if clips or run.train.steps else 0
    return Work(micro, accumulation, clips, steps, lengths), run


def _fill_in(plan: PlanConfig, run: TransformerRunConfig, manifest: Manifest | None) -> TransformerRunConfig:
    text, stored = run.text, manifest.stored_text if manifest is not None else None
    width = text.width if text.encoder == "hashing" else plan.text_width
    if not text.encoder and manifest is not None:
        if stored is None:
            raise ConfigError(f"setting 'text.encoder' is empty, but --data {run.data} holds no text vectors: name an encoder")
        width, text = stored.width, dataclasses.replace(text, tokens=stored.settings.tokens)
    elif stored is not None:
        names = ("encoder", "tokens", "width") if text.encoder == "hashing" else ("encoder", "tokens")
        differs = [f"text.{name}={getattr(text, name)}" for name in names if getattr(text, name) != getattr(stored.settings, name)]
        if differs:
            raise ConfigError(
                f"--data {run.data} holds the text vectors of {stored.identity}, but this run has {', '.join(differs)}: "
                "set text.encoder= (empty) to use what is stored"
            )
    if not width:
        of = f"text encoder '{text.encoder}' is known only once it is loaded" if text.encoder else "stored vectors is known from --data"
        raise ConfigError(f"setting 'text_width' is 0, but the width of {of}: give it, such as text_width=768")
    found: dict[str, Any] = {} if manifest is None else {"grid_size": manifest.grid_size, "codebook_size": manifest.codebook_size}
    return dataclasses.replace(run, model=dataclasses.replace(run.model, text_width=width, **found), text=text)


def _lengths(plan: PlanConfig, run: TransformerRunConfig, manifest: Manifest | None) -> dict[int, int]:
    """Frames -> clips; the longest is there even where no clip is known to have it."""
    if manifest is not None and not plan.frames and not plan.longest:
        return {int(length): count for length, count in manifest.frames_histogram.items()}
    known = max(int(length) for length in manifest.frames_histogram) if manifest is not None else run.model.max_frames
    longest = plan.longest or known
    mean = plan.frames or longest
    if mean > longest:
        raise ConfigError(f"setting 'frames' is {mean:g}, but the longest clip has {longest} (of --data, model.max_frames or longest=)")
    low, share = int(mean), mean - int(mean)  # as if all clips had one of the two lengths around the mean
    counts = Counter({low: round(1000 * (1 - share)), low + 1: round(1000 * share)})
    return {length: counts[length] for length in sorted({*(length for length in counts if counts[length]), longest})}


def largest_micro_batch(work: Work, run: TransformerRunConfig, ranks: int) -> list[int]:
    """Frames of the clips in the largest micro-batch: all of the longest length, as many of them whole as one of the run may have.

    Of samples that are excerpts with a fixed chance, so many whole ones are drawn that more are expected in less than one
    micro-batch of the whole run.
    """
    whole = work.micro
    if run.excerpt_share:
        from scipy.stats import binom

        batches = max(1, work.steps or 10_000) * work.accumulation * ranks
        whole = int(binom.isf(1 / (batches + 1), work.micro, 1 - run.excerpt_share))
    short = min(run.excerpt_frames, work.longest)
    return [work.longest] * whole + [short] * (work.micro - whole)


def mean_over_clips(work: Work, run: TransformerRunConfig, of_length: Callable[[int], float]) -> float:
    """The mean over samples of what a clip of some length costs.

    A cost is a polynomial of degree 2 in the frames (attention) where there are more than three lengths: it is asked for
    three of them.
    """
    lengths = np.array(sorted(length for length, count in work.lengths.items() if count))
    counts = np.array([work.lengths[int(length)] for length in lengths], dtype=float)
    asked = lengths if len(lengths) <= 3 else lengths[[0, len(lengths) // 2, -1]]
    costs = np.array([of_length(int(length)) for length in asked])
    fit = np.polynomial.Polynomial.fit(asked, costs, len(asked) - 1)
    whole = float((fit(lengths) * counts).sum() / counts.sum())
    if not run.excerpt_share:
        return whole
    excerpt = of_length(min(run.excerpt_frames, int(lengths[0])))
    return (1 - run.excerpt_share) * whole + run.excerpt_share * excerpt
