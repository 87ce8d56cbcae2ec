"""Generator + token shards -> what the generator has learned, in figures: what `t2v evaluate` runs.

    check everything -> loss in bits a code -> clips drawn for captions -> FVD, motion, memorisation, contact sheet
                                            -> the same captions again  -> distinctness
                                            -> moving shapes            -> faithfulness
    -> OUT/sheet.png, report.md, tensorboard/, report.json (last)

Every part is kept as soon as it is measured, so that a killed run goes on; docs/evaluation.md says what the figures mean.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2v_ds.config import EvaluateConfig
from t2v_ds.config_loader import to_dict
from t2v_ds.data.sources import MOVING_SHAPES
from t2v_ds.data.video import write_png
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.evaluation.clips import ClipSet, describe, draw_clips, open_sets, spread, two_spreads
from t2v_ds.evaluation.extractors import Extractor, open_extractor
from t2v_ds.evaluation.faithfulness import choose_prompts, judge, prompt_of, true_clips
from t2v_ds.evaluation.frechet import floor_of, frechet_distance
from t2v_ds.evaluation.generator_report import pair_sheet, write_page, write_scalars
from t2v_ds.evaluation.intervals import share_of
from t2v_ds.evaluation.likelihood import measure_loss, unigram_bits
from t2v_ds.evaluation.likeness import PerceptualSpace, distinctness, memorisation, open_space, own_clips
from t2v_ds.evaluation.work import PAGE, REPORT, SHEET, WORK, Work, check_out, finished
from t2v_ds.files import write_atomically
from t2v_ds.models.exported import content_id, load_exported
from t2v_ds.models.facade import Generator, load_generator

logger = logging.getLogger(__name__)

CAPTIONS, SECOND, SHAPES = 0, 1, 2  # streams of random numbers
PATHS = ("model", "data", "validation", "raw", "tokenizer", "out")  # a moved folder is the same one: its content is compared


@dataclass
class Evaluation:
    """What an evaluation measures, and with what."""

    config: EvaluateConfig
    generator: Generator
    training: ClipSet
    validation: ClipSet | None
    extractor: Extractor
    space: PerceptualSpace

    @property
    def prompted(self) -> ClipSet:
        """The clips whose captions are drawn."""
        wanted = self.validation if self.config.prompts_from == "validation" else None
        return wanted or self.training

    def identity(self) -> dict[str, Any]:
        """What decides the figures, wherever it lies: contents of models and data, and settings."""
        settings = to_dict(self.config)
        for name in (*PATHS, "again", "batch"):
            settings.pop(name)
        settings["fvd"].pop("weights")
        if self.space.sha256:
            settings["perceptual"].pop("weights")
        sets = {"data": self.training, **({"validation": self.validation} if self.validation else {})}
        return {
            "model": content_id(*load_exported(self.config.model)),
            "tokenizer": self.generator.tokenizer.tokenizer_id,
            **{name: {"tokens": one.tokens.digest, "frames": one.frames_are} for name, one in sets.items()},
            "features": {"network": self.extractor.name, "sha256": self.extractor.sha256},
            "perceptual": {"space": self.space.name, "sha256": self.space.sha256},
            "settings": settings,
        }


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the generator `config.model` and write the report into `config.out`.

    Killed at any instant and called again, it goes on; a finished folder with the same settings is not measured again.

    Returns:
        The report, as it stands in `report.json`.

    Raises:
        ConfigError: a folder is not given or cannot be made, a network cannot be loaded, or clips are longer than the model knows.
        DataError, CheckpointError: damaged or mismatched input, or `out` holds a report with other settings, or other files.
    """
    for flag, value in (("--model", config.model), ("--data", config.data), ("--out", config.out)):
        if not value:
            raise ConfigError(f"{flag} is not given; name a folder")
    out = Path(config.out)
    check_out(out)
    with contextlib.ExitStack() as stack:
        evaluation = _open(config, stack)
        identity = evaluation.identity()
        report = finished(out, identity, config.again)
        if report is None:
            report = _measure(evaluation, identity, out)
        else:
            logger.info("%s is measured already", out)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return report


def _open(config: EvaluateConfig, stack: contextlib.ExitStack) -> Evaluation:
    """Load and check everything before the first figure: what does not fit is told before hours of drawing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = load_generator(config.model, config.tokenizer or None, device, config.precision)
    sets = open_sets([folder for folder in (config.data, config.validation) if folder], config.raw, generator)
    for one in sets:
        stack.callback(one.close)
    training, validation = sets[0], sets[1] if len(sets) > 1 else None
    if validation is not None and validation.tokens.digest == training.tokens.digest:
        raise DataError(f"--validation {config.validation} holds the same clips as --data {config.data}: give clips held out of training")
    known = generator.model.config.max_frames
    for one in sets:
        longest = int(one.tokens.lengths.max())
        if longest > known:
            raise ConfigError(f"{one.tokens.folder} holds clips of {longest} frames; the model knows 1 to {known}")
        if len(one) < 2:
            raise DataError(f"{one.tokens.folder} holds one clip; an evaluation needs at least 2")
        if not all(caption.strip() for caption in one.captions(np.arange(len(one)))):
            raise DataError(f"{one.tokens.folder} holds clips with empty captions, for which nothing can be drawn")
    generator.check_sampling(config.sampling, "sampling.")
    size = training.tokens.manifest.image_size
    extractor, space = open_extractor(config.fvd, device), open_space(config.perceptual, size, device)
    extractor.check(size)
    return Evaluation(config, generator, training, validation, extractor, space)


def _measure(evaluation: Evaluation, identity: dict[str, Any], out: Path) -> dict[str, Any]:
    work = Work(out, identity)
    report: dict[str, Any] = {
        "identity": identity,
        "drawn_for": f"captions of {_words(evaluation.prompted is evaluation.training)}",
        "device": str(evaluation.generator.device),
        **_trained(evaluation),
        "loss": work.values("loss", lambda: _loss(evaluation)),
    }
    figures, sheet = _clips(evaluation, work)
    report |= figures
    report["faithfulness"] = work.values("faithfulness", lambda: _faithfulness(evaluation, work))
    write_png(out / SHEET, sheet)
    write_page(out / PAGE, report)
    write_scalars(out, report, sheet)
    write_atomically(out / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _clips(evaluation: Evaluation, work: Work) -> tuple[dict[str, Any], np.ndarray]:
    """Draw clips for captions of the data; everything that is measured of them, and the contact sheet."""
    config, prompted, training, space = evaluation.config, evaluation.prompted, evaluation.training, evaluation.space
    numbers, others = two_spreads(config.clips, len(prompted))
    prompts = prompted.captions(numbers)
    drawn = draw_clips(evaluation.generator, prompts, config.sampling, CAPTIONS, work.folder, config.batch, "drawn")
    seen = work.arrays("drawn", lambda: describe(drawn, evaluation.extractor, space))
    real = work.arrays("real", lambda: describe(prompted.clips(numbers, "real clips"), evaluation.extractor, space))
    further = work.arrays("others", lambda: {"features": evaluation.extractor.features(prompted.clips(others, "other real clips"))})
    references = _references(evaluation, numbers)
    looks = work.arrays("training", lambda: {"looks": space.looks(training.clips(references, "training clips"))})["looks"]
    captions = training.captions(references)
    own = own_clips(seen["looks"], looks, prompts, captions)
    figures = {
        "frechet": _frechet(evaluation, seen, real, further["features"]),
        "motion": {"drawn": _motion(seen), "real": _motion(real)},
        "distinctness": _distinctness(evaluation, work, prompts, seen["looks"], real["looks"]),
        "memorisation": {"space": space.name, "unit": space.unit, **memorisation(own, looks)},
    }
    shown = spread(config.sheet_clips, len(drawn))
    nearest = [training.frames(int(references[own.number[i]])) for i in shown]
    texts = [f"nearest training clip: {captions[own.number[i]]}" for i in shown]
    return figures, pair_sheet([drawn[int(i)] for i in shown], [prompts[i] for i in shown], nearest, texts)


def _words(training: bool) -> str:
    return "the training clips" if training else "held-out clips"


def _trained(evaluation: Evaluation) -> dict[str, Any]:
    """What the run's folder says of the training: the last step, and whether `data` is what it was trained on; None: not known."""
    try:
        done = json.loads((Path(evaluation.config.model) / "DONE").read_bytes())
        return {"step": int(done["step"]), "data_is_of_the_training": done["data"] == evaluation.training.tokens.digest}
    except (OSError, ValueError, KeyError, TypeError):  # an exported model without the run around it
        return {"step": None, "data_is_of_the_training": None}


def _loss(evaluation: Evaluation) -> dict[str, Any]:
    config, tokens = evaluation.config, evaluation.training.tokens
    sets = {"training": evaluation.training, **({"held_out": evaluation.validation} if evaluation.validation else {})}
    measured = {name: measure_loss(evaluation.generator, one, config.loss_clips, config.batch) for name, one in sets.items()}
    trivial = {"unigram_bits": unigram_bits(tokens), "uniform_bits": math.log2(tokens.manifest.codebook_size)}
    return {"measured_on": _words(evaluation.validation is None), **measured, **trivial}


def _frechet(evaluation: Evaluation, drawn: dict[str, np.ndarray], real: dict[str, np.ndarray], others: np.ndarray) -> dict[str, Any]:
    extractor = evaluation.extractor
    return {
        "measure": extractor.measure,
        "network": extractor.name,
        "sha256": extractor.sha256,
        "distance": frechet_distance(drawn["features"], real["features"]),
        "floor": floor_of(real["features"], others),
        "clips": len(drawn["features"]),
        "features": int(drawn["features"].shape[1]),
        "frames": extractor.frames,
        "frames_taken": f"the first {extractor.frames} of each clip, one after another; of a shorter clip the last one is repeated",
        "shorter_clips": {name: int((one["lengths"] < extractor.frames).sum()) for name, one in (("drawn", drawn), ("real", real))},
        "resizing": extractor.resizing,
        "real_clips": evaluation.prompted.frames_are,
        "covariance": "divided by N - 1, fp64",
    }


def _motion(seen: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "levels": float(seen["motion"].mean()),
        "median_levels": float(np.median(seen["motion"])),
        "stills": share_of(int(seen["still"].sum()), len(seen["still"])),
        "mean_frames": float(seen["lengths"].mean()),
    }


def _distinctness(evaluation: Evaluation, work: Work, prompts: list[str], drawn: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """Draw some prompts a second time; {"skipped": why} where there are not two different ones."""
    config = evaluation.config
    first = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)][: config.second_draws]
    if len(first) < 2:
        return {"skipped": "second_draws is 0" if not config.second_draws else "all captions are the same"}
    again = [prompts[i] for i in first]

    def second() -> Iterator[np.ndarray]:
        yield from draw_clips(evaluation.generator, again, config.sampling, SECOND, work.folder, config.batch, "drawn again")

    looks = work.arrays("second", lambda: {"looks": evaluation.space.looks(second())})["looks"]
    return {"space": evaluation.space.name, "unit": evaluation.space.unit, **distinctness(drawn[first], looks, real[first])}


def _references(evaluation: Evaluation, prompted: np.ndarray) -> np.ndarray:
    """Numbers of the training clips that drawn clips are compared with: spread over the data, and all whose captions were drawn."""
    some = spread(evaluation.config.training_clips, len(evaluation.training))
    if evaluation.prompted is not evaluation.training:
        return some
    more = np.setdiff1d(some, prompted)[: max(0, evaluation.config.training_clips - len(prompted))]
    return np.union1d(prompted, more)


def _faithfulness(evaluation: Evaluation, work: Work) -> dict[str, Any]:
    """Colour, shape and direction of clips of moving shapes; {"skipped": why} for other data."""
    config, tokens = evaluation.config, evaluation.training.tokens
    source = tokens.manifest.source.get("raw_source", {})
    if source.get("name") != MOVING_SHAPES:
        return {"skipped": f"the data is not of {MOVING_SHAPES}: no program knows what its captions mean"}
    if not config.shape_prompts:
        return {"skipped": "shape_prompts is 0"}
    prompted = choose_prompts(config.shape_prompts)
    prompts = [prompt_of(one) for one in prompted]
    drawn = list(draw_clips(evaluation.generator, prompts, config.sampling, SHAPES, work.folder, config.batch, "shapes"))
    low, high = int(tokens.lengths.min()), int(tokens.lengths.max())
    results = judge(prompted, drawn, true_clips(prompted, int(source["seed"]), tokens.manifest.image_size, low, high))
    counts = {"seen": sum(not one[3] for one in prompted), "held out": sum(one[3] for one in prompted)}
    found: dict[str, Any] = {}
    for clips, row in results.items():
        count = counts.get(clips, len(prompted))
        found[clips] = {name: share_of(round(share * count), count) for name, share in row.items()}
    return found
