"""Settings: defaults <- YAML <- overrides, and every mistake is one sentence that names it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from t2v_ds.config import (
    DemoConfig,
    DemoEvaluationConfig,
    EvaluateConfig,
    LossConfig,
    PrepareConfig,
    QuantizerConfig,
    SamplingConfig,
    TextConfig,
    TokenizeConfig,
    TrainConfig,
    TransformerConfig,
    TransformerRunConfig,
    VerifyConfig,
    VQVAEConfig,
    VQVAERunConfig,
)
from t2v_ds.config_loader import from_dict, load_config, resolve_recipe, to_dict
from t2v_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = {"demo": DemoConfig, "tgif_vqvae": VQVAERunConfig, "tgif_transformer": TransformerRunConfig}
STAGES = (PrepareConfig, VQVAERunConfig, TransformerRunConfig, TokenizeConfig, SamplingConfig, EvaluateConfig, DemoConfig)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    assert load_config(VQVAERunConfig) == VQVAERunConfig()
    path = written(tmp_path, "seed: 3\nmodel: {image_size: 64, quantizer: {decay: 0.5}}\ntrain: {steps: 7, batch: 2}\n")
    config = load_config(VQVAERunConfig, path, ["train.steps=9", "out=runs/x", "model.quantizer.codebook_size=16"])
    expected = VQVAERunConfig(
        out="runs/x",
        seed=3,
        model=VQVAEConfig(image_size=64, quantizer=QuantizerConfig(codebook_size=16, decay=0.5)),
        train=TrainConfig(steps=9, batch=2),
    )
    assert config == expected
    assert load_config(VQVAERunConfig, written(tmp_path, "# only a comment\n")) == VQVAERunConfig()
    assert load_config(VQVAERunConfig, overrides=["seed=1", "seed=2"]).seed == 2


def test_values_are_read_as_what_the_setting_is() -> None:
    config = load_config(
        TransformerRunConfig,
        overrides=[
            "train.learning_rate=1e-4", "train.steps=1000.0", "model.dropout=0", "model.activation_checkpointing=true",
            "train.betas=[0.8, 0.9]", "sample_prompts=a red circle", "out=2024", "data=", "tokenizer=a=b",
        ],
    )  # fmt: skip
    assert config.train.learning_rate == 1e-4
    assert (config.train.steps, type(config.train.steps)) == (1000, int)
    assert (config.model.dropout, type(config.model.dropout)) == (0.0, float)
    assert config.model.activation_checkpointing is True
    assert config.train.betas == (0.8, 0.9)
    assert config.sample_prompts == ("a red circle",)
    assert (config.out, config.data) == ("2024", "")
    assert config.tokenizer == "a=b"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.stesp=3"], "unknown setting 'train.stesp' in the command line: did you mean 'train.steps' or "),
        (["model.quantizer.codebok_size=3"], "unknown setting 'model.quantizer.codebok_size' in the command line: did you mean 'model."),
        (["modle.image_size=3"], "unknown setting 'modle' in the command line: did you mean 'model'?"),
        (
            ["zzz=3"],
            "unknown setting 'zzz' in the command line: valid: accept_new_data, balance, cache, chunk, data, frames_per_clip, held_out, "
            "losses, model, out, seed, start, train",
        ),
        (["train.steps=many"], "setting 'train.steps' in the command line is 'many'; expected a whole number"),
        (["train.steps=1" + "0" * 400], "in the command line is 10000000000000000000... (401 characters); expected a whole number"),
        (["train.steps=1e30"], "setting 'train.steps' in the command line is '1e30'; expected a whole number"),
        (["train.steps=1" + "0" * 5000], "; expected a whole number"),
        (["train.learning_rate=1" + "0" * 400], "(401 characters); expected a number"),
        (["train.steps=1.5"], "setting 'train.steps' in the command line is 1.5; expected a whole number"),
        (["train.steps=true"], "setting 'train.steps' in the command line is True; expected a whole number"),
        (["train.learning_rate=fast"], "setting 'train.learning_rate' in the command line is 'fast'; expected a number"),
        (["train.learning_rate=[1, 2]"], "setting 'train.learning_rate' in the command line is [1, 2]; expected a number"),
        (["train.precision=[1]"], "setting 'train.precision' in the command line is [1]; expected text"),
        (["train.steps=-1"], "setting 'train.steps' is -1; allowed: >= 0"),
        (["train.epochs=0"], "setting 'train.epochs' is 0.0; allowed: > 0"),
        (["train.precision=fp16"], "setting 'train.precision' is 'fp16'; allowed: 'bf16' or 'fp32'"),
        (["train.betas=[0.9]"], "setting 'train.betas' is (0.9,); allowed: two numbers in [0, 1)"),
        (["model.image_size=130"], "setting 'model.image_size' is 130; allowed: a multiple of 4"),
        (["model.stem_channels=20"], "setting 'model.stem_channels' is 20; allowed: a multiple of norm_groups (16)"),
        (["model.quantizer.learning=both"], "setting 'quantizer.learning' is 'both'; allowed: 'ema' or 'gradient'"),
        (["losses.l1=-1"], "setting 'losses.l1' is -1.0; allowed: >= 0"),
        (["train=3"], "setting 'train' in the command line is 3; expected a group of settings"),
        (["train=3", "train.steps=4"], "override 'train.steps=4': 'train' is a value, not a group of settings"),
        (["seed.x=4"], "setting 'seed' in the command line is {'x': 4}; expected a whole number"),
        (["train.steps"], "override 'train.steps' is not of the form key=value, such as train.steps=100"),
        (["=3"], "override '=3' is not of the form key=value"),
    ],
)
def test_mistakes_are_named(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(VQVAERunConfig, overrides=overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whether_a_group_divides_the_grid_is_asked_once_the_data_has_said_how_large_it_is() -> None:
    model = load_config(TransformerRunConfig, overrides=["model.group=3"]).model
    assert dataclasses.replace(model, grid_size=24, text_width=8).side == 8
    with pytest.raises(ConfigError, match=re.escape("a divisor of the grid (32 codes a side)")):
        dataclasses.replace(model, grid_size=32, text_width=8)


def test_a_preset_is_a_name() -> None:
    with pytest.raises(ConfigError, match=re.escape("setting 'model.preset' in the command line is [1]; expected text")):
        load_config(TransformerRunConfig, overrides=["model.preset=[1]"])


def test_a_number_is_finite() -> None:
    settings = ((TrainConfig, "learning_rate"), (TrainConfig, "gradient_clip"), (LossConfig, "l1"), (SamplingConfig, "temperature"))
    for config, key in settings:
        for value in (float("nan"), float("inf"), -float("inf"), "nan"):
            with pytest.raises(ConfigError, match=f"setting '{key}' in config is .*; expected a number"):
                from_dict(config, {key: value})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: [1, 2", "is not valid YAML"),
        ("- a\n- b\n", "holds a list; expected settings as 'key: value'"),
        (b"out: \xff\xfe", "is not UTF-8 text"),
        ("train:\n  stesp: 3\n", "unknown setting 'train.stesp' in {path}: did you mean 'train.steps' or "),
        ("train: 5\n", "setting 'train' in {path} is 5; expected a group of settings"),
        ("train:\n", "setting 'train' in {path} is None; expected a group of settings"),
        ("seed: x\n", "setting 'seed' in {path} is 'x'; expected a whole number"),
        ("1: 2\n", "unknown setting '1' in {path}"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(VQVAERunConfig, path)
    assert sentence.format(path=path) in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config file .*nowhere\.yaml: No such file"):
        load_config(VQVAERunConfig, tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"cannot read config file .*: Is a directory"):
        load_config(VQVAERunConfig, tmp_path)
    with pytest.raises(ConfigError, match="no file and no recipe: did you mean 'tgif_vqvae'"):
        resolve_recipe("tgif_vqva")
    assert resolve_recipe("demo") == ROOT / "configs" / "demo.yaml"
    assert resolve_recipe("other.yaml") == Path("other.yaml")


def test_every_recipe_loads() -> None:
    files = {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}
    assert set(files) == set(RECIPES)
    for name, path in files.items():
        config = load_config(RECIPES[name], path)
        assert config != RECIPES[name]()
        assert resolve_recipe(name) == path
    spec = load_config(VQVAERunConfig, files["tgif_vqvae"])
    model, quantizer = spec.model, spec.model.quantizer
    assert (model.image_size, model.grid_size, model.stem_channels) == (128, 32, 128)
    assert (quantizer.codebook_size, quantizer.codebook_dim) == (1024, 256)
    assert load_config(TransformerRunConfig, files["tgif_transformer"]).model.width == 512
    demo = load_config(DemoConfig, files["demo"])
    assert demo.prepare.image_size == demo.vqvae.model.image_size
    assert demo.evaluate.prompts >= 100


@pytest.mark.parametrize("name", ["tgif", "demo"])
def test_settings_of_the_slurm_pipeline_load_and_store_the_text(name: str) -> None:
    """What tokenize stores is what the transformer trains on; the other stages' settings are right as well."""
    stages = {"PREPARE": PrepareConfig, "VQVAE": VQVAERunConfig, "TOKENIZE": TokenizeConfig, "TRANSFORMER": TransformerRunConfig}
    loaded = {}
    for stage, cls in stages.items():
        script = f'source slurm/{name}.env; printf "%s\\0" "${{{stage}[@]}}"'
        words = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")[:-1]
        recipe = resolve_recipe(words[words.index("--config") + 1]) if "--config" in words else None
        loaded[stage] = load_config(cls, recipe, [word for word in words if "=" in word])
    assert loaded["TOKENIZE"].text.encoder == "hashing"
    assert loaded["TRANSFORMER"].text.encoder == ""


@pytest.mark.parametrize("cls", STAGES)
def test_plain_dictionaries_and_back(cls: type[Any]) -> None:
    config = cls()
    plain = to_dict(config)
    assert from_dict(cls, plain) == config

    def is_plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
        return all(map(is_plain, value)) if isinstance(value, list) else isinstance(value, (str, int, float, bool))

    assert is_plain(plain)
    plain["out" if "out" in plain else "seed"] = 5
    assert from_dict(cls, plain) != config


def test_every_setting_says_what_it_is_where_its_name_does_not() -> None:
    """Ranges of each group are checked when it is built in Python as well."""
    bad: list[tuple[type[Any], dict[str, Any]]] = [
        (PrepareConfig, {"min_frames": 5, "max_frames": 4}),
        (QuantizerConfig, {"decay": 1.0}),
        (VQVAEConfig, {"residual_blocks": (1,)}),
        (LossConfig, {"perceptual_network": "alexnet"}),
        (TextConfig, {"tokens": 0}),
        (TransformerConfig, {"width": 10, "heads": 3}),
        (TransformerConfig, {"grid_size": 9, "group": 2}),
        (TransformerConfig, {"neighbourhood": 2}),
        (TransformerRunConfig, {"caption_dropout": 1.0}),
        (TransformerRunConfig, {"last_frame_share": 0.3}),
        (TransformerRunConfig, {"model": TransformerConfig(last_frame=True)}),  # it would accept loops that it never learned
        (TokenizeConfig, {"batch_frames": 0}),
        (SamplingConfig, {"top_p": 0.0}),
        (DemoEvaluationConfig, {"prompts": 1}),
        (DemoConfig, {"prompts": ()}),
        (DemoConfig, {"prompts": ("a red circle", " ")}),
    ]
    for cls, values in bad:
        with pytest.raises(ConfigError, match=re.escape("; allowed: ")):
            cls(**values)
    defaults = VQVAEConfig()
    assert dataclasses.replace(defaults, channel_multipliers=(1, 2, 4), residual_blocks=(0, 0, 1)).grid_size == 16


@pytest.mark.parametrize(
    ("cls", "override", "hint"),
    [
        (VQVAERunConfig, "out=s3://bucket/run", "a folder of this machine"),
        (PrepareConfig, "out=file:///data", "a folder of this machine"),
        (VerifyConfig, "data=s3://bucket/raw", "only training reads data at URLs"),
        (TransformerRunConfig, "tokenizer=s3://bucket/t", "a folder of this machine"),
        (EvaluateConfig, "validation=s3://bucket/tokens", "only training reads data at URLs"),
        (EvaluateConfig, "model=s3://bucket/generator", "a folder of this machine"),
    ],
)
def test_a_url_where_a_folder_must_be_is_refused(cls: type[Any], override: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"a URL; allowed: .*{hint}"):
        load_config(cls, overrides=[override])


def test_training_reads_data_at_urls() -> None:
    assert load_config(VQVAERunConfig, overrides=["data=s3://bucket/raw"]).data == "s3://bucket/raw"
