"""A model's folder explains itself, and loads by its path; the hub's part of the card is valid YAML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

import t2v_ds
from t2v_ds.data.manifest import Manifest, ShardInfo
from t2v_ds.errors import CheckpointError
from t2v_ds.training.model_card import CARD, write_model_card
from tests.unit.test_facade import SIZE, folders

__all__ = ["folders"]  # the fixture


def test_the_card_has_front_matter_figures_and_settings(tmp_path: Path) -> None:
    shard = ShardInfo("tokens-00000.tar", 3, 50, 10, "a" * 64, "b" * 64, 0, {"16": 2, "18": 1})
    manifest = Manifest.build("tokens", [shard], image_size=64, source={"name": "my gifs"})
    metrics = {"loss/codes": 1.25, "performance/step_seconds": 9.0}
    write_model_card(tmp_path, "generator", 5_000_000, {"model": {"width": 256}}, metrics, manifest)
    _, front, body = (tmp_path / CARD).read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-to-video"
    for said in ("5.0 million parameters", "3 clips, 50 frames of 64 x 64", "my gifs", "| loss/codes | 1.25 |", "width: 256"):
        assert said in body
    assert "step_seconds" not in body  # of the machine, not of the model


def test_from_pretrained_takes_a_folder_and_refuses_what_is_none(folders: tuple[Path, Path]) -> None:
    tokenizer = t2v_ds.Tokenizer.from_pretrained(folders[0])
    frames = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    assert np.array_equal(tokenizer.encode(frames), t2v_ds.load_tokenizer(folders[0]).encode(frames))
    generator = t2v_ds.Generator.from_pretrained(str(folders[1]))
    assert generator.tokenizer.tokenizer_id == tokenizer.tokenizer_id
    for name in ("no/such-model", str(folders[0] / "missing"), "x" * 300):
        with pytest.raises(CheckpointError, match="is neither a folder nor a model that can be fetched"):
            t2v_ds.Generator.from_pretrained(name)
