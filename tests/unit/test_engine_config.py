"""Settings and DeepSpeed files -> what DeepSpeed is given; the learning rate; the parameter groups."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from t2v_ds.config import TrainConfig, VQVAERunConfig
from t2v_ds.errors import ConfigError
from t2v_ds.training.distributed import connect
from t2v_ds.training.ds_config import accumulation_steps, complete_ds_config, resolve_ds_config, zero_stage
from t2v_ds.training.engine import Engine
from t2v_ds.training.optimizer import Muon, learning_rate_at, orthogonal, parameter_groups
from tests.toy import Toy
from tests.toy_transformer import make


class Recorded:
    """DeepSpeed's part in which parameters stay whole: the modules that it is told to gather at once."""

    def __init__(self) -> None:
        self.whole: list[nn.Module] = []
        self.utils = self

    def set_z3_leaf_module(self, module: nn.Module, flag: bool) -> None:
        if flag:
            self.whole.append(module)


@pytest.mark.parametrize(("stage", "tile", "count"), [(3, 8, 1), (3, 0, 0), (1, 8, 0)])
def test_a_head_in_tiles_is_gathered_at_once_whatever_their_number(stage: int, tile: int, count: int) -> None:
    """Ranks with longer clips have more tiles; were each gathered for itself, ranks would wait for one another."""
    engine, recorded = Engine.__new__(Engine), Recorded()
    engine.stage, engine.objective = stage, make(loss_tile=tile)
    engine._keep_whole_in_steps(recorded)
    assert recorded.whole == [engine.objective.head] * count


def written(folder: Path, content: object) -> TrainConfig:
    (folder / "mine.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return TrainConfig(ds_config=str(folder / "mine.json"))


@pytest.mark.parametrize(("name", "stage"), [("zero0", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_the_files_that_come_with_the_product(name: str, stage: int) -> None:
    config = complete_ds_config(TrainConfig(ds_config=name, batch=12, micro_batch=2, gradient_clip=0.5), world_size=3)
    assert zero_stage(config) == stage == zero_stage(resolve_ds_config(name))
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"], config["train_batch_size"]) == (2, 2, 12)
    assert config["gradient_clipping"] == 0.5
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'.*did you mean 'zero_optimization'"),
        ({"gradient_clipping": 3.0}, "sets 'gradient_clipping' to 3.0 but the train settings make it 1.0"),
        ({"train_batch_size": 7}, "sets 'train_batch_size' to 7 but the train settings make it 8"),
        ({"optimizer": {"type": "AdamW"}}, "sets 'optimizer'.*use train.optimizer, train.learning_rate"),
        ({"bf16": {"enabled": True}}, "sets 'bf16'.*use train.precision"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm"),
        ("{", "is not JSON"),
        ([1], "holds a list"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete_ds_config(written(tmp_path, content), 1)


def test_a_file_may_repeat_what_the_settings_say(tmp_path: Path) -> None:
    config = complete_ds_config(written(tmp_path, {"gradient_clipping": 1.0, "train_batch_size": "auto", "bf16": {"enabled": False}}), 2)
    assert config["train_batch_size"] == 8


def test_unknown_names_and_paths() -> None:
    with pytest.raises(ConfigError, match=r"'zero4'.*did you mean.*'zero3'"):
        resolve_ds_config("zero4")
    with pytest.raises(ConfigError, match=r"cannot read the DeepSpeed file nowhere/x.json"):
        resolve_ds_config("nowhere/x.json")


def test_unknown_key_inside_the_zero_section(tmp_path: Path) -> None:
    train = written(tmp_path, {"zero_optimization": {"stage": 1, "overlap_com": True}})
    with pytest.raises(ConfigError, match=r"zero_optimization\.overlap_com"):
        Engine(Toy(), train, 0, connect(), 10)


def test_accumulation() -> None:
    assert accumulation_steps(TrainConfig(batch=8), 2) == (4, 1)
    assert accumulation_steps(TrainConfig(batch=24, micro_batch=3), 2) == (3, 4)
    with pytest.raises(ConfigError, match=r"'train.batch' is 8.*ranks \(3\); nearest: 6 or 9"):
        accumulation_steps(TrainConfig(batch=8), 3)
    with pytest.raises(ConfigError, match=r"micro_batch \(8\) x 2 ranks; nearest: 16$"):
        accumulation_steps(TrainConfig(batch=8, micro_batch=8), 2)


def test_learning_rate() -> None:
    train = TrainConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    assert [learning_rate_at(step, train, 104) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_at(4, train, 104) == 1.0
    assert math.isclose(learning_rate_at(54, train, 104), 0.55)
    assert math.isclose(learning_rate_at(104, train, 104), 0.1)
    constant = TrainConfig(learning_rate=1.0, schedule="constant", warmup_steps=0)
    assert {learning_rate_at(step, constant, 10) for step in (0, 5, 9)} == {1.0}


def test_muon_needs_whole_matrices_and_has_some_to_move() -> None:
    with pytest.raises(ConfigError, match=r"'train.optimizer' is 'muon'.* 'zero2' partitions them \(ZeRO stage 2\); allowed: .*zero0"):
        complete_ds_config(TrainConfig(optimizer="muon", ds_config="zero2"), 1)
    complete_ds_config(TrainConfig(optimizer="muon", ds_config="zero0"), 1)
    with pytest.raises(ConfigError, match=r"'train.optimizer' is 'lion'; allowed: 'adamw' or 'muon'"):
        TrainConfig(optimizer="lion")
    with pytest.raises(ConfigError, match=r"'train.optimizer' is 'muon'; allowed: 'adamw' for the tokenizer"):
        VQVAERunConfig(train=TrainConfig(optimizer="muon"))
    with pytest.raises(ConfigError, match="this model has no layers"):
        Muon(parameter_groups(nn.Linear(2, 2), 0.0, muon=True), TrainConfig(), None)


def test_a_step_of_muon_has_the_size_of_one_of_adamw_and_turns_nothing() -> None:
    """Each of the matrices in a weight moves along all of its directions alike; the rest moves as AdamW moves it."""
    torch.manual_seed(0)
    toy = Toy()
    groups = parameter_groups(toy, 0.0, muon=True)
    assert groups[0].pop("names") == ["body.0.weight", "body.3.weight"] and groups[0]["rows"] == [[6, 7], []]
    optimizer = Muon(groups, TrainConfig(learning_rate=0.1, precision="fp32"), None)
    before = {name: value.detach().clone() for name, value in toy.named_parameters()}
    gradients = {name: torch.randn_like(value) for name, value in toy.named_parameters()}
    for name, value in toy.named_parameters():
        value.grad = gradients[name].clone()
    optimizer.step()
    moved = {name: (before[name] - value.detach()) / 0.1 for name, value in toy.named_parameters() if value.requires_grad}
    for name, rows in (("body.0.weight", [6, 7]), ("body.3.weight", [7])):
        for part, gradient in zip(moved[name].split(rows), gradients[name].split(rows), strict=True):
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            seen = left.mT @ part @ right.mT / (0.2 * max(part.shape) ** 0.5)
            torch.testing.assert_close(seen - seen.diag().diag(), torch.zeros_like(seen), rtol=0, atol=1e-4)
            assert seen.diag().min() > 0 and seen.diag().max() < 2
    torch.testing.assert_close(moved["codes"], gradients["codes"].sign(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
def test_singular_values_are_brought_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    values = torch.logspace(-2, 0, min(shape)).expand(2, -1)
    found = torch.linalg.svdvals(orthogonal(left @ values.diag_embed() @ right))
    assert found.min() > 0.1 and found.max() < 2  # from 1 to 100
    assert found.mean() == pytest.approx(1, abs=0.25)


def test_a_kernel_is_a_matrix_at_each_of_its_places() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, bias=False)
    layer.hidden_matrices = {"": []}
    optimizer = Muon(parameter_groups(nn.Sequential(layer, nn.Linear(2, 2)), 0.0, muon=True), TrainConfig(precision="fp32"), None)
    before, layer.weight.grad = layer.weight.detach().clone(), torch.randn_like(layer.weight)
    optimizer.step()
    whole = (before - layer.weight.detach()).permute(2, 3, 0, 1).flatten(0, 1)  # [9, 4, 6]
    alone = orthogonal(layer.weight.grad.permute(2, 3, 0, 1).flatten(0, 1)[4:5])
    torch.testing.assert_close(whole[4:5], alone * 0.2 * 6**0.5 * TrainConfig().learning_rate, rtol=1e-3, atol=1e-7)


def test_weight_decay_spares_biases_norms_and_embeddings() -> None:
    decayed, others = parameter_groups(Toy(), 0.3)
    assert decayed["weight_decay"] == 0.3 and set(decayed["names"]) == {"codes", "body.0.weight", "body.3.weight"}
    assert others["weight_decay"] == 0.0 and {"embedding.weight", "body.1.weight", "tied.bias"} <= set(others["names"])
    assert not any(name.startswith("frozen") for name in decayed["names"] + others["names"])
