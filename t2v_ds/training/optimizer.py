"""What the optimizer is given: the learning rate of a step, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from t2v_ds.config import TrainConfig


def learning_rate_at(step: int, train: TrainConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0): linear warm-up, then a cosine to the end or constant."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    done = min(1.0, (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps))
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(objective: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: weight decay on matrices and kernels only, none on biases, norms and embeddings."""
    embeddings = {id(module.weight) for module in objective.modules() if isinstance(module, nn.Embedding)}
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if matrix else others).append((name, parameter))
    groups = [(decayed, weight_decay), (others, 0.0)]
    return [
        {"params": [parameter for _, parameter in group], "names": [name for name, _ in group], "weight_decay": decay}
        for group, decay in groups
        if group
    ]
