"""Plans: what is reported, verdicts, and changes that really make a run fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from t2v_ds import cli
from t2v_ds.config import PlanConfig, TransformerRunConfig, VQVAERunConfig
from t2v_ds.config_loader import from_dict
from t2v_ds.errors import ConfigError
from t2v_ds.training.planning.fit import Move, changes_that_fit, gentle_moves
from t2v_ds.training.planning.hardware import GIB, KNOWN, find, resident
from t2v_ds.training.planning.planner import Plan, Planner
from t2v_ds.training.planning.report import count, duration, gib, to_json, write_text
from t2v_ds.training.planning.timing import Timing

TRACES: dict[str, Any] = {}  # of all plans here: they depend on the model and the micro-batch alone
MODEL = {"width": 64, "layers": 2, "heads": 2, "max_frames": 6, "grid_size": 8, "codebook_size": 64}
LITTLE = 0.13  # of the memory: too little for any single change


def run_of(**train: Any) -> TransformerRunConfig:
    return from_dict(TransformerRunConfig, {"model": MODEL, "text": {"tokens": 4, "width": 16}, "train": {"batch": 8, **train}})


def planned(run: TransformerRunConfig | VQVAERunConfig, **settings: Any) -> tuple[Planner, Plan]:
    planner = Planner(PlanConfig(overhead=0, **settings))
    planner._traces = TRACES
    return planner, planner.plan(run)


@pytest.fixture(scope="module")
def wide() -> tuple[Planner, Plan]:
    """A run whose activations are most of what it takes."""
    return planned(run_of(ds_config="zero0", precision="fp32"), gpus=1)


def test_a_step_takes_its_flops_over_the_rate_that_is_reached(wide: tuple[Planner, Plan]) -> None:
    _, plan = wide
    assert plan.cost.codes == 8 * 6 * 8 * 8
    assert plan.cost.flops == plan.trace.flops
    assert plan.cost.seconds == pytest.approx(plan.cost.flops / (66.9e12 * 0.4))
    for settings, divisor in (({"gpus": 4}, 4 * 66.9 * 0.4), ({"peak_tflops": 5.0, "mfu": 0.5}, 2.5)):
        _, other = planned(run_of(ds_config="zero0", precision="fp32"), **settings)
        assert other.cost.flops == pytest.approx(plan.cost.flops)
        assert other.cost.seconds == pytest.approx(plan.cost.flops / (divisor * 1e12))


def test_accumulation_costs_time_and_saves_memory(wide: tuple[Planner, Plan]) -> None:
    _, plan = wide
    _, parts = planned(run_of(ds_config="zero0", precision="fp32", micro_batch=2))
    assert parts.work.accumulation == 4
    assert parts.cost.flops == pytest.approx(plan.cost.flops)
    assert parts.memory.total < plan.memory.total / 2


def test_a_verdict_is_a_comparison(wide: tuple[Planner, Plan]) -> None:
    _, plan = wide
    assert plan.fits
    assert "\nfits: " in write_text(plan, [])
    exact = dataclasses.replace(plan, accelerator=dataclasses.replace(plan.accelerator, memory=plan.memory.total / GIB))
    assert exact.fits
    assert "less than a tenth to spare" in write_text(exact, [])
    small = dataclasses.replace(plan, accelerator=dataclasses.replace(plan.accelerator, memory=(plan.memory.total - 1) / GIB))
    assert not small.fits
    assert "does not fit" in write_text(small, [])
    assert "no change of settings tried here is enough" in write_text(small, [])


def apply(run: Any, moves: tuple[Move, ...]) -> Any:
    for move in moves:
        run = move.apply(run)
    return run


@pytest.mark.parametrize(("share", "moves"), [(0.9, 1), (LITTLE, 2)])
def test_changes_that_are_proposed_make_it_fit(wide: tuple[Planner, Plan], share: float, moves: int) -> None:
    _, plan = wide
    memory = plan.memory.total * share / GIB
    planner, small = planned(run_of(ds_config="zero0", precision="fp32"), memory=memory)
    assert not small.fits
    changes = changes_that_fit(small, planner)
    assert changes
    assert {len(change.moves) for change in changes} == {moves}  # no more than are needed
    for change in changes:
        _, changed = planned(apply(small.run, change.moves), memory=memory)
        assert changed.fits
        assert changed.memory.total == change.memory.total
        assert change.text in write_text(small, changes)
    assert [change.seconds for change in changes] == sorted(change.seconds for change in changes)
    if share == 0.9:
        texts = {change.text for change in changes}
        assert {"model.activation_checkpointing=true", "train.micro_batch=4"} <= texts


def test_a_smaller_bucket_is_proposed_where_buckets_are_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2v_ds.training.planning.fit.SHOWN", 10)  # each of the files in ds_configs/ would do as well
    file = tmp_path / "default.json"  # DeepSpeed's own size of a bucket
    file.write_text('{"zero_optimization": {"stage": 1, "overlap_comm": true}}')
    planner, plan = planned(run_of(ds_config=str(file)), memory=2.0)
    assert plan.memory.states.buckets == 8_000_000_000
    changes = {change.text: change for change in changes_that_fit(plan, planner)}
    [smaller] = [change for text, change in changes.items() if text.startswith("zero_optimization.reduce_bucket_size=50000000")]
    assert smaller.memory.total == plan.memory.total - 7_200_000_000
    assert "train.ds_config=zero0" in changes


def test_the_time_of_a_change_is_told_from_the_run_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[TransformerRunConfig] = []

    def time_it(run: TransformerRunConfig, *_: Any) -> Timing:
        timed.append(run)
        return Timing((2.0,), 1.0, 0.5, 1000)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("t2v_ds.training.planning.planner.time_transformer", time_it)
    planner, plan = planned(run_of(ds_config="zero0", precision="fp32"), accelerator="cpu", measure=True, memory=0.001)
    run = dataclasses.replace(plan.run, model=dataclasses.replace(plan.run.model, activation_checkpointing=True))
    change = planner.plan(run, like=plan)
    changes_that_fit(plan, planner)
    assert len(timed) == 1  # each would take as long as training steps do
    more = (change.cost.flops + change.cost.again_flops) / plan.cost.flops
    assert change.cost.seconds == pytest.approx(plan.cost.seconds * more)


def test_what_is_on_already_is_not_proposed() -> None:
    model = {**MODEL, "activation_checkpointing": True, "loss_tile": 64}
    run = from_dict(TransformerRunConfig, {"model": model, "train": {"batch": 1, "ds_config": "zero3_offload"}})
    _, plan = planned(run)
    kinds = {move.kind for move in gentle_moves(plan)}
    assert not kinds & {"checkpointing", "tile", "micro-batch"}


def test_where_nothing_helps_that_is_said(wide: tuple[Planner, Plan]) -> None:
    planner, plan = planned(run_of(ds_config="zero0", precision="fp32"), memory=0.0001)
    assert changes_that_fit(plan, planner) == []


def test_all_figures_are_written_as_json(wide: tuple[Planner, Plan]) -> None:
    planner, plan = wide
    plan = planner.complete(plan)
    written = json.loads(json.dumps(to_json(plan, [])))
    assert written["parameters"]["total"] == plan.trace.total_parameters
    assert written["memory"]["total"] == plan.memory.total
    assert set(written["stages"]) == {"zero0", "zero1", "zero2", "zero3", "zero3_offload"}
    assert written["stages"]["zero0"]["total"] == plan.memory.total
    assert [(one["activation_checkpointing"], one["loss_tile"]) for one in written["activations"]] == [
        (False, 0), (False, 4096), (True, 0), (True, 4096)
    ]  # fmt: skip
    assert written["activations"][0]["saved"] == plan.trace.saved > 2 * written["activations"][2]["saved"]
    assert written["kv_cache"] == plan.cache > 0
    assert written["settings"]["run"]["model"]["width"] == 64
    text = write_text(plan, [])
    for expected in ("zero0 *", "checkpointing, loss_tile 4096", "keys and values of a prompt", "TFLOP/s", "length not known"):
        assert expected in text


def test_a_vqvae_is_planned_as_well() -> None:
    model = {"image_size": 16, "stem_channels": 8, "channel_multipliers": [1], "residual_blocks": [0], "norm_groups": 4}
    run = from_dict(VQVAERunConfig, {"model": model, "losses": {"perceptual": 0, "ssim": 0}, "train": {"batch": 8, "ds_config": "zero0"}})
    planner, plan = planned(run, gpus=2, clips=80)
    text = write_text(planner.complete(plan), [])
    assert plan.cost.codes == 8 * 4
    assert plan.work.steps == 10
    assert "VQ-VAE of 16 pixels" in text
    assert "generation" not in text
    small = dataclasses.replace(plan, accelerator=dataclasses.replace(plan.accelerator, memory=0.99 * plan.memory.total / GIB))
    assert [move.text for change in changes_that_fit(small, planner) for move in change.moves][:1] != []


def test_accelerators_are_found_by_name_and_overruled_by_settings() -> None:
    assert find(PlanConfig(accelerator="a100")).bf16 == 312
    given = find(PlanConfig(accelerator="l4", memory=12, peak_tflops=99))
    assert (given.memory, given.bf16, given.fp32) == (12, 99, 99)
    assert find(PlanConfig(accelerator="cpu", gpus=2)).memory == find(PlanConfig(accelerator="cpu")).memory / 2 > 0
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        find(PlanConfig(accelerator="h10"))
    assert all(one.source and one.bf16 > one.fp32 > 0 for name, one in KNOWN.items() if name != "cpu")
    assert resident(1000, PlanConfig(overhead=0)) == 1000
    assert resident(1000, PlanConfig()) == 1000 + int(1.5 * GIB)
    assert resident(1000, PlanConfig(accelerator="cpu", overhead=0)) > 1000


def test_the_time_of_many_layers_is_made_of_two() -> None:
    timing = Timing((2.0, 3.0), 1.0, 0.5, 1000)
    assert timing.passes(5) == 1 + 2 + 3 + 2 + 3 + 2
    assert Timing((2.0,), 1.0, 0.5, 1000).passes(5) == 11
    assert Timing((), 1.0, 0.5, 1000).passes(0) == 1
    assert timing.step(4000) == 2.0


def test_numbers_are_shown_with_units() -> None:
    assert [gib(size * GIB) for size in (0.123, 12.34, 123.4)] == ["0.12", "12.3", "123"]
    assert [count(number) for number in (999, 1234, 31_500_000, 1.297e9, 3.5e15)] == ["999 ", "1.23 k", "31.5 M", "1.3 G", "3.5 P"]
    assert [duration(seconds) for seconds in (0.01, 2, 90, 7200, 864_000)] == ["10 ms", "2 s", "1.5 minutes", "2 hours", "10 days"]


SETTINGS = ["model.width=32", "model.layers=2", "model.heads=2", "model.max_frames=3", "model.grid_size=4", "model.codebook_size=16",
            "text.tokens=3", "text.width=8", "train.ds_config=zero0"]  # fmt: skip


def test_the_verb_prints_a_plan_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    cli.run(["plan", *SETTINGS, "--gpus", "2", "--memory", "1.6", "--json", str(out), "accelerator=a100", "clips=64"])
    text = capsys.readouterr().out
    assert "fits: " in text
    assert "8 steps: " in text
    written = json.loads(out.read_text())
    assert written["settings"]["gpus"] == 2
    assert written["accelerator"]["memory"] == 1.6
    assert written["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "x"], "setting 'gpus' in the command line is 'x'; expected a whole number"),
        (["--memory", "-1"], "setting 'memory' is -1.0; allowed: >= 0 GiB"),
        (["mfu=1.5"], "setting 'mfu' is 1.5; allowed: above 0, up to 1"),
        (["train.ds_config=zero9"], "which is no file of ds_configs/"),
        (["--measure"], "'accelerator' is 'h100'"),
        (["--json", "/nowhere/at/all.json"], "--json is '/nowhere/at/all.json', but /nowhere/at is no folder"),
        (["prepare.source=x"], "unknown setting 'prepare'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        cli.run(["plan", *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
