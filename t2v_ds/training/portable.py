"""A checkpoint taken in by another number of ranks or ZeRO stage: DeepSpeed's files -> whole tensors -> the engine.

    stage 0      one file: weights, buffers, the optimizer's state by parameter index
    stages 1, 2  weights and buffers in one file; moments: each rank has a slice of one flat vector a parameter group
    stage 3      each rank has its slice of every single parameter, flattened one after another in sub-groups

DeepSpeed's universal checkpoint is not used: it restores no buffers (an EMA codebook is one), skips frozen parameters,
gives all groups the first one's hyperparameters at stage 3, and cannot cross from 1 or 2 to 3.
Rank 0 reads; the engine broadcasts. Call it where unpickling the few classes in DeepSpeed's files is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v_ds.errors import CheckpointError
from t2v_ds.training.engine import MOMENTS, MOMENTUM, Engine


@dataclass
class Whole:
    """A training state with nothing partitioned, all on the CPU."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # parameters and persistent buffers by name
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of trainable parameters; empty before step 1
    adam_step: float = 0.0


def load(engine: Engine, native: Path, state: Mapping[str, Any]) -> None:
    """Bring `engine` to the state in DeepSpeed's files under `native`; all ranks call.

    Args:
        engine: freshly made.
        native: the folder with DeepSpeed's files.
        state: the checkpoint's `state.json`: `zero_stage`, `world_size` and `groups` are used.

    Raises:
        CheckpointError: the files lack something that the engine has.
    """
    collectives = engine.collectives
    whole, problem = Whole(), ""
    if collectives.rank == 0:
        whole = read_whole(native, int(state["zero_stage"]), int(state["world_size"]), state["groups"])
        problem = _problem(engine, whole, native)
    problem, adam_step, with_moments = collectives.broadcast_object((problem, whole.adam_step, bool(whole.moments)))
    if problem:
        raise CheckpointError(problem)
    for name, parameter in engine.objective.named_parameters():
        engine.write_parameter(parameter, whole.tensors[name] if whole.tensors else torch.empty(engine.shape(parameter)))
    for name, buffer in engine.named_persistent_buffers().items():
        if whole.tensors:
            buffer.copy_(whole.tensors[name])
        collectives.broadcast_(buffer)
    if with_moments:
        engine.create_moments(adam_step)
        for name, parameter in engine.objective.named_parameters():
            if parameter.requires_grad:
                empty = {key: torch.zeros(engine.shape(parameter)) for key in engine.moments_of(parameter)}
                engine.write_moments(parameter, whole.moments.get(name, empty))
    engine.native.global_steps = int(state["step"])


def _problem(engine: Engine, whole: Whole, native: Path) -> str:
    shapes = {name: tuple(engine.shape(parameter)) for name, parameter in engine.objective.named_parameters()}
    shapes.update({name: tuple(buffer.shape) for name, buffer in engine.named_persistent_buffers().items()})
    for name, shape in shapes.items():
        if name not in whole.tensors:
            return f"{native} lacks the tensor '{name}'"
        if tuple(whole.tensors[name].shape) != shape:
            return f"tensor '{name}' in {native} has shape {list(whole.tensors[name].shape)}; the model has {list(shape)}"
    return ""


def read_whole(native: Path, stage: int, world: int, groups: Sequence[Sequence[str]]) -> Whole:
    """Rebuild whole tensors from DeepSpeed's files of `world` ranks at ZeRO `stage`; `groups` names the optimizer's parameters."""
    if stage == 3:
        return _read_stage_3(native, world)
    model = _read(native / "mp_rank_00_model_states.pt")
    whole = Whole(tensors=dict(model["module"]))
    if stage == 0:
        _stage_0_moments(whole, model["optimizer"]["state"], groups)
    else:
        _stage_1_2_moments(whole, native, world, model["param_shapes"])
    return whole


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _rank_files(native: Path, world: int, kind: str) -> list[dict[str, Any]]:
    return [_read(native / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt") for rank in range(world)]


def _stage_0_moments(whole: Whole, adam: Mapping[int, Mapping[str, Tensor]], groups: Sequence[Sequence[str]]) -> None:
    names = [name for group in groups for name in group]  # the order in which torch numbers them
    for index, entry in adam.items():
        whole.moments[names[index]] = {key: entry[key] for key in (*MOMENTS, *MOMENTUM) if key in entry}
        whole.adam_step = max(whole.adam_step, float(entry.get("step", 0)))


def _stage_1_2_moments(whole: Whole, native: Path, world: int, shapes: Sequence[Mapping[str, Sequence[int]]]) -> None:
    ranks = [content["optimizer_state_dict"] for content in _rank_files(native, world, "optim")]
    for group, parameters in enumerate(shapes):
        states = [rank["base_optimizer_state"]["state"].get(group, {}) for rank in ranks]
        if "exp_avg" not in states[0]:
            continue
        flat = {key: torch.cat([state[key].flatten() for state in states]) for key in MOMENTS}
        paddings = ranks[0].get("param_alignment_paddings")
        offset = 0
        for index, (name, shape) in enumerate(parameters.items()):
            size = math.prod(shape)
            whole.moments[name] = {key: flat[key][offset : offset + size].view(*shape) for key in MOMENTS}
            offset += size + (paddings[group][index] if paddings else 0)
        whole.adam_step = max(whole.adam_step, float(states[0]["step"]))


def _read_stage_3(native: Path, world: int) -> Whole:
    models = _rank_files(native, world, "model")
    ranks = [content["optimizer_state_dict"] for content in _rank_files(native, world, "optim")]
    whole = Whole(tensors={name: models[0]["module"][name] for name in models[0]["buffer_names"]})
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        pieces = [model["frozen_param_fragments"][name].flatten() for model in models]
        whole.tensors[name] = torch.cat(pieces)[: math.prod(shape)].view(*shape)
    for group, parameters in enumerate(models[0]["param_shapes"]):
        sources = {"": [rank["fp32_flat_groups"][group] for rank in ranks]}
        states = [rank["optimizer_state_dict"]["state"].get(group, {}) for rank in ranks]
        if "exp_avg" in states[0]:
            sources.update({key: [state[key] for state in states] for key in MOMENTS})
            whole.adam_step = max(whole.adam_step, float(states[0]["step"]))
        offset = 0
        for name, shape in parameters.items():
            size = math.prod(shape)
            part = math.ceil(size / world)  # each rank's slice, the last one padded
            values = {
                key: torch.cat([flat[offset : offset + part] for flat in flats])[:size].view(*shape) for key, flats in sources.items()
            }
            whole.tensors[name] = values.pop("")
            if values:
                whole.moments[name] = values
            offset += part
    for alias, name in models[0].get("shared_params", {}).items():
        whole.tensors[alias] = whole.tensors[name]
    return whole
