"""Sequence parallelism as DeepSpeed-Ulysses has it (Jacobs et al. 2023): ranks share the positions of clips.

    each rank: its rows of every frame, all heads -> all-to-all -> all rows, its heads -> attention -> all-to-all -> its rows

Everything but attention works position by position, so that activations are divided by the number of ranks. Attention along time needs
no exchange: a place's frames are on one rank. Losses are weighted so that the mean over all ranks, which is what DeepSpeed makes of
gradients, is the mean over the clips; its `mpu` argument is not used, under which gradients come out too large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from t2v_ds.config import TransformerConfig, require
from t2v_ds.models.attention import QKV
from t2v_ds.training.distributed import Collectives


class Ulysses:
    """`models.blocks.SequenceParallel` over groups of `size` successive ranks.

    Raises:
        ConfigError: heads or rows do not divide by `size` (the exchange would hang).
    """

    def __init__(self, collectives: Collectives, size: int, config: TransformerConfig) -> None:
        for name, value in (("heads", config.heads), ("kv_heads", config.kv_heads)):
            require(value % size == 0, f"model.{name}", value, f"multiples of train.sequence_parallel ({size})")
        allowed = f"those that divide the {config.side} rows of a frame's positions"
        require(config.side % size == 0, "train.sequence_parallel", size, allowed)
        self.size, self.rank = size, collectives.rank % size
        for first in range(0, collectives.world_size, size):  # every rank must make every group
            group = dist.new_group(list(range(first, first + size)))
            if first <= collectives.rank < first + size:
                self._group: Any = group

    def attend(self, attention: Callable[[QKV], Tensor], frames: QKV) -> Tensor:
        """See `models.blocks.SequenceParallel`: frames [S, F, P / size, heads, D]."""
        from deepspeed.sequence.layer import DistributedAttention

        shape = frames.q.shape[:2]

        def local(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:  # [S*F, P, heads / size, D]
            return attention(QKV(*(x.unflatten(0, shape) for x in (q, k, v)))).flatten(0, 1)

        exchange = DistributedAttention(local, self._group, scatter_idx=2, gather_idx=1)
        y: Tensor = exchange(*(x.flatten(0, 1) for x in frames), 0)
        return y.unflatten(0, shape)
