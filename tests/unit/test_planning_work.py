"""How much a step has to do: clips of a micro-batch, from settings or from data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_ds.config import PlanConfig, TextConfig, TransformerRunConfig, VQVAERunConfig
from t2v_ds.config_loader import from_dict, load_plan
from t2v_ds.data.manifest import Manifest, ShardInfo, StoredText
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.training.planning.work import largest_micro_batch, mean_over_clips, read_work


def run_of(**data: Any) -> TransformerRunConfig:
    return from_dict(TransformerRunConfig, data)


def write_manifest(folder: Path, lengths: dict[int, int], text: StoredText | None = None) -> None:
    clips = sum(lengths.values())
    frames = sum(length * count for length, count in lengths.items())
    shard = ShardInfo("a.tar", clips, frames, 1, "0", "0", 0, {str(length): count for length, count in lengths.items()})
    stored = {} if text is None else text.describe(0)
    Manifest.build("tokens", [shard], grid_size=8, codebook_size=77, image_size=64, tokenizer_id="t", **stored).save(folder)


def test_data_tells_of_grid_codebook_and_lengths(tmp_path: Path) -> None:
    write_manifest(tmp_path, {15: 3, 17: 1})
    work, run = read_work(PlanConfig(gpus=2), run_of(data=str(tmp_path), train={"batch": 8, "micro_batch": 2, "epochs": 3}))
    assert isinstance(run, TransformerRunConfig)
    assert (run.model.grid_size, run.model.codebook_size) == (8, 77)
    assert (work.micro, work.accumulation, work.clips, work.steps) == (2, 2, 4, 2)
    assert (work.longest, work.mean_frames) == (17, 15.5)


def test_stored_text_vectors_tell_of_width_and_tokens(tmp_path: Path) -> None:
    write_manifest(tmp_path, {15: 8}, StoredText("minilm/1", TextConfig("minilm", 24), 384))
    empty = run_of(data=str(tmp_path), text={"encoder": ""})
    work, run = read_work(PlanConfig(), empty)
    for again in (run, read_work(PlanConfig(text_width=9), empty)[1], read_work(PlanConfig(), run)[1]):  # a change is planned from `run`
        assert isinstance(again, TransformerRunConfig)
        assert (again.model.text_width, again.text.tokens, work.longest) == (384, 24, 15)
    read_work(PlanConfig(text_width=384), run_of(data=str(tmp_path), text={"encoder": "minilm", "tokens": 24, "width": 5}))
    with pytest.raises(ConfigError, match=r"vectors of minilm/1, but this run has text.encoder=hashing, text.tokens=16: set text.encod"):
        read_work(PlanConfig(), run_of(data=str(tmp_path)))
    write_manifest(tmp_path, {15: 8})
    with pytest.raises(ConfigError, match=r"'text.encoder' is empty, but --data .* holds no text vectors: name an encoder"):
        read_work(PlanConfig(), empty)
    run = read_work(PlanConfig(text_width=9), run_of(text={"encoder": ""}))[1]
    assert isinstance(run, TransformerRunConfig) and run.model.text_width == 9


def test_settings_tell_of_them_without_data() -> None:
    work, run = read_work(PlanConfig(clips=1000, frames=20.25, longest=30), run_of(train={"batch": 10}, text={"width": 96}))
    assert isinstance(run, TransformerRunConfig)
    assert run.model.text_width == 96
    assert (work.steps, work.longest) == (100, 30)
    assert work.mean_frames == pytest.approx(20.25)
    assert sum(work.lengths.values()) == 1000
    work, _ = read_work(PlanConfig(), run_of())
    assert (work.longest, work.mean_frames, work.steps, work.clips) == (40, 40, 0, 0)
    work, _ = read_work(PlanConfig(), run_of(train={"steps": 7}))
    assert work.steps == 7


@pytest.mark.parametrize(
    ("plan", "run", "message"),
    [
        ({"gpus": 3}, {}, "'train.batch' is 8, which is no multiple of the number of ranks (3); nearest: 6 or 9"),
        ({"frames": 50}, {}, "'frames' is 50, but the longest clip has 40"),
        ({"longest": 50}, {}, "'model.max_frames' is 40, but the longest clip has 50 frames"),
        ({}, {"text": {"encoder": "bert-base-uncased"}}, "give it, such as text_width=768"),
        ({}, {"text": {"encoder": ""}}, "the width of stored vectors is known from --data: give it, such as text_width=768"),
        ({"gpus": 2}, {"train": {"sequence_parallel": 2}}, "'train.sequence_parallel' is 2; allowed: 1, because what ranks save"),
    ],
)
def test_what_does_not_go_together_is_refused(plan: dict[str, Any], run: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_work(PlanConfig(**plan), run_of(**run))
    assert message in str(error.value)


def test_folders_without_token_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_work(PlanConfig(), run_of(data=str(tmp_path / "none")))
    write_manifest(tmp_path, {})
    with pytest.raises(ConfigError, match="holds no clip"):
        read_work(PlanConfig(), run_of(data=str(tmp_path)))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "kind": "raw", "format": "t2v_ds.raw/1"}))
    with pytest.raises(DataError, match="expected token shards"):
        read_work(PlanConfig(), run_of(data=str(tmp_path)))


def test_frames_of_another_size_are_refused_as_training_does(tmp_path: Path) -> None:
    shard = ShardInfo("a.tar", 2, 30, 1, "0", "0", 0, {"15": 2})
    Manifest.build("raw", [shard], image_size=64).save(tmp_path)
    run = from_dict(VQVAERunConfig, {"data": str(tmp_path), "model": {"image_size": 64}})
    assert read_work(PlanConfig(), run)[0].clips == 2
    with pytest.raises(ConfigError, match=r"'model.image_size' is 128, but .* holds frames of 64 pixels: set model.image_size=64"):
        read_work(PlanConfig(), from_dict(VQVAERunConfig, {"data": str(tmp_path)}))


def test_the_largest_micro_batch_is_of_whole_clips_unless_that_never_happens() -> None:
    work, run = read_work(PlanConfig(), run_of(train={"batch": 16, "steps": 1000}))
    assert isinstance(run, TransformerRunConfig)
    assert largest_micro_batch(work, run, 1) == [40] * 16
    often = dataclasses.replace(run, excerpt_share=0.85, excerpt_frames=4)
    lengths = largest_micro_batch(work, often, 1)
    drawn = np.random.default_rng(0).binomial(16, 0.15, size=(200, 1000)).max(1)  # the most whole clips of each of 200 runs
    assert lengths.count(40) == pytest.approx(np.median(drawn), abs=1)
    assert lengths.count(40) + lengths.count(4) == 16


def test_the_mean_cost_is_that_of_all_lengths() -> None:
    work, run = read_work(PlanConfig(), run_of())
    assert isinstance(run, TransformerRunConfig)
    work.lengths = {15: 5, 20: 1, 22: 0, 31: 2, 40: 3}
    cost = lambda frames: 3.0 + 2 * frames + 0.5 * frames**2  # noqa: E731
    exact = sum(count * cost(length) for length, count in work.lengths.items()) / 11
    assert mean_over_clips(work, run, cost) == pytest.approx(exact)
    excerpts = dataclasses.replace(run, excerpt_share=0.25, excerpt_frames=4)
    assert mean_over_clips(work, excerpts, cost) == pytest.approx(0.75 * exact + 0.25 * cost(4))


def test_a_recipe_is_of_the_model_that_knows_its_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("frames_per_clip: 2\nmodel: {image_size: 64}\nlosses: {ssim: 0}\n")
    plan, run = load_plan(recipe, ["gpus=4", "train.batch=8"])
    assert isinstance(run, VQVAERunConfig)
    assert (plan.gpus, run.train.batch, run.frames_per_clip) == (4, 8, 2)
    plan, run = load_plan(None, ["model.layers=3", "mfu=0.5"])
    assert isinstance(run, TransformerRunConfig)
    assert (run.model.layers, plan.mfu) == (3, 0.5)
    for wrong, near in (
        ("mfuu=1", "did you mean 'mfu'?"),
        ("model.layer=1", "did you mean 'model.layers'"),
        ("acelerator=x", "did you mean 'accelerator'"),
    ):
        with pytest.raises(ConfigError) as error:
            load_plan(None, [wrong])
        assert near in str(error.value)


def test_settings_of_plans_and_of_runs_have_different_names() -> None:
    plan = {field.name for field in dataclasses.fields(PlanConfig)}
    for cls in (TransformerRunConfig, VQVAERunConfig):
        assert not plan & {field.name for field in dataclasses.fields(cls)}
