"""The optimizer and what it is given: the learning rate of a step, and which parameters decay or are orthogonalised."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from t2v_ds.config import TrainConfig
from t2v_ds.errors import ConfigError

MOMENTUM = 0.95
ADAM_SCALE = 0.2  # root mean square of an update of AdamW
AT_A_TIME = 2**24  # numbers of matrices that are made orthogonal together: many small ones take a CPU's cores better than one
_SAFETY = 1.01  # against rounding in bf16, as in the paper's own code
COEFFICIENTS = [
    (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
    for a, b, c in ((8.28721, -23.59589, 17.30039), (4.10706, -2.94785, 0.54484), (3.94869, -2.90890, 0.55182))
]


def learning_rate_at(step: int, train: TrainConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0): linear warm-up, then a cosine to the end or constant."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    done = min(1.0, (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps))
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(objective: nn.Module, weight_decay: float, muon: bool = False) -> list[dict[str, Any]]:
    """Split the trainable parameters: weight decay on matrices and kernels only, none on biases, norms and embeddings.

    With `muon` those in the modules' `hidden_matrices` are a group of their own, the first one: its "rows" say which matrices lie one
    above the other in a weight, and are empty where it is one. `hidden_matrices` maps a layer's name in its module to them.
    """
    embeddings = {id(module.weight) for module in objective.modules() if isinstance(module, nn.Embedding)}
    hidden = _hidden_matrices(objective) if muon else {}
    groups: list[dict[str, Any]] = [{"params": [], "names": [], "weight_decay": decay} for decay in (weight_decay, weight_decay, 0.0)]
    first, decayed, others = groups
    first["rows"] = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            group = first if id(parameter) in hidden else decayed if matrix else others
            group["params"].append(parameter)
            group["names"].append(name)
            if group is first:
                group["rows"].append(hidden[id(parameter)])
    return [group for group in groups if group["params"]]


def _hidden_matrices(objective: nn.Module) -> dict[int, list[int]]:
    named = ((module, name, rows) for module in objective.modules() for name, rows in getattr(module, "hidden_matrices", {}).items())
    return {id(module.get_submodule(name).weight): rows for module, name, rows in named}


def adamw(groups: list[dict[str, Any]], train: TrainConfig, fused: bool | None) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) of all groups."""
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(train.betas[0], train.betas[1]), fused=fused)


class Muon(torch.optim.Optimizer):
    """Muon for the group of hidden matrices, AdamW for the others.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by its momentum made orthogonal, so that no
    direction waits for another. Scaled as by Liu et al. 2025 ("Muon is scalable for LLM training", section 2.2) a step is as large as
    one of AdamW and both take one learning rate. torch's own Muon takes no kernels of convolutions, and would take the queries, keys
    and values of a layer for one matrix.
    """

    def __init__(self, groups: list[dict[str, Any]], train: TrainConfig, fused: bool | None) -> None:
        """`groups`: what `parameter_groups` returns. Raises ConfigError where none of them has hidden matrices."""
        if "rows" not in groups[0]:
            raise ConfigError("setting 'train.optimizer' is 'muon', but this model has no layers whose matrices it moves; allowed: 'adamw'")
        super().__init__(groups, {"lr": train.learning_rate})
        self._computed_in = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self._others = adamw(self.param_groups[1:], train, fused)
        self._share()

    def _share(self) -> None:
        self._others.state, self._others.param_groups = self.state, self.param_groups[1:]

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a checkpoint
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch's also takes a closure that computes the loss, of which we have none
        """Move the weights."""
        group, waiting = self.param_groups[0], defaultdict[torch.Size, list[tuple[Tensor, Tensor]]](list)
        for parameter, rows in zip(group["params"], group["rows"], strict=True):
            if parameter.grad is None:
                continue
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            for pair in zip(_matrices(parameter, rows), _matrices(self._update(parameter), rows), strict=True):
                alike = waiting[pair[0].shape[1:]]
                alike.append(pair)
                if sum(own.numel() for own, _ in alike) >= AT_A_TIME:
                    self._move(alike, group["lr"])
                    alike.clear()
        for alike in waiting.values():
            self._move(alike, group["lr"])
        self._others.step()

    def _update(self, parameter: Tensor) -> Tensor:
        """Nesterov's momentum."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM), MOMENTUM)

    def _move(self, pairs: list[tuple[Tensor, Tensor]], learning_rate: float) -> None:
        """Move matrices [N, rows, columns] of one size by their updates."""
        if not pairs:
            return
        updates = orthogonal(torch.cat([update.to(self._computed_in) for _, update in pairs]))
        for (own, _), update in zip(pairs, updates.split([len(own) for own, _ in pairs]), strict=True):
            own.sub_(update, alpha=learning_rate * ADAM_SCALE * max(own.shape[1:]) ** 0.5)


def _matrices(weight: Tensor, rows: list[int]) -> list[Tensor]:
    """Views [N, rows, columns] of a weight [rows, columns] or of a kernel [rows, columns, height, width], which has one a place."""
    if weight.ndim > 2:
        return [weight.flatten(2).permute(2, 0, 1)]
    return [part[None] for part in weight.split(rows or len(weight))]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] -> near their nearest orthogonal ones: the singular values are brought near 1.

    By an iteration of Newton and Schulz of degree 5 with the coefficients of Amsel et al. 2025 ("The Polar Express", appendix), which
    are the best that so few steps can have.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in COEFFICIENTS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
