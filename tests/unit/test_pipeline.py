"""The demo's last stage: what is measured already is not measured again, unless a model is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t2v_ds import pipeline
from t2v_ds.config import DemoConfig
from t2v_ds.data.manifest import Manifest
from t2v_ds.evaluation.reconstruction import Reconstruction
from t2v_ds.models.exported import export_model
from t2v_ds.models.facade import export_tokenizer
from tests.unit.test_facade import VQ, vqvae


def test_results_are_those_of_the_models_that_lie_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    for name in ("load_generator", "choose_prompts", "_draw", "true_clips", "_show"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: [])
    monkeypatch.setattr(pipeline, "judge", lambda *_: measured.append(0) or {"seen": {}})
    monkeypatch.setattr(pipeline, "_last_metrics", lambda _: {})
    monkeypatch.setattr(pipeline, "measure_reconstruction", lambda *_: Reconstruction(0, 0, 0, 0, 0))
    tokenizer, generator = tmp_path / "tokenizer", tmp_path / "generator"
    config, manifest = DemoConfig(), Manifest.build("raw", [])
    config.evaluate.reconstruction_clips = 0
    export_tokenizer(tokenizer, VQ, vqvae().state_dict())
    export_model(generator, {}, {"w": torch.zeros(2)})
    for expected in (1, 1):
        pipeline._evaluate(config, manifest, tokenizer, generator, tmp_path)
        assert len(measured) == expected
    export_model(generator, {}, {"w": torch.ones(2)})  # trained longer
    for expected in (2, 2):
        pipeline._evaluate(config, manifest, tokenizer, generator, tmp_path)
        assert len(measured) == expected
    export_tokenizer(tokenizer, VQ, vqvae(1).state_dict())
    pipeline._evaluate(config, manifest, tokenizer, generator, tmp_path)
    assert len(measured) == 3
