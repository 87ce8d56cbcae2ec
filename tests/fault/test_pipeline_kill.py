"""Every stage killed at random moments and run again, alone and as part of the demo: the same results as undisturbed.

One undisturbed demo gives the data of each stage and what the stage must come to. Same machine, one thread: to the byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

from tests.helpers import finish, start

VQVAE: dict[str, Any] = {
    "frames_per_clip": 2,
    "model": {
        "image_size": 16, "stem_channels": 8, "channel_multipliers": [1, 2], "residual_blocks": [0, 1], "norm_groups": 4,
        "quantizer": {"codebook_size": 24, "codebook_dim": 8, "warmup_steps": 4, "revive_every": 5, "dead_below": 0.3},
    },
    "losses": {"perceptual": 0},
    "train": {"steps": 30, "batch": 4, "save_every": 6, "log_every": 2, "visual_every": 7, "warmup_steps": 2, "ds_config": "zero2"},
}  # fmt: skip
TRANSFORMER: dict[str, Any] = {
    "excerpt_share": 0.2,
    "sample_prompts": ["a red circle moves right"],
    "model": {"width": 16, "layers": 1, "heads": 2, "group": 2, "dropout": 0.1},
    "text": {"tokens": 12, "width": 16},
    "train": {
        "steps": 24, "batch": 4, "save_every": 5, "log_every": 2, "visual_every": 7, "warmup_steps": 2, "optimizer": "muon",
        "ds_config": "zero0",
    },
}
DEMO: dict[str, Any] = {
    "prepare": {"clips": 64, "image_size": 16, "max_frames": 17, "shard_clips": 8, "chunk_clips": 32, "workers": 1},
    "vqvae": VQVAE,
    "transformer": TRANSFORMER,
    "tokenize": {"batch_frames": 4, "text": {"encoder": "hashing", **TRANSFORMER["text"]}},
    "evaluate": {"prompts": 6, "batch": 3, "reconstruction_clips": 2},
}
CONFIGS = {"train-vqvae": VQVAE, "tokenize": DEMO["tokenize"], "train-transformer": TRANSFORMER, "demo": DEMO}
FOLDERS = {"train-vqvae": "tokenizer", "tokenize": "tokens", "train-transformer": "generator"}
Condition = Callable[[], bool]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed demo."""
    folder = tmp_path_factory.mktemp("calm")
    for name, settings in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    run(command(folder, "demo", folder / "run"))
    return folder


def command(calm: Path, verb: str, out: Path) -> list[str]:
    inputs = {
        "demo": [],
        "train-vqvae": ["--data", str(calm / "run" / "raw")],
        "tokenize": ["--data", str(calm / "run" / "raw"), "--tokenizer", str(calm / "run" / "tokenizer")],
        "train-transformer": ["--data", str(calm / "run" / "tokens")],
    }
    return ["-m", "t2v_ds", verb, "--config", str(calm / f"{verb}.yaml"), *inputs[verb], "--out", str(out)]


def run(arguments: list[str]) -> None:
    code, output = finish([start(arguments)])[0]
    assert code == 0, output


def kill(arguments: list[str], condition: Condition, at_most_s: float = 0.0, chance: random.Random | None = None) -> None:
    """Start, wait for the condition and up to `at_most_s` more, kill -9."""
    process = start(arguments)
    until = time.monotonic() + 90
    while process.poll() is None and not condition() and time.monotonic() < until:
        time.sleep(0.0005)
    reached = condition()
    if chance is not None:
        time.sleep(chance.uniform(0, at_most_s))
    over = process.poll() is not None
    if not over:
        os.killpg(process.pid, signal.SIGKILL)
    code, output = finish([process])[0]
    assert reached and not over and code == -signal.SIGKILL, f"over, or not there, before the blow fell: {output}"


def lines(run: Path) -> list[dict[str, Any]]:
    """The curve without timings."""
    path = run / "metrics.jsonl"
    curve = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{key: value for key, value in line.items() if not key.startswith("performance/")} for line in curve]


def goes_on(run: Path) -> Condition:
    """Is there a line of the curve that is not there now?"""
    before = max((line["step"] for line in lines(run)), default=0)
    return lambda: any(line["step"] > before for line in lines(run))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times."""
    timed = ("metrics.jsonl", "DONE", "complete.json", "state.json")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in timed]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not {"tensorboard", "native"} & set(path.parts)}


def events(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard shows of a run: (step, value) by tag, without timings."""
    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={SCALARS: 0, IMAGES: 0})
    shown.Reload()
    values: dict[str, list[tuple[int, Any]]] = {}
    for tag in shown.Tags()["scalars"]:
        values[tag] = [(event.step, event.value) for event in shown.Scalars(tag)]
    for tag in shown.Tags()["images"]:
        values[tag] = [(event.step, event.encoded_image_string) for event in shown.Images(tag)]
    return {tag: series for tag, series in values.items() if not tag.startswith("performance/")}


def check_training(found: Path, expected: Path) -> None:
    """Weights, curve, checkpoints and TensorBoard are those of the undisturbed run."""
    assert lines(found) == lines(expected)
    mine, wanted = contents(found), contents(expected)
    assert mine.keys() == wanted.keys() and "model.safetensors" in mine
    assert [name for name in mine if mine[name] != wanted[name]] == []
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == sorted(p.name for p in (expected / "checkpoints").iterdir())
    shown, reference = events(found), events(expected)
    assert shown.keys() == reference.keys() and "loss" in shown
    for tag, series in shown.items():
        steps = [step for step, _ in series]
        assert steps == sorted(set(steps)), f"'{tag}' goes back or repeats a step: {steps}"
        assert series == reference[tag], tag


def test_the_undisturbed_demo_shows_what_is_compared(calm: Path) -> None:
    """Else equal results would say nothing."""
    tokenizer, generator = events(calm / "run" / "tokenizer"), events(calm / "run" / "generator")
    assert [step for step, _ in tokenizer["loss"]] == list(range(2, 31, 2))
    assert [step for step, _ in tokenizer["reconstruction"]] == [7, 14, 21, 28, 30]
    assert [step for step, _ in generator["generated/a red circle moves right"]] == [7, 14, 21, 24]
    assert len({value for _, value in generator["loss"]}) == 12
    assert len(list((calm / "run" / "tokens").glob("*.tar"))) == 8


@pytest.mark.parametrize("verb", ["train-vqvae", "train-transformer"])
def test_training_killed(calm: Path, tmp_path: Path, verb: str) -> None:
    out, steps = tmp_path / "run", CONFIGS[verb]["train"]["steps"]
    arguments, chance = command(calm, verb, out), random.Random(verb)
    kill(arguments, goes_on(out), 0.3, chance)
    newest = max((out / "tensorboard").iterdir(), key=lambda path: path.name)
    with newest.open("ab") as file:
        file.write((100).to_bytes(8, "little") + b"torn")  # a record that a kill cut
    kill(arguments, lambda: any(out.glob("checkpoints/*.partial")))
    kill(arguments, (out / "checkpoints" / f"step_{steps:08d}").is_dir)  # all steps done, nothing exported
    assert not (out / "DONE").exists()
    run(arguments)
    check_training(out, calm / "run" / FOLDERS[verb])
    if verb == "train-vqvae":
        (out / "DONE").unlink()  # as if killed at the very last moment
        run(arguments)
        check_training(out, calm / "run" / FOLDERS[verb])


def test_tokenize_killed(calm: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    arguments, chance = command(calm, "tokenize", out), random.Random(2)
    kill(arguments, (out / "tokenizer").is_dir)
    for shards in (1, 4):
        kill(arguments, lambda shards=shards: len(list(out.glob("tokens-*.tar"))) >= shards, 0.01, chance)  # type: ignore[misc]
        assert not (out / "manifest.json").exists()
    made = {path: path.stat().st_mtime_ns for path in out.glob("tokens-*.index.json")}
    run(arguments)
    assert contents(out) == contents(calm / "run" / "tokens")
    assert made and all(path.stat().st_mtime_ns == time_ns for path, time_ns in made.items())  # whole shards were not made again


def test_demo_killed_in_one_stage_after_the_other(calm: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(3)
    arguments = command(calm, "demo", out)
    kill(arguments, goes_on(out / "tokenizer"), 0.3, chance)
    kill(arguments, (out / "tokens" / "tokens-00000.tar").is_file)
    assert (out / "tokenizer" / "DONE").exists() and not (out / "tokens" / "manifest.json").exists()
    kill(arguments, goes_on(out / "generator"), 0.3, chance)
    kill(arguments, (out / "generator" / "DONE").is_file, 0.05, chance)
    assert not (out / "results.json").exists()
    run(arguments)
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (out, calm / "run"))
    for results in (found, expected):
        for metrics in results["losses"].values():
            for name in [name for name in metrics if name.startswith("performance/")]:
                del metrics[name]
    assert found == expected
    for name in ("tokenizer", "generator"):
        check_training(out / name, calm / "run" / name)
    for name in ("raw", "tokens"):
        assert contents(out / name) == contents(calm / "run" / name)
    for name in ("generated.gif", "sheet.png"):
        assert (out / name).read_bytes() == (calm / "run" / name).read_bytes()
