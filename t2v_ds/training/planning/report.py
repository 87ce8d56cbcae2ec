"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from t2v_ds.config import TransformerRunConfig
from t2v_ds.config_loader import to_dict
from t2v_ds.training.ds_config import complete_ds_config, zero_stage
from t2v_ds.training.planning.fit import Change
from t2v_ds.training.planning.hardware import GIB
from t2v_ds.training.planning.planner import Memory, Plan

TIGHT = 0.9  # of the memory; above, gaps between tensors may not leave room
Row = tuple[str, str]


def gib(size: float) -> str:
    """Bytes -> GiB, with as many digits as mean something."""
    value = size / GIB
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def count(number: float) -> str:
    """A number with its unit: 1.3 G, 31.5 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def write_text(plan: Plan, changes: Sequence[Change]) -> str:
    """What `t2v plan` prints."""
    sections = [
        ("", [("run", _run(plan)), ("parameters", _parameters(plan))]),
        (f"memory of each {_unit(plan)}, GiB", _memory(plan)),
        ("", _stages(plan)),
        ("activations, GiB", _activations(plan)),
        ("time", _time(plan)),
        ("", _generation(plan)),
    ]
    lines: list[str] = []
    for title, rows in sections:
        if rows and title:
            lines.append(f"{title}:")
        lines += [f"  {name:<22} {text}" if title else f"{name:<24} {text}" for name, text in rows]
    return "\n".join([*lines, *_verdict(plan, changes)])


def _unit(plan: Plan) -> str:
    return "process" if plan.config.accelerator == "cpu" else "GPU"


def _units(plan: Plan) -> str:
    return "processes" if plan.config.accelerator == "cpu" else "GPUs"


def _run(plan: Plan) -> str:
    work, train = plan.work, plan.run.train
    clips = f"{work.micro} clips x {work.accumulation} micro-batches x {plan.config.gpus} {_units(plan)}"
    if isinstance(plan.run, TransformerRunConfig):
        model = plan.run.model
        what = f"{model.layers} layers of width {model.width}, attention {model.attention}, decoding {model.decoding}"
        what += f"; clips of up to {work.longest} frames of {model.grid_size} x {model.grid_size} codes"
    else:
        what = f"VQ-VAE of {plan.run.model.image_size} pixels; {plan.run.frames_per_clip} frames of each clip"
    return f"{what}; {clips}; {train.precision}, {train.ds_config}"


def _parameters(plan: Plan) -> str:
    parts = sorted(plan.trace.parameters.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count(size)}" for name, size in parts if size > 0.001 * plan.trace.total_parameters)
    return f"{count(plan.trace.total_parameters)} ({shown})"


def _memory(plan: Plan) -> list[Row]:
    memory, states = plan.memory, plan.memory.states
    names = ("weights", "masters", "moments", "gradients", "buckets", "gathered")
    rows = [(label, gib(getattr(states, name))) for name, label in zip(names, _LABELS, strict=True) if getattr(states, name)]
    peak = plan.trace.peak
    rows.append(("activations", f"{gib(peak.work if states.apart else peak.total)} ({gib(plan.trace.saved)} kept for the backward pass)"))
    if plan.trace.frozen:
        rows.append(("frozen networks", gib(plan.trace.frozen)))
    rows.append(("highest of all tensors", f"{gib(memory.tensors)}, in the {memory.phase}"))
    rows.append(("with the rest", f"{gib(memory.total)} of {gib(plan.available)} ({plan.accelerator.name})"))
    if states.host and plan.config.accelerator != "cpu":
        rows.append(("machine's memory", f"{gib(states.host + states.host_stepping)} a process, {plan.config.gpus} processes"))
    return rows


_LABELS = ("weights", "fp32 masters", "Adam's moments", "gradients, between", "gradient buckets", "gathered weights")


def _stages(plan: Plan) -> list[Row]:
    """A table of the ZeRO stages."""
    head = ("weights", "masters", "moments", "gradients", "buckets", "gathered", "peak", "machine")
    rows = [("DeepSpeed file, GiB", "".join(f"{name:>10}" for name in head))]
    for name, memory in plan.stages.items():
        states = memory.states
        gradients = max(states.gradients, 0 if states.apart else plan.trace.peak.gradients)
        values = (states.weights, states.masters, states.moments, gradients, states.buckets, states.gathered, memory.total)
        mark = " *" if name == plan.run.train.ds_config else ""
        cells = [gib(value) if value else "-" for value in (*values, states.host + states.host_stepping)]
        rows.append((f"  {name.rpartition('/')[2]}{mark}", "".join(f"{cell:>10}" for cell in cells)))
    return rows


def _activations(plan: Plan) -> list[Row]:
    rows = []
    for choice in plan.activations:
        name = ("checkpointing" if choice.checkpointing else "all kept") + (f", loss_tile {choice.tile}" if choice.tile else "")
        rows.append((name, f"{gib(choice.trace.peak.work)} at the peak, {gib(choice.trace.saved)} kept; whole {gib(choice.memory.total)}"))
    return rows


def _time(plan: Plan) -> list[Row]:
    cost, work = plan.cost, plan.work
    again = f", and {count(cost.again_flops)}FLOP computed again" if cost.again_flops else ""
    attention = f" (attention {100 * cost.attention_flops / cost.flops:.0f} %)" if cost.attention_flops else ""
    rows = [("arithmetic of a step", f"{count(cost.flops)}FLOP{attention}{again}")]
    if not cost.seconds:
        return [*rows, ("a step", "not known: give peak_tflops, or --measure")]
    things = "codes" if isinstance(plan.run, TransformerRunConfig) else "frames"
    rate = f"{duration(cost.seconds)}, {count(cost.codes / cost.seconds)}{things}/s"
    rows.append(("a step", f"{rate} ({_how(plan)})"))
    if work.steps:
        rows.append(("the run", f"{work.steps:,} steps: {duration(work.steps * cost.seconds)}"))
    else:
        rows.append(("the run", "length not known: give clips=, or --data"))
    return rows


def _how(plan: Plan) -> str:
    if plan.config.measure:
        return "from two layers measured on this machine; without communication between processes"
    peak = plan.accelerator.bf16 if plan.run.train.precision == "bf16" else plan.accelerator.fp32
    useful = plan.cost.flops / (plan.cost.flops + plan.cost.again_flops) * plan.config.mfu
    own = f"; MFU without what is computed again {100 * useful:.0f} %" if plan.cost.again_flops else ""
    return f"at {100 * plan.config.mfu:.0f} % of {peak:g} TFLOP/s{own}"


def _generation(plan: Plan) -> list[Row]:
    if not plan.cache:
        return []
    return [("generation", f"keys and values of a prompt with guidance: {gib(plan.cache)} GiB in fp32, {gib(plan.cache / 2)} in bf16")]


def _verdict(plan: Plan, changes: Sequence[Change]) -> list[str]:
    has = f"{gib(plan.memory.total)} of {gib(plan.available)} GiB"
    if plan.fits:
        tight = plan.memory.total > TIGHT * plan.available
        return [f"fits: {has}" + ("; less than a tenth to spare, which gaps between tensors may take" if tight else "")]
    if not changes:
        return [f"does not fit: {has}; no change of settings tried here is enough: more GPUs with zero3, shorter clips, or a smaller model"]
    lines = [f"does not fit: {has}; what would:"]
    for change in changes:
        slower = f", step {change.seconds / plan.cost.seconds:.2f} x as long" if plan.cost.seconds else ""
        note = "; another model" if any(move.kind in ("attention", "group") for move in change.moves) else ""
        lines.append(f"  {gib(change.memory.total):>5} GiB{slower}{note}:  {change.text}")
    return lines


def to_json(plan: Plan, changes: Sequence[Change]) -> dict[str, Any]:
    """The same for programs, in bytes, seconds and FLOPs."""

    def memory(one: Memory) -> dict[str, Any]:
        return {**dataclasses.asdict(one), "tensors": one.tensors, "phase": one.phase}

    return {
        "settings": {**to_dict(plan.config), "run": to_dict(plan.run)},
        "zero_stage": zero_stage(complete_ds_config(plan.run.train, plan.config.gpus)),
        "accelerator": dataclasses.asdict(plan.accelerator),
        "work": {**dataclasses.asdict(plan.work), "longest": plan.work.longest, "mean_frames": plan.work.mean_frames},
        "parameters": {**plan.trace.parameters, "total": plan.trace.total_parameters},
        "trace": dataclasses.asdict(plan.trace),
        "memory": memory(plan.memory),
        "stages": {name: memory(one) for name, one in plan.stages.items()},
        "activations": [
            {"activation_checkpointing": one.checkpointing, "loss_tile": one.tile, "peak": one.trace.peak.work, "saved": one.trace.saved,
             "total": one.memory.total}
            for one in plan.activations
        ],
        "step": dataclasses.asdict(plan.cost),
        "run_seconds": plan.work.steps * plan.cost.seconds or None,
        "kv_cache": plan.cache,
        "fits": plan.fits,
        "changes": [{"settings": [move.text for move in one.moves], "total": one.memory.total, "seconds": one.seconds} for one in changes],
    }  # fmt: skip
