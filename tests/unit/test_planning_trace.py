"""Traces: the bytes and FLOPs of fake tensors are those of real ones, of few layers those of many."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from t2v_ds.config import TransformerRunConfig, VQVAERunConfig
from t2v_ds.config_loader import from_dict
from t2v_ds.models import attention as attention_module
from t2v_ds.training.planning import layers
from t2v_ds.training.planning.layers import trace_cache, trace_transformer, trace_vqvae
from t2v_ds.training.planning.subject import (
    stand_in_tokenizer,
    transformer_batch,
    transformer_objective,
    vqvae_batch,
    vqvae_objective,
)
from t2v_ds.training.planning.trace import Recorder, attention_flops

SMALL = {"width": 32, "layers": 3, "heads": 4, "max_frames": 4, "grid_size": 4, "codebook_size": 32, "text_width": 8}


def run_of(precision: str = "fp32", **model: Any) -> TransformerRunConfig:
    data = {"model": {**SMALL, **model}, "text": {"tokens": 5, "width": 8}, "train": {"precision": precision}}
    data |= {"last_frame_share": 0.3} if model.get("last_frame") else {}
    return from_dict(TransformerRunConfig, data)


def real_saved(run: TransformerRunConfig, lengths: list[int]) -> int:
    """Bytes that autograd keeps for the backward pass of a real forward pass, parameters and the batch not counted."""
    objective = transformer_objective(run, stand_in_tokenizer(run.model.grid_size, run.model.codebook_size)).train()
    batch = transformer_batch(run, lengths)
    given = [*objective.parameters(), *(value for value in batch.values() if isinstance(value, Tensor))]
    own = {one.untyped_storage().data_ptr() for one in given}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", enabled=run.train.precision == "bf16"):
        loss, _ = objective(batch)  # alive until the storages are counted
    del loss
    return sum(kept.values())


@pytest.mark.parametrize(
    ("precision", "model", "lengths"),
    [
        ("fp32", {}, [4, 2]),
        ("bf16", {"attention": "window", "window_frames": 2, "kv_heads": 2}, [4]),
        ("bf16", {"attention": "factorised", "decoding": "frame", "conditioning": "cross"}, [3, 3]),
    ],
)
def test_what_is_kept_is_what_autograd_really_saves(precision: str, model: dict[str, Any], lengths: list[int]) -> None:
    run = run_of(precision, grid_size=8, **model)
    assert trace_transformer(run, lengths).saved == pytest.approx(real_saved(run, lengths), rel=0.03)


def real_peaks(run: TransformerRunConfig, lengths: list[int]) -> tuple[int, float]:
    """The highest bytes of real tensors over both passes, beside parameters and batch, and the FLOPs."""
    recorder = Recorder()
    tokenizer = stand_in_tokenizer(run.model.grid_size, run.model.codebook_size)
    with recorder:
        objective = transformer_objective(run, tokenizer).train()
        batch = transformer_batch(run, lengths)
        before = recorder.alive
        recorder.enter("passes")
        recorder.flops = 0.0
        with torch.autocast("cpu", enabled=run.train.precision == "bf16"):
            loss, _ = objective(batch)
        loss.backward()
    return recorder.peaks["passes"].total - before, recorder.flops + recorder.again


@pytest.mark.parametrize(
    ("precision", "model"),
    [
        ("fp32", {"decoding": "frame", "dropout": 0.1}),
        ("bf16", {"activation_checkpointing": True, "loss_tile": 16, "group": 2, "last_frame": True}),
    ],
)
def test_fake_tensors_take_what_real_ones_take(precision: str, model: dict[str, Any]) -> None:
    run, lengths = run_of(precision, **model), [4, 2]
    trace = trace_transformer(run, lengths)
    peak, flops = real_peaks(run, lengths)
    assert trace.peak.total == pytest.approx(peak, rel=5e-3)  # real ones may come a little later
    assert trace.flops + trace.again_flops == flops


@pytest.mark.parametrize(
    ("precision", "model"),
    [
        ("fp32", {"layers": 6}),
        ("bf16", {"layers": 7, "attention": "factorised", "decoding": "frame", "kv_heads": 2}),
        ("fp32", {"layers": 6, "attention": "window", "conditioning": "cross", "tied_head": True}),
        ("bf16", {"layers": 5, "activation_checkpointing": True, "loss_tile": 16, "group": 2, "width": 64, "grid_size": 2}),
    ],
)
def test_few_layers_tell_of_all(precision: str, model: dict[str, Any]) -> None:
    run = run_of(precision, **model)
    told, traced = trace_transformer(run, [3, 4]), layers._trace(run, run.model.layers, [3, 4])
    assert told.peak == traced.peak
    for field in dataclasses.fields(told):
        if field.name != "peaks":
            assert getattr(told, field.name) == getattr(traced, field.name), field.name


def test_flops_are_those_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "SHORT", 0)  # so that these few positions, too, are attended to by the fused kernel
    run = run_of(neighbourhood=0, learned_positions=False, heads=4, mlp_ratio=2.0)
    model, lengths, words = run.model, [4, 2], run.text.tokens
    width, positions, frames = model.width, model.positions, sum(lengths)
    rows = len(lengths) * words + frames * positions
    text = 2 * len(lengths) * (words + 1) * model.text_width * width  # words and caption: their inputs need no gradient
    hidden = 2 * width
    layer = 2 * rows * width * (3 * width + width + 2 * hidden + hidden)
    head = 2 * frames * positions * width * (width + model.codebook_size + 1)  # mixer, logits, "is it the last?"
    seen = sum(n * (n + 1) // 2 for length in lengths for n in (words, words + length * positions))  # pairs, words among themselves too
    attention = 4 * seen * width
    trace = trace_transformer(run, lengths)
    assert trace.attention_flops == pytest.approx(3.5 * model.layers * attention)
    assert trace.flops == pytest.approx(2 * text + 3 * (model.layers * layer + head) + 3.5 * model.layers * attention)
    assert trace.again_flops == 0


def test_what_checkpointing_computes_again_is_counted_apart() -> None:
    plain, again = (trace_transformer(run_of(activation_checkpointing=on), [4]) for on in (False, True))
    assert again.flops == plain.flops
    assert 0.2 * plain.flops < again.again_flops < 0.34 * plain.flops  # the layers' forward passes, without their last products
    assert again.saved < plain.saved / 4


def test_causal_attention_counts_what_lies_below_the_diagonal() -> None:
    q, k, v = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8)  # grouped queries
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    assert attention_flops(forward, (q, k, v)) == 4 * 2 * 4 * 6 * 6 * 8
    assert attention_flops(forward, (q, k, v, 0.0, True)) == 4 * 2 * 4 * 21 * 8
    assert attention_flops(backward, (q, q, q, q, q, None, 0.0, False)) == 10 * 2 * 4 * 6 * 6 * 8
    assert attention_flops(backward, (q, q, q, q, q, None, 0.0, True)) == 10 * 2 * 4 * 21 * 8


def test_the_cache_of_generation_is_what_drawing_keeps() -> None:
    for model in ({}, {"layers": 5, "attention": "factorised", "kv_heads": 2}, {"attention": "window", "window_frames": 2}):
        run = run_of(**model)
        whole = layers._cache_of_layers(run, run.model.layers)
        assert trace_cache(run) == whole
        width = 2 * 2 * 4 * run.model.kv_heads * run.model.width // run.model.heads  # rows, keys and values, bytes
        least = run.text.tokens + min(run.model.max_frames, run.model.window_frames if model.get("attention") == "window" else 99) * 16
        if model.get("attention") != "factorised":
            assert least * width * run.model.layers <= whole <= 2 * least * width * run.model.layers


def test_a_step_of_the_vqvae_is_traced() -> None:
    data = {
        "model": {"image_size": 16, "stem_channels": 16, "channel_multipliers": [1], "residual_blocks": [1], "norm_groups": 4,
                  "quantizer": {"codebook_size": 16, "codebook_dim": 8}},
        "losses": {"perceptual": 0.1, "perceptual_network": "squeezenet", "ssim": 0},
        "train": {"precision": "fp32"},
    }  # fmt: skip
    run = from_dict(VQVAERunConfig, data)
    trace = trace_vqvae(run, 3)
    recorder = Recorder()
    with recorder:
        objective = vqvae_objective(run).train()
        batch = vqvae_batch(run, 3)
        before = recorder.alive
        recorder.enter("passes")
        recorder.flops = 0.0
        loss, _ = objective(batch)
        loss.backward()
    assert trace.total_parameters == sum(p.numel() for p in objective.parameters())
    assert trace.frozen > sum(b.nbytes for b in objective.buffers())  # and the perceptual network
    assert trace.peak.total == pytest.approx(recorder.peaks["passes"].total - before, rel=0.02)
    assert trace.flops == recorder.flops


def test_fake_tensors_need_no_memory() -> None:
    recorder = Recorder()
    with FakeTensorMode(), recorder:
        kept = torch.zeros(2**40, dtype=torch.uint8)
    assert recorder.alive == 2**40 == kept.nbytes
    del kept
    assert recorder.alive == 0
