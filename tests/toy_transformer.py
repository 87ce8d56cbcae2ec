"""A small transformer with large weights, so that whatever it can see, it shows; and what it computes in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2v_ds.config import TransformerConfig
from t2v_ds.models.transformer import VideoTransformer

K, TEXT, LONGEST = 13, 5, 6


def make(group: int = 2, seed: int = 0, std: float = 0.4, end: float | None = None, **settings: Any) -> VideoTransformer:
    """`end`: what the model always says about ending."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "max_frames": LONGEST, "grid_size": 4, "codebook_size": K}
    model = VideoTransformer(TransformerConfig(group=group, text_width=TEXT, **{**values, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
        if end is not None:
            model.end.weight.zero_()
            model.end.bias.fill_(end)
    return model.eval()


def captions(b: int, words: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(b, words, TEXT, generator=generator)
    mask = torch.arange(words)[None] < torch.randint(1, words + 1, (b, 1), generator=generator)
    return text * mask[..., None], mask


@torch.no_grad()
def predictions(model: VideoTransformer, codes: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of clips of one length: logits [B, T*P*G, K] of the codes in order, and [B, T + 1] of the ends."""
    slots: list[Tensor] = []
    ends: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: slots.append(out)) for layer in model.head.logits]
    hooks.append(model.end.register_forward_hook(lambda _, __, out: ends.append(out)))
    b, t = codes.shape[:2]
    model(codes, torch.full((b,), t), text, mask)
    for hook in hooks:
        hook.remove()
    frames, clips = ends  # before each frame, and behind the last
    return torch.stack(slots, dim=1).view(b, -1, K), torch.cat([frames.view(b, t), clips.view(b, 1)], dim=1)
