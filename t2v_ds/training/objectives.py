"""The two models with everything that training them takes: what the engine wraps.

    VQVAEObjective        frames -> reconstruction -> losses;  after each step the codebook's statistics
    TransformerObjective  codes, lengths, text, mask -> negative log likelihood;  shows clips drawn for a few prompts
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2v_ds.config import SamplingConfig, TransformerRunConfig, VQVAERunConfig
from t2v_ds.data.gif import encode_gif
from t2v_ds.losses import VQVAELosses
from t2v_ds.models.exported import export_model
from t2v_ds.models.facade import Tokenizer, export_tokenizer, generator_config
from t2v_ds.models.sampling import sample_codes
from t2v_ds.models.text import TextEncoder
from t2v_ds.models.transformer import VideoTransformer
from t2v_ds.models.vqvae import VQVAE, scale_pixels, to_pixels
from t2v_ds.training.distributed import Collectives
from t2v_ds.training.engine import Engine
from t2v_ds.training.loop import Objective
from t2v_ds.training.monitor import Monitor

END_WEIGHT = 0.1  # of "does the clip end here", one decision a frame, beside the hundreds of codes of a frame


def _own_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `objective.model` out of the objective's."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


class VQVAEObjective(Objective):
    """The VQ-VAE and its losses.

    Args:
        config: of the run.
        collectives: sum the codebook's statistics over the ranks.
        examples: uint8 [N, H, W, 3], reconstructed in TensorBoard.
    """

    def __init__(self, config: VQVAERunConfig, collectives: Collectives, examples: np.ndarray) -> None:
        super().__init__()
        self.seed = config.seed
        self.model = VQVAE(config.model)
        self.model.quantizer.collectives = collectives
        self.losses = VQVAELosses(config.losses, config.model.quantizer.learning)
        self.examples = torch.from_numpy(examples)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """{"frames": uint8 [N, H, W, 3]} -> (loss, losses by name and PSNR)."""
        reconstruction, quantized = self.model(batch["frames"])
        target = scale_pixels(batch["frames"])
        total, values = self.losses(reconstruction, target, quantized)
        metrics = {f"loss/{name}": value for name, value in values.items()}
        squared = (reconstruction.detach().clamp(0, 1) - target).square().mean(dim=(1, 2, 3))
        metrics["quality/psnr"] = (-10 * squared.clamp_min(1e-10).log10()).mean()
        return total, metrics

    def initialise(self, batch: dict[str, Any], engine: Engine) -> None:
        """Without a warm-up, and without a codebook to start from: set it from the first micro-batch."""
        if self.model.quantizer.config.warmup_steps or self.model.quantizer.started:
            return
        with torch.no_grad(), engine.autocast():
            engine.forward(batch)
        self.model.quantizer.initialise(0, self.seed, engine)

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        """Move the codebook and revive dead codes."""
        values = self.model.quantizer.update(step, self.seed, engine)
        return {f"codebook/{name}": value for name, value in values.items()}

    def discard_step(self) -> None:
        self.model.quantizer.discard()

    def visualise(self, step: int, engine: Engine, monitor: Monitor) -> None:
        """A grid: originals above their reconstructions from codes alone."""
        if not self.model.quantizer.started:
            return
        self.model.eval()
        examples = self.examples.to(engine.device)
        with engine.full_parameters(), torch.no_grad(), engine.autocast():
            seen = to_pixels(self.model.decode(self.model.encode(examples)))
        monitor.image("reconstruction", reconstruction_grid(examples.cpu().numpy(), seen.cpu().numpy()), step)

    def export(self, folder: Path, state: dict[str, Tensor]) -> None:
        export_tokenizer(folder, self.model.config, _own_state(state))


def reconstruction_grid(originals: np.ndarray, reconstructions: np.ndarray, columns: int = 8) -> np.ndarray:
    """Rows of originals, each above its row of reconstructions: uint8 [N, H, W, 3] twice -> uint8 [rows*2*H, columns*W, 3]."""
    rows = []
    for start in range(0, len(originals) - len(originals) % columns or len(originals), columns):
        for frames in (originals, reconstructions):
            rows.append(np.concatenate(list(frames[start : start + columns]), axis=1))
    return np.concatenate(rows, axis=0)


@dataclass
class Clips:
    """What the generator must know of the clips that it was trained on."""

    min_frames: int
    max_frames: int
    frame_duration_ms: int


class TransformerObjective(Objective):
    """The transformer and its likelihood.

    Args:
        config: of the run, with the model's settings filled in from the data.
        tokenizer: decodes what is shown, and is kept with the exported generator.
        text: the frozen encoder.
        clips: bounds that the generator keeps to.
        prompts: shown in TensorBoard.
    """

    def __init__(
        self, config: TransformerRunConfig, tokenizer: Tokenizer, text: TextEncoder, clips: Clips, prompts: Sequence[str]
    ) -> None:
        super().__init__()
        self.model = VideoTransformer(config.model)
        self.model.initialise_codes(tokenizer.model.quantizer.codebook)
        self.config, self.clips, self.prompts = config, clips, list(prompts)
        self.text, self.tokenizer = text, [tokenizer]  # in a list: frozen, and no part of what is trained

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """What `variation.join` returns, with "text": [B, W, D] and "mask": [B, W] -> (loss, losses by name)."""
        losses = self.model(
            batch["codes"], batch["lengths"], batch["text"], batch["mask"], batch["starts"], batch["context"], batch["passes"],
            batch["last_given"],
        )  # fmt: skip
        codes, end, z = (one.mean() for one in losses)
        metrics = {"loss/codes": codes.detach(), "loss/end": end.detach(), "quality/bits_per_code": codes.detach() / math.log(2)}
        return codes + END_WEIGHT * end + self.config.z_loss * z, metrics

    def visualise(self, step: int, engine: Engine, monitor: Monitor) -> None:
        """A clip a prompt."""
        self.model.eval()
        with engine.full_parameters():  # all ranks take part; rank 0 draws
            if engine.collectives.rank == 0 and self.prompts:
                text, mask = (one.to(engine.device) for one in self.text.encode(self.prompts))
                with engine.autocast():
                    drawn = sample_codes(self.model, text, mask, SamplingConfig(), self.clips.min_frames, self.clips.max_frames)
                for prompt, codes in zip(self.prompts, drawn, strict=True):
                    frames = self.tokenizer[0].decode(codes.cpu().numpy())
                    monitor.clip(f"generated/{prompt}", encode_gif(frames, [self.clips.frame_duration_ms] * len(frames)), step)

    def export(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the generator, with its tokenizer in a folder of its own inside."""
        tokenizer = self.tokenizer[0]
        tokenizer.export_beside(folder)
        config = generator_config(
            self.config.model, self.config.text, self.text.identity(), tokenizer.tokenizer_id,
            self.clips.min_frames, self.clips.max_frames, self.clips.frame_duration_ms,
        )  # fmt: skip
        export_model(folder, config, _own_state(state))
