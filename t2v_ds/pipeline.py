"""The stages in order, on one machine: what `t2v demo` runs.

    OUT/raw -> OUT/tokenizer -> OUT/tokens -> OUT/generator -> OUT/generated.gif, sheet.png, report.md

Each stage is the one that its own verb runs, and skips what is done already: killed anywhere, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from t2v_ds.config import DemoConfig, DemoEvaluationConfig, StoredTextConfig, require
from t2v_ds.config_loader import to_dict
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.moving_shapes import draw_clip
from t2v_ds.data.prepare import prepare
from t2v_ds.data.video import contact_sheet, write_png
from t2v_ds.errors import ConfigError
from t2v_ds.evaluation.faithfulness import (
    UNSEEN,
    Prompted,
    accuracy,
    choose_prompts,
    judge,
    paraphrase_of,
    prompt_of,
    read_clip,
    true_clips,
)
from t2v_ds.evaluation.reconstruction import measure_reconstruction
from t2v_ds.evaluation.report import write_report
from t2v_ds.files import write_atomically
from t2v_ds.generate import write_clip
from t2v_ds.models.exported import content_id, load_exported
from t2v_ds.models.facade import Generator, load_generator, load_tokenizer
from t2v_ds.tokenize import tokenize
from t2v_ds.training.run import train_transformer, train_vqvae

logger = logging.getLogger(__name__)

T = TypeVar("T")
RESULTS = "results.json"


class Stopwatch:
    """Seconds a stage, added up over interrupted runs and kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def time(self, stage: str, run: Callable[[], T]) -> T:
        """Run a stage; one that had nothing to do keeps the time that it took then."""
        logger.info("== %s", stage)
        start = time.monotonic()
        try:
            return run()
        finally:
            spent = time.monotonic() - start
            if spent > 2 or stage not in self.seconds:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
                write_atomically(self.path, (json.dumps(self.seconds, indent=1) + "\n").encode())


def run_demo(config: DemoConfig) -> str:
    """Run every stage of `config`, and return what to tell the user.

    Raises:
        ConfigError: another source than moving-shapes, whose clips alone can be checked against their captions; or no text encoder.
        UserError: see the stages.
    """
    if config.prepare.source != "moving-shapes":
        raise ConfigError(f"setting 'prepare.source' is {config.prepare.source!r}; the demo allows only 'moving-shapes'")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    raw, tokenizer, tokens, generator = (str(out / name) for name in ("raw", "tokenizer", "tokens", "generator"))
    clock = Stopwatch(out / "timings.json")
    replace, text = dataclasses.replace, _stored_text(config)
    manifest = clock.time("prepare", lambda: prepare(replace(config.prepare, out=raw)))
    clock.time("train-vqvae", lambda: train_vqvae(replace(config.vqvae, data=raw, out=tokenizer)))
    clock.time("tokenize", lambda: tokenize(replace(config.tokenize, data=raw, tokenizer=tokenizer, out=tokens, text=text)))
    clock.time("train-transformer", lambda: train_transformer(replace(config.transformer, data=tokens, out=generator)))
    results = clock.time("evaluate", lambda: _evaluate(config, manifest, Path(tokenizer), Path(generator), out))
    write_report(out, to_dict(config), clock.seconds, results)
    faithful = results["faithfulness"]
    return (
        f"\n{out}/generated.gif     '{config.prompts[0]}'\n{out}/sheet.png         what the model draws for other prompts\n"
        f"{out}/report.md         timings, losses, PSNR, faithfulness (seen: {_percent(faithful['seen'])}; "
        f"held out: {_percent(faithful['held out'])})\n"
        f"\nnext:  .venv/bin/t2v generate --model {generator} --prompt 'a small blue square moves up' --out x.gif\n"
        f"       .venv/bin/tensorboard --logdir {out}"
    )


def _stored_text(config: DemoConfig) -> StoredTextConfig:
    """The text encoder whose vectors are stored with the codes: the transformer's, unless another is asked for."""
    text = config.tokenize.text if config.tokenize.text.encoder else StoredTextConfig(**dataclasses.asdict(config.transformer.text))
    require(bool(text.encoder), "transformer.text.encoder", text.encoder, "an encoder's name, where tokenize.text.encoder is empty as well")
    return text


def _percent(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * values[name]:.0f} %" for name in ("colour", "shape", "direction"))


def _evaluate(config: DemoConfig, manifest: Manifest, tokenizer: Path, generator: Path, out: Path) -> dict[str, Any]:
    """Measure both models, draw the clips to show, and keep the results in a file."""
    path = out / RESULTS
    frames_and_codes = load_tokenizer(tokenizer)
    # The ids: a model that was trained longer is measured anew.
    ids = {"tokenizer": frames_and_codes.tokenizer_id, "generator": content_id(*load_exported(generator))}
    settings = {"evaluate": to_dict(config.evaluate), "prompts": list(config.prompts), **ids}
    if path.is_file():
        known = dict(json.loads(path.read_text()))
        if known.get("settings") == settings:
            return known
    size, low, high = config.prepare.image_size, config.prepare.min_frames, config.prepare.max_frames
    unseen = [draw_clip(UNSEEN + i, config.prepare.seed, size, low, high)[0] for i in range(config.evaluate.reconstruction_clips)]
    model = load_generator(generator, precision=config.transformer.train.precision)
    results: dict[str, Any] = {
        "settings": settings,
        "data": {"clips": manifest.total_clips, "frames": manifest.total_frames, "rejected": manifest.rejected},
        "reconstruction": dataclasses.asdict(measure_reconstruction(frames_and_codes, unseen)),
        "losses": {name: _last_metrics(folder) for name, folder in (("vqvae", tokenizer), ("transformer", generator))},
    }
    prompted = choose_prompts(config.evaluate.prompts)
    drawn = _draw(model, prompted, config.evaluate)
    results["faithfulness"] = judge(prompted, drawn, true_clips(prompted, config.prepare.seed, size, low, high))
    if config.transformer.text.encoder != "hashing":  # to which a word that it has not seen says nothing
        seen = [one for one in prompted if not one[3]]
        others = model.generate([paraphrase_of(one) for one in seen], config.evaluate.sampling, batch=config.evaluate.batch, progress=True)
        results["faithfulness"]["seen, in other words"] = accuracy([read_clip(clip) for clip in others], [one[:3] for one in seen])
    _show(config, model, prompted, drawn, out)
    write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    return results


def _draw(model: Generator, prompted: list[Prompted], config: DemoEvaluationConfig) -> list[np.ndarray]:
    return model.generate([prompt_of(one) for one in prompted], config.sampling, batch=config.batch, progress=True)


def _show(config: DemoConfig, model: Generator, prompted: list[Prompted], drawn: list[np.ndarray], out: Path) -> None:
    """The contact sheet of eight clips, half of them held out, and a GIF for each of the demo's prompts."""
    half = len(prompted) // 2
    shown = [*range(min(4, half)), *range(len(prompted) - half, min(len(prompted) - half + 4, len(prompted)))]
    captions = [prompt_of(prompted[i]) + (" (held out)" if prompted[i][3] else "") for i in shown]
    clips = model.generate(config.prompts, config.evaluate.sampling)
    sheet = contact_sheet([*clips, *(drawn[i] for i in shown)], [*config.prompts, *captions])
    names = ["generated.gif", *(f"generated-{i}.gif" for i in range(1, len(clips)))]
    for name, frames in zip(names, clips, strict=True):
        write_clip(out / name, frames, model.frame_duration_ms)
    write_png(out / "sheet.png", sheet)


def _last_metrics(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "DONE").read_text())["metrics"])
