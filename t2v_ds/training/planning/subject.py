"""What is traced and timed: a run's objective and a micro-batch, made from settings alone, without data or a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from t2v_ds.config import QuantizerConfig, TransformerRunConfig, VQVAEConfig, VQVAERunConfig
from t2v_ds.models.facade import Tokenizer
from t2v_ds.models.text import HashingTextEncoder
from t2v_ds.models.vqvae import VQVAE
from t2v_ds.training.distributed import Collectives, Ranks
from t2v_ds.training.objectives import Clips, TransformerObjective, VQVAEObjective


def stand_in_tokenizer(grid_size: int, codebook_size: int) -> Tokenizer:
    """A tokenizer with this grid and codebook, as small as can be."""
    quantizer = QuantizerConfig(codebook_size=codebook_size, codebook_dim=8)
    config = VQVAEConfig(
        image_size=2 * grid_size, stem_channels=1, norm_groups=1, channel_multipliers=(1,), residual_blocks=(0,), quantizer=quantizer
    )
    return Tokenizer(VQVAE(config), "none", torch.device("cpu"))


def transformer_objective(run: TransformerRunConfig, tokenizer: Tokenizer) -> TransformerObjective:
    """The objective of `run`, whose model has `text_width` filled in."""
    text = HashingTextEncoder(run.text.tokens, run.model.text_width)
    return TransformerObjective(run, tokenizer, text, Clips(1, run.model.max_frames, 100), [])


def vqvae_objective(run: VQVAERunConfig) -> VQVAEObjective:
    """The objective of `run`, with a perceptual network of random weights, and quantizing from the first step on."""
    losses = dataclasses.replace(run.losses, perceptual_weights="random")
    alone = Collectives(Ranks(0, 0, 1, 1, "127.0.0.1", 0), torch.device("cpu"))
    size = run.model.image_size
    objective = VQVAEObjective(dataclasses.replace(run, losses=losses), alone, np.zeros((1, size, size, 3), np.uint8))
    objective.model.quantizer.started.fill_(1)
    return objective


def transformer_batch(run: TransformerRunConfig, lengths: Sequence[int]) -> dict[str, Any]:
    """A micro-batch of clips of these lengths, as `variation.join` and `run.train_transformer` make it."""
    model, clips, frames = run.model, len(lengths), sum(lengths)
    codes = torch.randint(model.codebook_size, (frames, model.grid_size, model.grid_size))
    passes = torch.zeros(frames, model.positions, dtype=torch.long) if model.decoding == "frame" else None
    return {
        "codes": codes,
        "lengths": list(lengths),
        "text": torch.zeros(clips, run.text.tokens, model.text_width),
        "mask": torch.ones(clips, run.text.tokens, dtype=torch.bool),
        "starts": [-1] * clips,
        "context": codes.clone() if run.replaces_context else None,
        "passes": passes,
        "last_given": [True] * clips if model.last_frame else None,
    }


def vqvae_batch(run: VQVAERunConfig, clips: int) -> dict[str, Any]:
    """A micro-batch of random frames of so many clips."""
    size = run.model.image_size
    return {"frames": torch.randint(256, (clips * run.frames_per_clip, size, size, 3), dtype=torch.uint8)}
