"""State of a position -> logits of its codes, slot after slot, each slot given the ones before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2v_ds.config import TransformerConfig
from t2v_ds.models.blocks import RMSNorm

TIED_SCALE = 1 / 6  # embeddings start as loud as the other inputs; logits of that size would be sure of everything


def _mixer(width: int, ratio: int) -> nn.Sequential:
    """How a state is changed for a slot: one layer, or with `ratio` two, with so many widths of hidden units between them."""
    first = nn.Linear(width, max(1, ratio) * width, bias=False)
    second = [nn.Linear(ratio * width, width, bias=False)] if ratio else []
    return nn.Sequential(first, nn.GELU(approximate="tanh"), *second)


class GroupHead(nn.Module):
    """See the module's docstring.

    Args:
        config: of the transformer.
        tables: the embeddings of the codes, one a slot, with which logits share their weights where the head is tied.
    """

    def __init__(self, config: TransformerConfig, tables: nn.ModuleList) -> None:
        super().__init__()
        self.slots, self.tile = config.slots, config.loss_tile
        self.gathered_at_once = self.tile > 0  # ranks have different numbers of tiles; an engine that partitions parameters must know
        self.scale = TIED_SCALE if config.tied_head else 1.0
        width = config.width
        self.given = nn.ModuleList(nn.Embedding(config.codebook_size, width) for _ in range(self.slots - 1))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(self.slots))
        self.mixers = nn.ModuleList(_mixer(width, config.head_ratio) for _ in range(self.slots))
        self.logits = nn.ModuleList(nn.Linear(width, config.codebook_size) for _ in range(self.slots))
        layers = (0, 2) if config.head_ratio else (0,)
        self.hidden_matrices: dict[str, list[int]] = {f"mixers.{i}.{j}": [] for i in range(self.slots) for j in layers}
        if config.tied_head:
            for table, logits in zip(tables, self.logits, strict=True):
                logits.weight = table.weight

    def slot(self, state: Tensor, index: int) -> Tensor:
        """State [N, width], with the codes of earlier slots added by `add` -> logits [N, K] of slot `index`."""
        y = self.norms[index](state)
        logits: Tensor = self.logits[index]((y + self.mixers[index](y)) * self.scale)
        return logits

    def add(self, state: Tensor, index: int, codes: Tensor) -> Tensor:
        """State [N, width] after slot `index` turned out to be codes [N]."""
        if index >= len(self.given):
            return state
        added: Tensor = state + self.given[index](codes)
        return added

    def forward(self, state: Tensor, targets: Tensor) -> Tensor:
        """State [N, width], targets [N, G] -> negative log likelihood in nats, and log(sum(exp(logits)))^2: [2, N, G].

        With `loss_tile` the logits of so many positions exist at a time, also in the backward pass.
        """
        if not self.tile or len(state) <= self.tile:
            return self._losses(state, targets)
        parts = [
            checkpoint(self._losses, part, target, use_reentrant=False)
            for part, target in zip(state.split(self.tile), targets.split(self.tile), strict=True)
        ]
        return torch.cat(parts, dim=1)  # type: ignore[arg-type]

    def _losses(self, state: Tensor, targets: Tensor) -> Tensor:
        losses = []
        for index in range(self.slots):
            logits = self.slot(state, index).float()
            log_sum = logits.logsumexp(-1)
            losses.append(torch.stack([log_sum - logits.gather(1, targets[:, index, None]).squeeze(1), log_sum.square()]))
            state = self.add(state, index, targets[:, index])
        return torch.stack(losses, dim=2)
