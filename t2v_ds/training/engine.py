"""The one place that calls DeepSpeed: an objective + settings -> an engine whose steps are exact at every ZeRO stage.

    objective (its parameters, buffers)  -> broadcast from rank 0 -> deepspeed.initialize(AdamW or Muon, ds_config)
    micro-batch -> forward (the whole loss) -> backward -> step (learning rate set, clipped, skipped when not finite)

Parameters live in up to three places: the module (whole at stages 0 to 2, partitioned at 3), DeepSpeed's fp32 master
copy (partitioned at stages 1 to 3) and the optimizer's moments. `read_parameter`, `write_rows`, `write_parameter` and
`write_moments` keep the three together; change a parameter through them only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2v_ds.config import TrainConfig
from t2v_ds.errors import ConfigError
from t2v_ds.training.distributed import Collectives
from t2v_ds.training.ds_config import complete_ds_config, zero_stage
from t2v_ds.training.optimizer import Muon, adamw, learning_rate_at, parameter_groups

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
MOMENTUM = ("momentum_buffer",)  # Muon's


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, without its CPU operators that take minutes to compile on first use."""
    warnings.filterwarnings("ignore", module=r"deepspeed.*")
    import deepspeed

    # Not its set_log_level_from_string, which also changes handlers that others have put on its logger.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # JIT-builds for minutes, only inference uses it
    return deepspeed


class Engine:
    """DeepSpeed around an objective. All methods are collective: every rank calls them in the same order."""

    def __init__(self, objective: nn.Module, train: TrainConfig, seed: int, collectives: Collectives, total_steps: int) -> None:
        """Move the objective to the device, copy rank 0's values to all ranks and start DeepSpeed.

        Raises:
            ConfigError: a DeepSpeed file or batch that does not fit (see `complete_ds_config`).
        """
        self.train_config = train
        self.seed = seed
        self.collectives = collectives
        self.device = collectives.device
        self.total_steps = total_steps
        self.ds_config = complete_ds_config(train, collectives.world_size)
        self.stage = zero_stage(self.ds_config)
        self.micro_batch = int(self.ds_config["train_micro_batch_size_per_gpu"])
        self.accumulation = int(self.ds_config["gradient_accumulation_steps"])
        self.objective = objective.to(self.device)
        self._broadcast_values()
        groups = parameter_groups(objective, train.weight_decay, muon=train.optimizer == "muon")
        if not groups:
            raise ConfigError("the model has no trainable parameter")
        self.group_names: list[list[str]] = [group.pop("names") for group in groups]
        self._hidden = {id(parameter) for group in groups if "rows" in group for parameter in group["params"]}
        self._names = {id(parameter): name for name, parameter in objective.named_parameters()}
        # Left to choose, torch goes over the parameters once an operation on the CPU, a dozen times in all.
        self.fused = True if self.device.type == "cpu" else None
        self.native = self._start((Muon if train.optimizer == "muon" else adamw)(groups, train, self.fused))
        self._norm: Tensor | None = None

    def _start(self, optimizer: torch.optim.Optimizer) -> Any:
        deepspeed = import_deepspeed()
        self._check_zero_section()
        deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False)
        config = dict(self.ds_config)
        if self.stage == 0:
            # There DeepSpeed clips without telling the norm and steps on NaN (it would reach the weights): `step` does both.
            config["gradient_clipping"] = 0.0
        if self.train_config.precision == "fp32":
            config.pop("torch_autocast")
        config = json.loads(json.dumps(config))  # DeepSpeed changes what it is given
        self._keep_whole_in_steps(deepspeed)
        native, *_ = deepspeed.initialize(model=self.objective, optimizer=optimizer, config=config)
        if self.train_config.compile:
            native.compile()
        return native

    def _keep_whole_in_steps(self, deepspeed: Any) -> None:
        # Stage 3 frees a parameter behind its module's forward pass, and finds what else uses it only if it happens to be
        # freed already; a loss that reads it later then fails in backward. Owned by the root as well, it stays for the step.
        if self.stage == 3:
            for module in self.objective.modules():
                for name in getattr(module, "used_outside_forward", ()):
                    if name in module._parameters:
                        deepspeed.zero.register_external_parameter(self.objective, module.get_parameter(name))
                # One gather before all that is within: how often that is called may differ between the ranks, whose gathers must not.
                if getattr(module, "gathered_at_once", False):
                    deepspeed.utils.set_z3_leaf_module(module, True)

    def _check_zero_section(self) -> None:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

        try:
            DeepSpeedZeroConfig(**self.ds_config.get("zero_optimization", {}))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["zero_optimization", *(str(part) for part in first["loc"])])
            raise ConfigError(f"'{where}' in DeepSpeed file '{self.train_config.ds_config}': {first['msg']}") from error

    def _broadcast_values(self) -> None:
        # DeepSpeed broadcasts parameters but no buffers, and an EMA codebook is a buffer.
        for tensor in [*self.objective.parameters(), *self.objective.buffers()]:
            self.collectives.broadcast_(tensor.data)

    # -- the step ---------------------------------------------------------------------------------------------------

    def to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Move a batch's tensors to the device; other values stay as they are."""
        return {key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of `forward`, for calls of modules outside it (sampling, visuals)."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.train_config.precision == "bf16")

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar) and metrics of one micro-batch. A loss that is not finite is turned into NaN.

        NaN reaches every gradient of every rank through the reduction, so that all ranks skip this step together
        without a further exchange.
        """
        loss, metrics = self.native(self.to_device(batch))
        return torch.where(torch.isfinite(loss), loss, torch.full_like(loss, math.nan)), metrics

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch."""
        self.native.backward(loss)

    def step(self, step: int, last: bool = True) -> bool:
        """Finish a micro-batch and, when it is the `last` of optimizer step `step` (counted from 0), move the weights.

        Returns:
            Whether the weights moved: False where the gradient was not finite, on all ranks alike.
        """
        if last:
            for group in self.native.optimizer.param_groups:
                group["lr"] = learning_rate_at(step, self.train_config, self.total_steps)
            if self.stage == 0 and not self._clip_gradients():
                self.native.zero_grad()
                self.native.micro_steps += 1  # else DeepSpeed's accumulation would be out of step with ours
                return False
        self.native.step()
        if last and self.stage > 0:
            return not self.native.optimizer.overflow
        return True

    def _clip_gradients(self) -> bool:
        # The gradients are already reduced, so every rank computes the same norm and takes the same branch.
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(self._norm.item()):
            return False
        limit = self.train_config.gradient_clip
        if limit > 0:
            torch._foreach_mul_(gradients, torch.clamp(limit / (self._norm + 1e-6), max=1.0))
        return True

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last step, before clipping; inf or NaN when that step was skipped."""
        norm = self._norm if self.stage == 0 else self.native.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    # -- reading and writing parameters -----------------------------------------------------------------------------

    def _gathered(self, parameters: list[nn.Parameter], modified: bool = False) -> contextlib.AbstractContextManager[Any]:
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        context: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if modified else None
        )
        return context

    @contextlib.contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Within it every parameter is whole on every rank: modules may be called directly, under `torch.no_grad`.

        All ranks enter and leave; what they do within it is theirs, and may be nothing.
        """
        with self._gathered(list(self.objective.parameters())), self._without_hooks():
            yield

    @contextlib.contextmanager
    def _without_hooks(self) -> Iterator[None]:
        # At stage 3 DeepSpeed's hooks would free each parameter behind its module and gather it again at the next call: a
        # rank that draws while the others wait would hang there.
        if self.stage < 3:
            yield
            return
        modules = list(self.objective.modules())
        hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
        for module in modules:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for module, (before, after) in zip(modules, hooks, strict=True):
                module._forward_pre_hooks, module._forward_hooks = before, after

    @torch.no_grad()
    def read_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter in fp32, as a copy on the device, on every rank."""
        if self.stage < 3:
            return parameter.detach().float().clone()
        if parameter.requires_grad:  # the fp32 master copy: under bf16 what is gathered may be rounded
            from deepspeed.utils import safe_get_full_fp32_param

            whole: Tensor = safe_get_full_fp32_param(parameter)
            return whole.detach().to(self.device, copy=True).view(self.shape(parameter))
        with self._gathered([parameter]):
            return parameter.detach().float().clone()

    @staticmethod
    def shape(parameter: nn.Parameter) -> torch.Size:
        """The whole shape of a parameter, also where it is partitioned."""
        shape: torch.Size = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
        return shape

    @torch.no_grad()
    def write_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a whole parameter (`value`: its full shape), in the module and in the fp32 master copy, to rank 0's `value`."""
        value = self.collectives.broadcast_(value.detach().to(self.device, torch.float32, copy=True).contiguous())
        with self._gathered([parameter], modified=True):
            parameter.data.copy_(value)
        if parameter.requires_grad and self.stage > 0:
            self._write_master(parameter, value, None)

    def write_rows(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        """Set some rows of a parameter to rank 0's values and forget their gradient history, on all ranks and stages.

        Args:
            parameter: [N, ...]
            rows: int64 [R], the same on all ranks.
            values: [R, ...]; rank 0's are taken.
        """
        if rows.numel() == 0:
            return
        rows = rows.to(self.device)
        whole = self.read_parameter(parameter)
        whole[rows] = values.detach().to(self.device, torch.float32)
        self.write_parameter(parameter, whole)
        if not parameter.requires_grad or not self.has_moments():
            return  # before the first step there is no history
        moments = self.read_moments(parameter)
        for moment in moments.values():
            moment[rows] = 0.0
        self.write_moments(parameter, moments)

    # -- the optimizer's moments ------------------------------------------------------------------------------------

    def moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of what the optimizer keeps of a trainable parameter, each of its shape."""
        return MOMENTUM if id(parameter) in self._hidden else MOMENTS

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.native.optimizer
        return optimizer if self.stage == 0 else optimizer.optimizer  # type: ignore[attr-defined]

    def _slots(self) -> list[Tensor]:
        """The tensors that the optimizer sees: parameters at stage 0, flat partitions at 1 to 3."""
        if self.stage == 3:
            return list(self.native.optimizer.fp32_partitioned_groups_flat)
        if self.stage in (1, 2):
            return list(self.native.optimizer.single_partition_of_fp32_groups)
        return [parameter for group in self._optimizer().param_groups for parameter in group["params"]]

    def has_moments(self) -> bool:
        """Has the optimizer any state yet? It has none before the first step."""
        state = self._optimizer().state
        return any(self.moments_of(slot)[0] in state.get(slot, {}) for slot in self._slots())

    def create_moments(self, step: float) -> None:
        """Give every parameter zero moments where it has none, and AdamW `step` steps."""
        state = self._optimizer().state
        for slot in self._slots():
            for key in self.moments_of(slot):
                state[slot].setdefault(key, torch.zeros_like(slot, memory_format=torch.preserve_format).detach())
            if id(slot) not in self._hidden:
                state[slot]["step"] = torch.tensor(float(step))
        self._link_moments()

    def _link_moments(self) -> None:
        if self.stage in (1, 2):
            # DeepSpeed links moments to parameters inside the first group's first step, when the others have none.
            optimizer = self.native.optimizer
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def read_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a trainable parameter, whole, fp32 copies of the parameter's shape, on every rank."""
        if self.stage == 0:
            state = self._optimizer().state.get(parameter, {})
            return {key: state[key].clone() if key in state else torch.zeros_like(parameter.data) for key in self.moments_of(parameter)}
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()
        shape = self.shape(parameter)
        return {key: safe_get_full_optimizer_state(parameter, key).detach().clone().view(shape) for key in MOMENTS}

    @torch.no_grad()
    def write_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        """Set the moments of a trainable parameter (each of its full shape) to rank 0's; `has_moments` must hold."""
        self._link_moments()
        for key in self.moments_of(parameter):
            value = self.collectives.broadcast_(moments[key].detach().to(self.device, torch.float32, copy=True).contiguous())
            if self.stage > 0:
                self._write_master(parameter, value, key)
            elif key in self._optimizer().state.get(parameter, {}):
                self._optimizer().state[parameter][key].copy_(value)

    def _write_master(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        # DeepSpeed's full setter narrows past the end where the parameter does not divide by the ranks: pad it ourselves.
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = nn.functional.pad(value.flatten(), (0, size * self.collectives.world_size - value.numel()))
        part = padded[size * self.collectives.rank : size * (self.collectives.rank + 1)]
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    # -- the whole state --------------------------------------------------------------------------------------------

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer by name, whole, floats in fp32, on the CPU; empty on ranks but 0.

        Names that share one parameter share one tensor.
        """
        keep = self.collectives.rank == 0
        state: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}
        for name, parameter in self.objective.named_parameters(remove_duplicate=False):
            if id(parameter) not in copies:
                whole = self.read_parameter(parameter)
                copies[id(parameter)] = whole.cpu() if keep else whole[:0]
            state[name] = copies[id(parameter)]
        if not keep:
            return {}
        for name, buffer in self.named_persistent_buffers().items():
            value = buffer.detach().cpu().clone()
            state[name] = value.float() if value.is_floating_point() else value
        return state

    def named_persistent_buffers(self) -> dict[str, Tensor]:
        """The buffers that a state dict holds, by name."""
        buffers: dict[str, Tensor] = {}
        for prefix, module in self.objective.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    buffers[f"{prefix}.{name}" if prefix else name] = buffer
        return buffers
