"""DeepSpeed's JSON files: found by name, checked, and completed with what `train.*` settings own.

name or path -> JSON -> unknown and owned keys refused -> + batch, accumulation, clipping, precision
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

from t2v_ds.config import TrainConfig
from t2v_ds.errors import ConfigError, nearest

# DeepSpeed accepts unknown top-level keys silently, so a misspelt one would switch nothing on. These are the keys that
# DeepSpeed 0.19 reads in training; ones whose feature was removed or does not work with ours are left out.
VALID_KEYS = frozenset(
    """activation_checkpointing aio checkpoint comms_logger communication_data_type compile csv_monitor data_types
    dataloader_drop_last disable_allgather disable_python_gc dump_state flops_profiler gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor log_level managed_gradient_accumulation
    memory_breakdown monitor_config prescale_gradients steps_per_print tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu wall_clock_breakdown wandb comet zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization bf16 fp16 optimizer scheduler""".split()
)
# Keys that would change what our own settings promise, and the setting to use instead.
OWNED_ELSEWHERE = {
    "optimizer": "train.optimizer, train.learning_rate, train.betas and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_steps",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "managed_gradient_accumulation": "train.batch and train.micro_batch",
    "data_types": "train.precision",
}


def accumulation_steps(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """Return (clips a forward pass on one rank, forward passes an optimizer step). Ranks that share clips count as one.

    Raises:
        ConfigError: `train.batch` is not micro_batch x ranks x a whole number; names the nearest batches that are.
    """
    if world_size % train.sequence_parallel:
        raise ConfigError(
            f"setting 'train.sequence_parallel' is {train.sequence_parallel}; allowed: a divisor of the number of ranks ({world_size})"
        )
    world_size //= train.sequence_parallel
    unit = max(1, train.micro_batch) * world_size
    if train.batch % unit:
        lower = train.batch // unit * unit
        choices = " or ".join(str(batch) for batch in (lower, lower + unit) if batch)
        of = f"train.micro_batch ({train.micro_batch}) x {world_size} ranks" if train.micro_batch else f"the number of ranks ({world_size})"
        raise ConfigError(f"setting 'train.batch' is {train.batch}, which is no multiple of {of}; nearest: {choices}")
    micro = train.micro_batch or train.batch // world_size
    return micro, train.batch // (micro * world_size)


def resolve_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file by its name in `ds_configs/` (`zero2`) or by its path.

    Raises:
        ConfigError: no such name or file (names the nearest), not JSON, unknown top-level key.
    """
    origin, text = _read(name_or_path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"DeepSpeed file {origin} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"DeepSpeed file {origin} holds a {type(data).__name__}; expected an object")
    for key in data:
        if key not in VALID_KEYS:
            raise ConfigError(f"unknown key '{key}' in DeepSpeed file {origin}: {nearest(key, VALID_KEYS)}")
    zero = data.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(f"'zero_optimization.stage' in DeepSpeed file {origin} is {zero!r}; allowed: 0, 1, 2 or 3")
    return data


def complete_ds_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """The whole configuration for `deepspeed.initialize`: the file of `train.ds_config` plus what `train` owns.

    Raises:
        ConfigError: as `resolve_ds_config` and `accumulation_steps`; a file that sets an owned key to another value, or that partitions
            matrices which the optimizer needs whole.
    """
    data = resolve_ds_config(train.ds_config)
    micro, accumulation = accumulation_steps(train, world_size)
    owned: dict[str, Any] = {
        "train_batch_size": train.batch * train.sequence_parallel,  # DeepSpeed counts ranks, and ranks that share a clip count it twice
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clip,
        "torch_autocast": {"enabled": train.precision == "bf16", "dtype": "bfloat16"},
    }
    for key, value in owned.items():
        if key in data and data[key] not in (value, "auto"):
            raise ConfigError(
                f"DeepSpeed file '{train.ds_config}' sets '{key}' to {data[key]!r} but the train settings make it {value!r}: remove the key"
            )
    for key, setting in OWNED_ELSEWHERE.items():
        if data.get(key) not in (None, {"enabled": False}):
            raise ConfigError(f"DeepSpeed file '{train.ds_config}' sets '{key}', which is not used here: remove it and use {setting}")
    zero = data.get("zero_optimization", {})
    if train.optimizer == "muon" and zero.get("stage", 0):
        raise ConfigError(
            f"setting 'train.optimizer' is 'muon', which needs whole matrices, but DeepSpeed file '{train.ds_config}' partitions them "
            f"(ZeRO stage {zero['stage']}); allowed: train.ds_config=zero0, or train.optimizer=adamw"
        )
    if zero.get("compute_grad_norm", True) is not True:
        raise ConfigError(
            f"DeepSpeed file '{train.ds_config}' switches 'zero_optimization.compute_grad_norm' off; the guard against NaN needs it on"
        )
    return {**data, **owned}


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def _read(name_or_path: str) -> tuple[str, str]:
    if "/" in name_or_path or name_or_path.endswith(".json"):
        path = Path(name_or_path)
        try:
            return str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the DeepSpeed file {path} of 'train.ds_config': {getattr(error, 'strerror', None) or error}"
            ) from error
    files = {entry.name.removesuffix(".json"): entry for entry in _packaged().iterdir() if entry.name.endswith(".json")}
    if name_or_path not in files:
        raise ConfigError(f"setting 'train.ds_config' is '{name_or_path}', which is no file of ds_configs/: {nearest(name_or_path, files)}")
    return name_or_path, files[name_or_path].read_text(encoding="utf-8")


def _packaged() -> Any:
    checkout = Path(__file__).parents[2] / "ds_configs"
    if checkout.is_dir():
        return checkout
    return importlib.resources.files("t2v_ds.ds_configs")
