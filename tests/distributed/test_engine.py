"""One rank and two, at every ZeRO stage, by every launcher: the same training."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import ROOT, run_deepspeed, run_ranks, run_torchrun

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
SAVED = "checkpoints/step_00000010"
Results = dict[str, dict[str, dict[str, Any]]]


def run_program(out: Path, label: str, ranks: int, sources: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    for code, output in run_ranks(["tests/distributed/program.py", str(out), label, *sources], ranks):
        assert code == 0, output
    results: dict[str, dict[str, Any]] = json.loads((out / f"{label}.json").read_text())
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What every stage gives on one rank and on two; the program itself checks `write_rows` and the skipping of steps."""
    return {"1": run_program(folder, "1", 1), "2": run_program(folder, "2", 2)}


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_norms_and_weights_equal_one_rank_at_stage_0(results: Results, folder: Path, ranks: str, stage: str) -> None:
    reference, found = results["1"]["zero0"], results[ranks][stage]
    torch.testing.assert_close(found["losses"], reference["losses"], rtol=2e-6, atol=0)
    torch.testing.assert_close(found["norms"], reference["norms"], rtol=2e-6, atol=0)
    expected, weights = load_file(folder / "1_zero0.safetensors"), load_file(folder / f"{ranks}_{stage}.safetensors")
    assert weights.keys() == expected.keys() and {"average", "updates", "frozen.weight"} <= weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6)


def test_the_toy_learns(results: Results) -> None:
    """Else equal losses would say nothing."""
    losses = results["1"]["zero0"]["losses"]
    assert len(set(losses)) == 20
    assert sum(losses[10:]) < sum(losses[:10])


def test_muon_on_two_ranks_is_muon_on_one(results: Results, folder: Path) -> None:
    one, two = results["1"]["muon"], results["2"]["muon"]
    torch.testing.assert_close(two["losses"], one["losses"], rtol=5e-6, atol=0)
    expected, weights = load_file(folder / "1_muon.safetensors"), load_file(folder / "2_muon.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-6)
    assert not torch.allclose(expected["body.3.weight"], load_file(folder / "1_zero0.safetensors")["body.3.weight"], atol=0.01)
    assert sum(one["losses"][10:]) < sum(one["losses"][:10])
    torch.testing.assert_close(results["2"]["muon_bf16"]["losses"], one["losses"], rtol=0.02, atol=0)


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("stage", STAGES)
def test_rows_written_go_on_alike(results: Results, ranks: str, stage: str) -> None:
    found, reference = (torch.tensor(results[r][s]["later"]) for r, s in ((ranks, stage), ("1", "zero0")))
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_near_fp32_and_the_same_at_all_stages(results: Results, ranks: str, stage: str) -> None:
    found = results[ranks][f"{stage}_bf16"]["losses"]
    torch.testing.assert_close(found, results["1"]["zero0"]["losses"], rtol=0.01, atol=0)
    torch.testing.assert_close(found, results["1"]["zero0_bf16"]["losses"], rtol=2e-3, atol=0)
    assert found != results["1"]["zero0"]["losses"]


def test_resume_exactly_on_the_same_ranks_and_stage(results: Results, folder: Path) -> None:
    stages = (*STAGES, "muon")
    sources = tuple(f"{folder}/2/{stage}/{SAVED}={stage}" for stage in stages)
    resumed = run_program(folder, "native", 2, sources)
    for stage, source in zip(stages, sources, strict=True):
        torch.testing.assert_close(resumed[source]["losses"], results["2"][stage]["losses"][10:20], rtol=2e-7, atol=0)


PAIRS = [("zero0", "zero3"), ("zero1", "zero0"), ("zero2", "zero1"), ("zero3", "zero2"), ("zero3_offload", "zero3"), ("zero1", "zero1")]


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_resume_on_other_ranks_and_stages(results: Results, folder: Path, before: int, now: int) -> None:
    sources = tuple(f"{folder}/{before}/{saved}/{SAVED}={stage}" for saved, stage in PAIRS)
    muon = f"{folder}/{before}/muon/{SAVED}=muon"
    resumed = run_program(folder, f"{before}_to_{now}", now, (*sources, muon))
    for source in sources:
        torch.testing.assert_close(resumed[source]["losses"], results["1"]["zero0"]["losses"][10:20], rtol=2e-6, atol=0)
    torch.testing.assert_close(resumed[muon]["losses"], results["1"]["muon"]["losses"][10:20], rtol=5e-6, atol=0)


@pytest.fixture(scope="module")
def launched_alone(folder: Path) -> list[float]:
    code, output = run_ranks(["tests/toy.py", str(folder / "alone"), SETTINGS, "--dropout=0"], 1)[0]
    assert code == 0, output
    return curve(folder / "alone")


SETTINGS = json.dumps({"steps": 6, "precision": "fp32", "ds_config": "zero1", "save_every": 4})


def curve(run: Path) -> list[float]:
    assert json.loads((run / "DONE").read_text())["step"] == 6
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed --module", "deepspeed --no_python"])
def test_every_launcher_gives_the_same_training(folder: Path, tmp_path: Path, launched_alone: list[float], launcher: str) -> None:
    arguments = [str(tmp_path / "run"), SETTINGS, "--dropout=0"]
    if launcher == "torchrun":
        code, output = run_torchrun(["tests/toy.py", *arguments], 2)
    elif launcher == "deepspeed --module":
        code, output = run_deepspeed(["--module", "tests.toy", *arguments], 2)
    else:
        program = tmp_path / "toy"
        program.write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "toy.py").read_text())
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        code, output = run_deepspeed(["--no_python", str(program), *arguments], 2)
    assert code == 0, output
    torch.testing.assert_close(curve(tmp_path / "run"), launched_alone, rtol=2e-6, atol=0)
