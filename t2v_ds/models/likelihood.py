"""How well a transformer foretells clips: bits a code, which compare models whatever their way of decoding.

decoding "token": the negative log likelihood itself. Decoding "frame": of drawing the positions of each frame one by one in random order,
    -log p(frame) <= P * mean over k = 1 to P of the mean loss of k masked positions        (Uria et al. 2014; Hoogeboom et al. 2022)
an upper bound of the model's own, estimated with `STRATA` numbers k spread over 1 to P and random positions from a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from t2v_ds.models.transformer import VideoTransformer

STRATA = 8


@torch.no_grad()
def bits_per_code(model: VideoTransformer, codes: Tensor, lengths: Sequence[int], text: Tensor, mask: Tensor) -> Tensor:
    """Bits a code of whole clips, the mean over each clip's codes: fp64 [B]; arguments as `VideoTransformer.forward` takes them."""
    if model.config.decoding == "token":
        return model(codes, lengths, text, mask).codes.double() / math.log(2)  # type: ignore[no-any-return]
    generator, positions = torch.Generator().manual_seed(0), model.config.positions
    strata = min(STRATA, positions)
    total = torch.zeros(len(lengths), dtype=torch.float64, device=codes.device)
    for stratum in range(strata):
        within = float(torch.rand((), generator=generator))
        count = 1 + int((stratum + within) / strata * positions)  # uniform in 1 to P over the strata
        ranks = torch.rand(len(codes), positions, generator=generator).argsort(1).argsort(1)
        masked = (ranks < count).to(codes.device)
        total += model(codes, lengths, text, mask, None, None, masked).codes.double()
    return total / strata / math.log(2)
