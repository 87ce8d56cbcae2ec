"""How well a transformer foretells clips: bits a code, which compare models whatever their way of decoding.

decoding "token": the negative log likelihood itself. Decoding "frame": of drawing the positions of each frame one by one in random order,
    -log p(frame) <= P * mean over k = 1 to P of the mean loss of k masked positions        (Uria et al. 2014; Hoogeboom et al. 2022)
an upper bound of the model's own, estimated with `STRATA` numbers k spread over 1 to P and random positions.

Every clip has its own random stream, seeded by its codes, so that its figure does not depend on the clips computed with it.
"""

from __future__ import annotations

import math
import zlib
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
    positions = model.config.positions
    streams = [torch.Generator().manual_seed(_digest(clip)) for clip in codes.split(list(lengths))]
    strata = min(STRATA, positions)
    total = torch.zeros(len(lengths), dtype=torch.float64, device=codes.device)
    for stratum in range(strata):
        masks = [_mask(length, positions, stratum, strata, stream) for length, stream in zip(lengths, streams, strict=True)]
        masked = torch.cat(masks).to(codes.device)
        total += model(codes, lengths, text, mask, None, None, masked).codes.double()
    return total / strata / math.log(2)


def _digest(codes: Tensor) -> int:
    return zlib.crc32(codes.to("cpu", torch.int32).contiguous().numpy().tobytes())


def _mask(length: int, positions: int, stratum: int, strata: int, stream: torch.Generator) -> Tensor:
    """Which positions of a clip's frames are masked: bool [T, P], equally many in each frame."""
    within = float(torch.rand((), generator=stream))
    count = 1 + int((stratum + within) / strata * positions)  # uniform in 1 to P over the strata
    return torch.rand(length, positions, generator=stream).argsort(1).argsort(1) < count
