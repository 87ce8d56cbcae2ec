"""Complete or invisible; damage is named; exports load without DeepSpeed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from t2v_ds.errors import CheckpointError, ConfigError
from t2v_ds.models.exported import content_id, export_model, load_exported, load_state
from t2v_ds.training import checkpoint
from t2v_ds.training.checkpoint import checkpoints, config_difference, latest_checkpoint
from t2v_ds.training.distributed import Collectives, Ranks
from t2v_ds.training.loop import _prepare_folder
from tests.toy import train_toy

SETTINGS: dict[str, Any] = {
    "steps": 8,
    "save_every": 3,
    "ds_config": "zero1",
    "precision": "fp32",
    "keep_checkpoints": 3,
    "data_threads": 0,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    train_toy(run, SETTINGS)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run that stands at step 6 of 8, with an older checkpoint at 3."""
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints" / "step_00000008")
    (copy / "DONE").unlink()
    return copy


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    assert [path.name for path in checkpoints(finished)] == ["step_00000003", "step_00000006", "step_00000008"]
    assert not list((finished / "checkpoints").rglob("latest"))
    for name in ("config.yaml", "config.json", "model.safetensors", "metrics.jsonl", "DONE", "tensorboard"):
        assert (finished / name).exists(), name


def test_a_finished_run_returns_at_once_and_a_longer_one_goes_on(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    metrics = train_toy(copy, SETTINGS)
    assert metrics == json.loads((copy / "DONE").read_text())["metrics"] and metrics["loss"] > 0
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before
    train_toy(copy, {**SETTINGS, "steps": 10})
    assert json.loads((copy / "DONE").read_text())["step"] == 10
    assert [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()] == list(range(1, 11))


def test_resumed_equals_undisturbed(run: Path, finished: Path) -> None:
    train_toy(run, SETTINGS)
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_place_where_no_run_can_be_is_told_to_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    told: list[Any] = []

    class Two(Collectives):
        def broadcast_object(self, value: Any) -> Any:
            told.append(value)
            return value

    first = Two(Ranks(0, 0, 2, 1, "127.0.0.1", 0), torch.device("cpu"))
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"a run cannot be kept in .*file.*: (File exists|Not a directory); choose") as caught:
            _prepare_folder(place, {}, None, 1, True, False, first)
        assert str(pickle.loads(pickle.dumps(told.pop()))) == str(caught.value)


def test_half_written_ones_are_invisible_and_removed(run: Path) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_00000006", folder / "step_00000007.partial")
    shutil.copytree(folder / "step_00000006", folder / "step_00000002.deleting")
    shutil.copytree(folder / "step_00000006", folder / "step_00000007")
    (folder / "step_00000007" / "complete.json").unlink()
    assert latest_checkpoint(run) == folder / "step_00000006"
    checkpoint.remove_leftovers(run)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000003", "step_00000006", "step_00000007"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_named_with_the_way_out(run: Path, damage: str) -> None:
    name = "native/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path = run / "checkpoints" / "step_00000006" / name
    content = bytearray(path.read_bytes())
    size = len(content)
    expected = {
        "flip": f"{name} \\({size} bytes\\) does not hold what was written",
        "cut": f"{name} has {size // 2} bytes where {size} were written",
        "missing": f"{name} is missing \\({size} bytes",
    }
    if damage == "flip":
        content[size // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: size // 2])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"{expected[damage]}.*delete the folder .*step_00000006 .*back to step 3"):
        train_toy(run, SETTINGS)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    train_toy(run, SETTINGS)  # the advice works
    assert (run / "DONE").exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_checkpoint_runs_no_code(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints" / "step_00000006"
    path = folder / "native" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": _Evil(tmp_path / "pwned")}, path)
    recorded = json.loads((folder / "complete.json").read_text())
    recorded["files"][f"native/{path.name}"] = checkpoint._digest(path)
    (folder / "complete.json").write_text(json.dumps(recorded))
    with pytest.raises(CheckpointError, match="was not loaded"):
        train_toy(run, SETTINGS)
    assert not (tmp_path / "pwned").exists()
    pickle.loads(pickle.dumps(_Evil(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists(), "the test's own payload must work"


def test_changed_settings_are_named(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"setting 'train.learning_rate' is 0.02 but .*step_00000006 was made with 0.01"):
        train_toy(run, {**SETTINGS, "learning_rate": 0.02})
    with pytest.raises(CheckpointError, match=r"has made 6 steps but the settings ask for 4"):
        train_toy(run, {**SETTINGS, "steps": 4})
    train_toy(run, {**SETTINGS, "save_every": 100, "log_every": 4, "ds_config": "zero2"})
    assert (run / "DONE").exists()


def test_config_difference() -> None:
    saved = {"out": "a", "model": {"width": 4, "levels": (1, 2)}, "train": {"steps": 5, "batch": 2}}
    assert config_difference(saved, {"out": "b", "model": {"width": 4, "levels": [1, 2]}, "train": {"steps": 9, "batch": 2}}) is None
    assert config_difference(saved, {**saved, "model": {"width": 8, "levels": [1, 2]}}) == ("model.width", 4, 8)
    assert config_difference(saved, {**saved, "extra": 1}) == ("extra", None, 1)


def test_settings_that_an_earlier_version_lacked_were_off() -> None:
    before = {"train": {"batch": 2}}
    now = {"train": {"batch": 2, "shard_window": 0}, "length_buckets": 0, "tokenizer_id": "t"}
    assert config_difference(before, now) is None
    assert config_difference(before, {**now, "length_buckets": 4}) == ("length_buckets", 0, 4)
    assert config_difference(now, {**now, "tokenizer_id": "other"}) == ("tokenizer_id", "t", "other")
    assert config_difference(now, before) == ("length_buckets", 0, None)
    newer = {**now, "train": {**now["train"], "compile": False, "sequence_parallel": 1}, "context_confusion": 0.0}
    assert config_difference(before, newer) is None
    for decoding, difference in (("token", None), ("frame", ("mask", "tube", "frame"))):  # with "token" it does nothing
        tube, frame = ({"mask": mask, "model": {"decoding": decoding}} for mask in ("tube", "frame"))
        assert config_difference(tube, frame) == difference
    assert config_difference(before, {**newer, "context_confusion": 0.1}) == ("context_confusion", 0.0, 0.1)


def test_a_moved_tokenizer_and_what_trades_memory_for_time_may_change() -> None:
    saved = {"model": {"activation_checkpointing": False, "loss_tile": 0, "width": 4}, "tokenizer": "here", "tokenizer_id": "t"}
    now = {"model": {"activation_checkpointing": True, "loss_tile": 64, "width": 4}, "tokenizer_id": "t"}
    assert config_difference(saved, now) is None


# -- exported models ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))


def test_exports_round_trip_with_tied_tensors_and_all_types(tmp_path: Path) -> None:
    model = Small()
    export_model(tmp_path / "m", {"kind": "small", "name": "é"}, model.state_dict())
    for i in range(4):
        export_model(tmp_path / "again", {"kind": "small", "name": "é"}, model.state_dict())
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes(), i
    config, state = load_exported(tmp_path / "m")
    assert config == {"kind": "small", "name": "é"}
    other = Small()
    load_state(other, state, tmp_path / "m")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value) and other.state_dict()[name].dtype == value.dtype
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_content_id_follows_the_content(tmp_path: Path) -> None:
    model = Small()
    original = content_id({"a": 1, "b": 2}, model.state_dict())
    assert len(original) == 16 and int(original, 16) >= 0
    export_model(tmp_path, {"b": 2, "a": 1}, model.state_dict())
    assert content_id(*load_exported(tmp_path)) == original
    assert content_id({"a": 1, "b": 3}, model.state_dict()) != original
    with torch.no_grad():
        model.first.weight[0, 0] += 1e-6
    assert content_id({"a": 1, "b": 2}, model.state_dict()) != original


def test_bad_exports_are_one_clear_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    export_model(folder, {"kind": "small"}, Small().state_dict())
    weights = (folder / "model.safetensors").read_bytes()
    for content in (weights[: len(weights) // 2], weights[:4], b""):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"model.safetensors \({len(content)} bytes\) is cut or damaged"):
            load_exported(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config.json was changed after"):
        load_exported(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load_exported(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no config.json"):
        load_exported(folder)
    with pytest.raises(CheckpointError, match="there is no model folder"):
        load_exported(tmp_path / "none")


def test_tensors_that_do_not_fit_are_named() -> None:
    state = dict(Small().state_dict())
    for change, message in (
        ({"first.bias": None}, "lacks the tensor 'first.bias'"),
        ({"first.bias": torch.zeros(5)}, r"'first.bias' in x has shape \[5\]; the model of its config needs \[4\]"),
        ({"first.bia": torch.zeros(4)}, "unknown tensor 'first.bia': did you mean 'first.bias'"),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            load_state(Small(), changed, "x")
