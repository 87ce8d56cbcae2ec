"""How well a transformer foretells clips: bits a code, which compare models whatever their way of decoding.

The negative log likelihood itself: with decoding "token" in raster order; with decoding "frame" of telling the positions of each frame one
by one in a random order, which takes one forward pass as well. (The mean over orders is an upper bound of the log likelihood of their
mixture: Uria et al. 2014.) Drawing in few passes is less exact than that by what positions of one pass do not know of each other.

Every clip has its own random orders, seeded by its codes, so that its figure does not depend on the clips computed with it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from t2v_ds.models.transformer import VideoTransformer


@torch.no_grad()
def bits_per_code(model: VideoTransformer, codes: Tensor, lengths: Sequence[int], text: Tensor, mask: Tensor) -> Tensor:
    """Bits a code of whole clips, the mean over each clip's codes: fp64 [B]; arguments as `VideoTransformer.forward` takes them."""
    passes = None
    if model.config.decoding == "frame":
        passes = torch.cat([_orders(clip, model.config.positions) for clip in codes.split(list(lengths))]).to(codes.device)
    nats: Tensor = model(codes, lengths, text, mask, passes=passes).codes
    return nats.double() / math.log(2)


def _orders(codes: Tensor, positions: int) -> Tensor:
    """When the positions of a clip's frames are told: int64 [T, P], a permutation each."""
    seed = zlib.crc32(codes.to("cpu", torch.int32).contiguous().numpy().tobytes())
    return torch.rand(len(codes), positions, generator=torch.Generator().manual_seed(seed)).argsort(1)
