"""Traces of the two models; of the transformer's layers only a few are traced, and the rest are extrapolated.

Every phase of the step grows by the same amount with each layer (with factorised attention: with each pair of them), so two
traces are enough to know all. The phases are apart because the highest peak may lie in another one for more layers:

    forward | head | backward of the head | ... of the last layers | ... of the first layers | ... of the inputs

Between the last and the first layers what is saved shrinks and gradients grow, layer by layer: no peak there is higher than at both
ends, so none is noted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from t2v_ds.config import TransformerRunConfig, VQVAERunConfig
from t2v_ds.models.cache import New
from t2v_ds.models.transformer import VideoTransformer
from t2v_ds.training.objectives import TransformerObjective
from t2v_ds.training.planning.subject import (
    stand_in_tokenizer,
    transformer_batch,
    transformer_objective,
    vqvae_batch,
    vqvae_objective,
)
from t2v_ds.training.planning.trace import Peak, Recorder, Trace, trace_step

PLACES = {0: "first", 1: "second", -1: "last", -2: "last but one"}


def period(run: TransformerRunConfig) -> int:
    """After how many layers the kinds of attention repeat."""
    return 2 if run.model.attention == "factorised" else 1


def trace_vqvae(run: VQVAERunConfig, clips: int) -> Trace:
    """Trace a micro-batch of so many clips."""

    def build() -> nn.Module:
        with unset_fake_temporarily():  # modules with fake parameters cannot be moved, as the perceptual network is while it is made
            objective = vqvae_objective(run)
        frozen = [module for network in objective.losses._perceptual for module in network.modules()]
        for module in (*objective.modules(), *frozen):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        objective.model.quantizer.started = torch.tensor(1)  # one whose value is known
        return objective

    return trace_step(build, lambda: vqvae_batch(run, clips), run.train.precision)


def trace_transformer(run: TransformerRunConfig, lengths: Sequence[int]) -> Trace:
    """Trace a micro-batch of clips of these lengths."""
    every = period(run)
    # The words' gradients of several layers are added up: how that is done, one layer does not show.
    few = (2 if run.model.conditioning == "cross" else 1) * every + run.model.layers % every
    if run.model.layers <= few + every:
        return _trace(run, run.model.layers, lengths)
    first, second = (_trace(run, layers, lengths) for layers in (few, few + every))
    return extrapolate(first, second, (run.model.layers - few) // every)


def extrapolate(first: Trace, second: Trace, steps: int) -> Trace:
    """The trace that lies `steps` times as far from the first as the second does."""

    def line(a: Any, b: Any) -> Any:
        if isinstance(a, dict):
            return {key: line(a[key], b[key]) for key in b}
        if isinstance(a, tuple):
            return tuple(line(*pair) for pair in zip(a, b, strict=True))
        if isinstance(a, Peak):
            return Peak(line(a.total, b.total), line(a.work, b.work), line(a.gradients, b.gradients))
        return a + (b - a) * steps

    values = {one.name: line(getattr(first, one.name), getattr(second, one.name)) for one in dataclasses.fields(Trace)}
    return Trace(**values)


def _trace(run: TransformerRunConfig, layers: int, lengths: Sequence[int]) -> Trace:
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=layers))
    tokenizer = stand_in_tokenizer(run.model.grid_size, run.model.codebook_size)

    def build() -> nn.Module:
        tokenizer.model.quantizer.codebook = torch.zeros(run.model.codebook_size, 1)  # fake, as all that is made here
        objective = transformer_objective(run, tokenizer)
        objective.tokenizer.clear()  # it is no part of what the GPU holds
        tokenizer.model.quantizer.codebook = torch.zeros(0)
        return objective

    every = period(run)
    return trace_step(
        build, lambda: transformer_batch(run, lengths), run.train.precision, lambda recorder, objective: _mark(recorder, objective, every)
    )


def _mark(recorder: Recorder, objective: nn.Module, every: int) -> None:
    """Name the phases of the step by hooks: tensors' hooks are called when the backward pass arrives at them."""
    assert isinstance(objective, TransformerObjective)
    blocks = list(objective.model.blocks)

    def mark(index: int) -> None:
        before_the_end = len(blocks) - index
        names = [f"backward of the {PLACES[number]} layer" for number in (index, -before_the_end) if -every <= number < every]

        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            out.register_hook(lambda gradient: recorder.enter(*names))

        blocks[index].register_forward_hook(hook)

    for index in range(len(blocks)):
        mark(index)

    def first(_: nn.Module, given: tuple[Any, ...]) -> None:
        given[0].register_hook(lambda gradient: recorder.enter("backward of the inputs"))

    blocks[0].register_forward_pre_hook(first)
    objective.model.head.register_forward_pre_hook(lambda *_: recorder.enter("head"))


def trace_cache(run: TransformerRunConfig) -> int:
    """Bytes of the keys and values that drawing a clip of the longest length keeps for a prompt, in fp32.

    Two rows a prompt: with guidance one with and one without its caption.
    """
    every, layers = period(run), run.model.layers
    few = every + layers % every
    bytes_of = {count: _cache_of_layers(run, count) for count in {every, few}}
    return bytes_of[few] + bytes_of[every] * ((layers - few) // every)


@torch.no_grad()
def _cache_of_layers(run: TransformerRunConfig, layers: int) -> int:
    config = dataclasses.replace(run.model, layers=layers)
    recorder = Recorder()
    with FakeTensorMode(), recorder:
        model = VideoTransformer(config).eval()
        words, rows = torch.zeros(2, run.text.tokens, config.width), torch.zeros(2, config.positions, config.width)
        before = recorder.alive
        caches = model.start_caches(words)
        for frame in range(config.max_frames):
            model.new_states(rows, words, caches, New(frame))
        return recorder.alive - before
