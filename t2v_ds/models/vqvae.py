"""The residual VQ-VAE: a frame <-> a grid of codes (van den Oord et al. 2017; residual blocks as in He et al. 2016).

    uint8 [N, H, W, 3] -> [-1, 1] -> encoder -> latents [N, D, h, w] -> quantizer -> codes [N, h, w]
                                                                                  -> vectors -> decoder -> [N, 3, H, W]

Codes alone decode: residual connections live inside the encoder and inside the decoder, and none crosses the
quantizer. Pixels are scaled in one place (`scale_pixels`), because the model takes uint8 and nothing else.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from t2v_ds.config import VQVAEConfig
from t2v_ds.models.quantizer import Quantizer, QuantizerOutput


def scale_pixels(frames: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in 0..1. The only place where pixels are divided by 255."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [N, H, W, 3]")
    return frames.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def rms_norm(latents: Tensor) -> Tensor:
    """[N, D, h, w] -> the same with mean square 1 over D."""
    return latents * latents.square().mean(1, keepdim=True).add(1e-6).rsqrt()


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), GroupNorm because per-rank batch statistics would differ."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C, h, w]."""
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        y = self.conv2(nn.functional.silu(self.norm2(y)))
        return x + y


def _init(module: nn.Module) -> None:
    """Variance-preserving convolutions without bias; residual branches start at zero.

    With PyTorch's default (a third of the variance a layer, random biases) the latents of all images begin almost
    equal, and the codebook collapses before the encoder has learned to tell them apart.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, ResidualBlock):  # applied after its convolutions
        nn.init.zeros_(module.conv2.weight)


def build_encoder(config: VQVAEConfig) -> nn.Sequential:
    """[N, 3, H, W] in -1..1 -> latents [N, D, H/f, W/f], f = config.downsampling."""
    widths = [config.stem_channels * m for m in config.channel_multipliers]
    layers: list[nn.Module] = []
    kernel, padding = (2, 0) if config.patch_encoder else (4, 1)
    for before, width, blocks in zip([3, *widths[:-1]], widths, config.residual_blocks, strict=True):
        layers.append(nn.Conv2d(before, width, kernel, stride=2, padding=padding))
        layers += [ResidualBlock(width, config.norm_groups) for _ in range(0 if config.patch_encoder else blocks)] or [nn.SiLU()]
    layers.append(nn.Conv2d(widths[-1], config.quantizer.codebook_dim, 1))
    return nn.Sequential(*layers)


def build_decoder(config: VQVAEConfig) -> nn.Sequential:
    """Codebook rows [N, D, h, w] -> pixels [N, 3, h*f, w*f], about 0..1."""
    widths = [config.stem_channels * m for m in reversed(config.channel_multipliers)]
    blocks = list(reversed(config.residual_blocks))
    layers: list[nn.Module] = [nn.Conv2d(config.quantizer.codebook_dim, widths[0], 3, padding=1)]
    layers += [ResidualBlock(widths[0], config.norm_groups) for _ in range(blocks[0])]
    for (before, width), count in zip(pairwise(widths), blocks[1:], strict=True):
        layers += [nn.Conv2d(before, width * 4, 3, padding=1), nn.PixelShuffle(2)]
        layers += [ResidualBlock(width, config.norm_groups) for _ in range(count)]
    layers += [nn.SiLU(), nn.Conv2d(widths[-1], 3 * 4, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder; see the module's docstring."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.quantizer = Quantizer(config.quantizer)
        self.decoder = build_decoder(config)
        self.apply(_init)

    def forward(self, frames: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """uint8 [N, H, W, 3] -> reconstruction [N, 3, H, W] (about 0..1) and what the quantizer did."""
        quantized = self.quantizer(self.latents(frames))
        return self.decode_vectors(quantized.quantized), quantized

    def latents(self, frames: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> latents [N, D, h, w]."""
        size = self.config.image_size
        if frames.shape[1:3] != (size, size):
            raise ValueError(f"frames are {frames.shape[1]} x {frames.shape[2]} pixels; this model takes {size} x {size}")
        x = scale_pixels(frames).mul_(2).sub_(1).contiguous(memory_format=torch.channels_last)
        # Latents of unit scale: otherwise the encoder can lower the commitment loss by shrinking them all, and the
        # codebook collapses to a few codes.
        latents: Tensor = rms_norm(self.encoder(x).float())
        return latents

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> codes int64 [N, h, w]."""
        return self.quantizer.lookup(self.latents(frames))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [N, h, w] -> pixels [N, 3, H, W], about 0..1."""
        return self.decode_vectors(self.quantizer.vectors(codes))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Codebook rows [N, D, h, w] -> pixels [N, 3, H, W] fp32, about 0..1."""
        pixels: Tensor = self.decoder(vectors.contiguous(memory_format=torch.channels_last))
        return pixels.float()


def to_pixels(images: Tensor) -> Tensor:
    """Float [N, 3, H, W], about 0..1 -> uint8 [N, H, W, 3]."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
