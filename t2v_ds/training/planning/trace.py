"""The real model's forward and backward pass, run on tensors that have shapes but no data.

    build the model (fake) -> forward -> loss -> backward,  every operator seen by one dispatch mode:
        new storage  -> + its bytes, until it is freed    -> peak
        matrix product, convolution, attention            -> + FLOPs

Nothing is derived by hand from the model: what autograd keeps, what checkpointing throws away, what autocast copies and what a
loss tile saves all show in which storages live. Models of many equal layers are traced with few of them, see `extrapolate`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from t2v_ds.training.optimizer import parameter_groups

aten = torch.ops.aten
# The CPU's flash attention has no formula in PyTorch's registry. Arguments before the causal flag: see native_functions.yaml.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: False,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: True,
}
LOW_PRECISION = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Peak:
    """Bytes that live at once, in a phase of the step."""

    total: int = 0  # with the gradients of parameters
    work: int = 0  # without them: where they are moved into DeepSpeed's buffers as they come
    gradients: int = 0  # of those that were there at the end


@dataclass
class Trace:
    """A micro-batch's forward and backward pass. Bytes do not hold the parameters themselves."""

    parameters: dict[str, int]  # numbers, by part of the model
    groups: tuple[int, ...]  # numbers, by parameter group of the optimizer
    low_precision: int  # numbers of the parameters whose gradients DeepSpeed sends in bf16
    largest: int  # numbers of the largest parameter
    frozen: int  # bytes of buffers and of frozen networks
    batch: int  # bytes
    saved: int  # bytes alive between forward and backward, the batch not counted
    peaks: dict[str, Peak]  # by phase
    flops: float  # of forward and backward without what is computed again, causal attention counted as the half that it computes
    attention_flops: float  # of these
    again_flops: float  # of what checkpointing computes again
    hidden: int = 0  # numbers of the matrices that Muon moves

    @property
    def total_parameters(self) -> int:
        """Numbers of all parts."""
        return sum(self.parameters.values())

    @property
    def peak(self) -> Peak:
        """The highest of all phases."""
        peaks = self.peaks.values()
        return Peak(*(max(values) for values in zip(*((one.total, one.work, one.gradients) for one in peaks), strict=True)))


def attention_flops(func: Any, args: tuple[Any, ...]) -> float:
    """FLOPs of the CPU's flash attention; of causal attention the part below the diagonal.

    Forward: 2 matrix products, backward: 5, for the scores are computed again (Dao et al. 2022).
    """
    backward = ATTENTION[func]
    shapes = [x.shape for x in args[: 4 if backward else 3]]
    queries, keys = shapes[-3][2], shapes[-2][2]
    causal = bool(args[7] if backward else args[4]) if len(args) > (7 if backward else 4) else False
    whole = sdpa_backward_flop_count(*shapes) if backward else sdpa_flop_count(*shapes)
    # PyTorch aligns the mask of its causal flag to the upper left corner.
    seen = sum(min(row + 1, keys) for row in range(queries)) / (queries * keys) if causal else 1.0
    return whole * seen


class Recorder(TorchDispatchMode):
    """Follows the bytes of all storages that operators make, and counts FLOPs.

    Attributes:
        phases: the names under which peaks are noted now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.gradients = 0
        self.peaks: dict[str, Peak] = {}
        self.flops = self.attention = self.again = 0.0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.phases: tuple[str, ...] = ("build",)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what a fake tensor is asked about itself
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                self._see(one)
        self._count(func._overloadpacket, args, kwargs, out)
        return out

    def _count(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if packet not in ATTENTION and packet not in flop_registry:
            return
        attention = packet in ATTENTION
        count = attention_flops(packet, args) if attention else flop_registry[packet](*args, **kwargs, out_val=out)
        # Checkpointing computes again with gradients switched on, inside a backward pass, which itself runs without.
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
            self.again += count
        else:
            self.flops += count
            self.attention += count * attention

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or (not isinstance(tensor, FakeTensor) and tensor.device.type == "meta"):
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.alive += size
        weakref.finalize(storage, self._gone, size)
        self._note()

    def _note(self) -> None:
        for phase in self.phases:
            peak = self.peaks.setdefault(phase, Peak())
            peak.total = max(peak.total, self.alive)
            peak.work = max(peak.work, self.alive - self.gradients)
            peak.gradients = self.gradients

    def _gone(self, size: int) -> None:
        self.alive -= size

    def gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is whole: from now on it is counted apart."""
        if parameter.grad is not None:
            self.gradients += parameter.grad.untyped_storage().nbytes()

    def enter(self, *phases: str) -> None:
        """Note peaks under other names from now on."""
        self.phases = phases
        self._note()


def count_parts(objective: nn.Module) -> dict[str, int]:
    """Trainable numbers of each part of the objective's model."""
    parts: dict[str, int] = {}
    for name, parameter in objective.named_parameters():
        part = name.removeprefix("model.").partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel() * parameter.requires_grad
    return parts


def low_precision_size(objective: nn.Module, precision: str) -> int:
    """Numbers whose gradients DeepSpeed sends in bf16: those of matrix products and convolutions (its runtime/torch_autocast.py)."""
    if precision != "bf16":
        return 0
    found = {id(p): p.numel() for module in objective.modules() if type(module) in LOW_PRECISION for p in module.parameters(False)}
    return sum(found.values())


def trace_step(
    build: Callable[[], nn.Module], batch: Callable[[], dict[str, Any]], precision: str,
    mark: Callable[[Recorder, nn.Module], None] | None = None,
) -> Trace:  # fmt: skip
    """Trace a micro-batch of an objective.

    Args:
        build: makes the objective; called with fake tensors.
        batch: makes what its forward pass is given.
        precision: "bf16" (autocast) or "fp32".
        mark: sets the recorder's phases by hooks in the objective.
    """
    recorder = Recorder()
    with FakeTensorMode(), recorder:
        objective = build().train()
        parameters = [p for p in objective.parameters() if p.requires_grad]
        size = sum(p.untyped_storage().nbytes() for p in parameters)
        frozen, before = recorder.alive - size, recorder.alive
        given = batch()
        brought = recorder.alive - before
        if mark is not None:
            mark(recorder, objective)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(recorder.gradient)
        recorder.enter("forward")
        recorder.flops = 0.0  # of drawing the first weights
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, metrics = objective(given)
        saved = recorder.alive - before - brought
        recorder.enter("backward of the head")
        loss.backward()
        del metrics
    del recorder.peaks["build"]
    peaks = {name: Peak(peak.total - before, peak.work - before, peak.gradients) for name, peak in recorder.peaks.items()}
    groups = tuple(sum(p.numel() for p in group["params"]) for group in parameter_groups(objective, 1.0))
    hidden = sum(p.numel() for group in parameter_groups(objective, 1.0, muon=True) if "rows" in group for p in group["params"])
    largest = max(p.numel() for p in parameters)
    return Trace(
        count_parts(objective), groups, low_precision_size(objective, precision), largest, frozen, brought, saved, peaks,
        recorder.flops, recorder.attention, recorder.again, hidden,
    )  # fmt: skip
