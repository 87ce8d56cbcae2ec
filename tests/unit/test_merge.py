"""Codebooks are aligned before they are averaged; threads that do not belong together are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2v_ds.config import QuantizerConfig, VQVAEConfig
from t2v_ds.errors import CheckpointError, ConfigError
from t2v_ds.evaluation.forgetting import Quality, heat_map, table_markdown
from t2v_ds.merge import CODEBOOK, SUMS, USAGE, Thread, align, average, check_threads, load_thread
from t2v_ds.models.vqvae import VQVAE

CONFIG = VQVAEConfig(image_size=8, stem_channels=8, channel_multipliers=(1,), residual_blocks=(0,), norm_groups=8,
                     quantizer=QuantizerConfig(codebook_size=16, codebook_dim=4))  # fmt: skip


def state_of(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = dict(VQVAE(CONFIG).state_dict())
    state[USAGE] = torch.rand(16) + 0.1
    state[SUMS] = state[CODEBOOK] * state[USAGE][:, None]
    return state


def permuted(state: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    return {**state, **{name: state[name][order] for name in (CODEBOOK, USAGE, SUMS)}}


def test_alignment_finds_a_permutation() -> None:
    state, order = state_of(0), torch.randperm(16)
    other = permuted(state, order)
    noise = 1e-3 * torch.randn(16, 4)
    found = align(state[CODEBOOK], state[USAGE], other[CODEBOOK] + noise, other[USAGE])
    assert torch.equal(other[CODEBOOK][found], state[CODEBOOK])


def test_the_average_of_one_model_under_other_numbers_is_that_model() -> None:
    state = state_of(0)
    merged, moved = average([state, permuted(state, torch.arange(16).roll(3))])
    assert moved == [0, 16]
    for name, tensor in state.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    plain, moved = average([state, permuted(state, torch.arange(16).roll(3))], aligned=False)
    assert moved == [0, 0]
    assert not torch.allclose(plain[CODEBOOK], state[CODEBOOK])


def test_rows_are_weighted_by_their_use_and_weights_evenly() -> None:
    a, b = state_of(0), state_of(0)
    b[CODEBOOK] = a[CODEBOOK] + 0.01
    a[USAGE][:] = 3.0
    b[USAGE][:] = 1.0
    name = "encoder.0.weight" if "encoder.0.weight" in a else next(iter(a))
    b[name] = a[name] + 1
    merged, _ = average([a, b])
    torch.testing.assert_close(merged[CODEBOOK], a[CODEBOOK] + 0.0025)
    torch.testing.assert_close(merged[name], a[name] + 0.5)
    torch.testing.assert_close(merged[USAGE], torch.full((16,), 2.0))
    torch.testing.assert_close(merged[SUMS], merged[CODEBOOK] * 2)


def thread(chunk: int, code: str = "a", **settings: Any) -> Thread:
    return Thread(Path(f"thread-{chunk}"), chunk, {"seed": 0, "train": {"batch": 4}, **settings}, code, None)  # type: ignore[arg-type]


def test_threads_that_do_not_belong_together_are_refused() -> None:
    assert check_threads([thread(0), thread(1)], [0, 1], False) == []
    with pytest.raises(ConfigError, match=r"chunks \[1\] have no thread.*allow_missing=true"):
        check_threads([thread(0)], [0, 1], False)
    assert check_threads([thread(0)], [0, 1], True) == [1]
    with pytest.raises(ConfigError, match="both of chunk 1"):
        check_threads([thread(1), thread(1)], [0, 1], False)
    with pytest.raises(ConfigError, match=r"of chunk 7; the data has chunks \[0, 1\]"):
        check_threads([thread(7)], [0, 1], False)
    with pytest.raises(CheckpointError, match=r"differ in the setting 'train\.batch'"):
        check_threads([thread(0), thread(1, train={"batch": 8})], [0, 1], False)
    with pytest.raises(CheckpointError, match="thread-0 and thread-1 were trained by different versions of t2v_ds"):
        check_threads([thread(0), thread(1, code="b")], [0, 1], False)


def test_an_unfinished_thread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not finished: it has no DONE"):
        load_thread(tmp_path)
    (tmp_path / "DONE").write_text("{")
    with pytest.raises(CheckpointError, match="DONE is damaged"):
        load_thread(tmp_path)
    (tmp_path / "DONE").write_text('{"config": {"chunk": -1}, "code": "a"}')
    with pytest.raises(CheckpointError, match="trained on all chunks"):
        load_thread(tmp_path)


def test_the_table_and_its_picture() -> None:
    table = {
        "a": {"x": Quality(20.0, 0.5, None, 0.9), "y": Quality(30.0, 0.6, None, 0.8)},
        "merged": {"x": Quality(28.0, 0.7, None, 1.0), "y": Quality(29.0, 0.8, None, 1.0)},
    }
    lines = table_markdown(table, ["x", "y"], "psnr", 1)
    assert lines[2:] == ["| a | 20.0 | 30.0 | 25.0 | 20.0 |", "| merged | 28.0 | 29.0 | 28.5 | 28.0 |"]
    assert len(table_markdown(table, ["x", "y"], "perceptual", 1)) == 2  # not measured
    picture = heat_map(table, ["x", "y"])
    low, high = picture[40 + 5, 260 + 5], picture[40 + 34 + 5, 260 + 5]  # of column x: a, merged
    assert low[0] > high[0]
    assert low[1] < high[1]
