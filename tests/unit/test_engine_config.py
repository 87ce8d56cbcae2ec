"""Settings and DeepSpeed files -> what DeepSpeed is given; the learning rate; the parameter groups."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from torch import nn

from t2v_ds.config import TrainConfig
from t2v_ds.errors import ConfigError
from t2v_ds.training.distributed import connect
from t2v_ds.training.ds_config import accumulation_steps, complete_ds_config, resolve_ds_config, zero_stage
from t2v_ds.training.engine import Engine
from t2v_ds.training.optimizer import learning_rate_at, parameter_groups
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
        ({"optimizer": {"type": "AdamW"}}, "sets 'optimizer'.*use train.learning_rate"),
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


def test_weight_decay_spares_biases_norms_and_embeddings() -> None:
    decayed, others = parameter_groups(Toy(), 0.3)
    assert decayed["weight_decay"] == 0.3 and set(decayed["names"]) == {"codes", "body.0.weight", "body.3.weight"}
    assert others["weight_decay"] == 0.0 and {"embedding.weight", "body.1.weight", "tied.bias"} <= set(others["names"])
    assert not any(name.startswith("frozen") for name in decayed["names"] + others["names"])
