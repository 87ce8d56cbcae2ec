"""A run's settings -> what it takes: parameters, memory, arithmetic, time.

    settings -> work (clips a micro-batch) -> traces -> + DeepSpeed's copies, by stage -> peak of each GPU
                                                     -> FLOPs / (peak x mfu), or seconds measured here -> days
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from t2v_ds.config import PlanConfig, TrainConfig, TransformerRunConfig, VQVAERunConfig
from t2v_ds.errors import ConfigError
from t2v_ds.training.ds_config import complete_ds_config
from t2v_ds.training.planning.hardware import GIB, Accelerator, find, resident
from t2v_ds.training.planning.layers import trace_cache, trace_transformer, trace_vqvae
from t2v_ds.training.planning.timing import Timing, time_transformer, time_vqvae
from t2v_ds.training.planning.trace import Trace
from t2v_ds.training.planning.work import RunConfig, Work, largest_micro_batch, mean_over_clips, read_work
from t2v_ds.training.planning.zero import States, Zero, states_of

TILE = 4096  # positions of a loss_tile where one is tried
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")


def stages_for(train: TrainConfig) -> tuple[str, ...]:
    """Our DeepSpeed files with which the run's optimizer works."""
    return STAGES if train.optimizer == "adamw" else STAGES[:1]


@dataclass
class Memory:
    """Of one GPU (or process), in bytes."""

    states: States
    phases: dict[str, int]  # peak of all tensors in each phase of the step
    batch: int
    total: int  # with what no tensor holds

    @property
    def tensors(self) -> int:
        """Peak of all tensors."""
        return max(self.phases.values()) + self.batch

    @property
    def phase(self) -> str:
        """When the peak is."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass
class Cost:
    """Of an optimizer step."""

    flops: float  # over all GPUs, without what is computed again
    attention_flops: float  # of these
    again_flops: float
    codes: float  # (transformer) or frames (VQ-VAE) that are learned from
    seconds: float = 0.0  # 0: not known


@dataclass
class Activations:
    """Of one way to compute them."""

    checkpointing: bool
    tile: int  # loss_tile
    trace: Trace
    memory: Memory


@dataclass
class Plan:
    """See the module's docstring. All that the report shows."""

    run: RunConfig
    config: PlanConfig
    accelerator: Accelerator
    work: Work
    trace: Trace  # of the largest micro-batch
    memory: Memory
    cost: Cost
    stages: dict[str, Memory] = field(default_factory=dict)  # by DeepSpeed file
    activations: list[Activations] = field(default_factory=list)
    cache: int = 0  # bytes of keys and values of a prompt, with guidance, in fp32

    @property
    def available(self) -> int:
        """Bytes of each GPU."""
        return int(self.accelerator.memory * GIB)

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a GPU has."""
        return self.memory.total <= self.available


class Planner:
    """Plans a run and variants of it; traces and timings are kept."""

    def __init__(self, config: PlanConfig) -> None:
        """Raise ConfigError for an accelerator that is not known, or that this machine does not have where it is to be measured."""
        self.config, self.accelerator = config, find(config)
        if config.measure and (config.accelerator == "cpu") == torch.cuda.is_available():
            has = "a GPU, with which it would train" if torch.cuda.is_available() else "no GPU"
            other = "name it (accelerator=h100)" if torch.cuda.is_available() else "set accelerator=cpu"
            raise ConfigError(f"--measure times this machine, which has {has}, but 'accelerator' is '{config.accelerator}': {other}")
        self._traces: dict[str, Trace] = {}
        self._timings: dict[str, Timing] = {}

    def plan(self, run: RunConfig, like: Plan | None = None) -> Plan:
        """Plan a run; of a variant of the run of `like`, the time is told from that one's, by their FLOPs.

        Raises:
            UserError: see `read_work`, `complete_ds_config` and `time_transformer`.
        """
        work, run = read_work(self.config, run)
        ds_config = complete_ds_config(run.train, self.config.gpus)
        trace = self.trace(run, self._largest(run, work))
        memory = self.memory(run.train, trace, Zero.read(ds_config), work.accumulation)
        cost = self._work_of_a_step(run, work, trace)
        if like is None:
            cost.seconds = self._seconds(run, work, trace, cost)
        else:
            cost.seconds = like.cost.seconds * (cost.flops + cost.again_flops) / (like.cost.flops + like.cost.again_flops)
        return Plan(run, self.config, self.accelerator, work, trace, memory, cost)

    # -- memory -----------------------------------------------------------------------------------------------------

    def _largest(self, run: RunConfig, work: Work) -> list[int]:
        return largest_micro_batch(work, run, self.config.gpus) if isinstance(run, TransformerRunConfig) else [1] * work.micro

    def trace(self, run: RunConfig, lengths: list[int]) -> Trace:
        """The trace of a micro-batch; for the VQ-VAE only the number of clips counts."""
        if isinstance(run, TransformerRunConfig):
            described: list[Any] = [run.model, run.text, run.replaces_context, lengths]
        else:
            described = [run.model, run.losses, run.frames_per_clip, len(lengths)]
        key = repr([run.train.precision, *described])
        if key not in self._traces:
            trace = trace_transformer(run, lengths) if isinstance(run, TransformerRunConfig) else trace_vqvae(run, len(lengths))
            self._traces[key] = trace
        return self._traces[key]

    def memory(self, train: TrainConfig, trace: Trace, zero: Zero, accumulation: int) -> Memory:
        """Memory at a ZeRO stage."""
        on_cpu = self.config.accelerator == "cpu"
        states = states_of(trace, zero, self.config.gpus, accumulation, train.precision, on_cpu, train.optimizer)
        phases = states.peaks(trace)
        if on_cpu:  # there is no other memory to move anything to
            phases = {name: size + states.host + states.host_stepping * (name == "optimizer step") for name, size in phases.items()}
        return Memory(states, phases, trace.batch, resident(max(phases.values()) + trace.batch, self.config))

    def complete(self, plan: Plan) -> Plan:
        """With what else the report shows: all stages, all ways to keep activations, the cache of generation."""
        cache = trace_cache(plan.run) if isinstance(plan.run, TransformerRunConfig) else 0
        return dataclasses.replace(plan, stages=self._by_stage(plan), activations=self._by_activations(plan), cache=cache)

    def _by_activations(self, plan: Plan) -> list[Activations]:
        run = plan.run
        if not isinstance(run, TransformerRunConfig):
            return []
        zero, found = Zero.read(complete_ds_config(run.train, self.config.gpus)), []
        for checkpointing in (False, True):
            for tile in (0, run.model.loss_tile or TILE):
                model = dataclasses.replace(run.model, activation_checkpointing=checkpointing, loss_tile=tile)
                trace = self.trace(dataclasses.replace(run, model=model), self._largest(run, plan.work))
                found.append(Activations(checkpointing, tile, trace, self.memory(run.train, trace, zero, plan.work.accumulation)))
        return found

    def _by_stage(self, plan: Plan) -> dict[str, Memory]:
        """Memory of the same run with each of our DeepSpeed files."""
        found = {}
        for name in dict.fromkeys([*stages_for(plan.run.train), plan.run.train.ds_config]):
            train = dataclasses.replace(plan.run.train, ds_config=name)
            zero = Zero.read(complete_ds_config(train, self.config.gpus))
            found[name] = self.memory(train, plan.trace, zero, plan.work.accumulation)
        return found

    # -- time -------------------------------------------------------------------------------------------------------

    def _work_of_a_step(self, run: RunConfig, work: Work, trace: Trace) -> Cost:
        clips = work.micro * work.accumulation * self.config.gpus
        if isinstance(run, VQVAERunConfig):
            scale = clips / work.micro
            return Cost(trace.flops * scale, trace.attention_flops * scale, trace.again_flops * scale, clips * run.frames_per_clip)

        def mean(name: str) -> float:
            return clips * mean_over_clips(work, run, lambda length: float(getattr(self.trace(run, [length]), name)))

        codes = clips * mean_over_clips(work, run, lambda length: float(length)) * run.model.grid_size**2
        return Cost(mean("flops"), mean("attention_flops"), mean("again_flops"), codes)

    def _seconds(self, run: RunConfig, work: Work, trace: Trace, cost: Cost) -> float:
        """Of a step; 0 where no peak is known."""
        if self.config.measure:
            return self._measured(run, work, trace, cost)
        peak = self.accelerator.bf16 if run.train.precision == "bf16" else self.accelerator.fp32
        return (cost.flops + cost.again_flops) / (self.config.gpus * peak * 1e12 * self.config.mfu) if peak else 0.0

    def _measured(self, run: RunConfig, work: Work, trace: Trace, cost: Cost) -> float:
        """Seconds of a step: what was measured of one micro-batch, by the FLOPs of the mean one."""
        timing, flops = self._timing(run, work)
        layers = run.model.layers if isinstance(run, TransformerRunConfig) else 0
        share = self.config.gpus if run.train.ds_config != "zero0" else 1
        passes = timing.passes(layers) * (cost.flops + cost.again_flops) / (self.config.gpus * flops)
        return passes + timing.step(trace.hidden if run.train.optimizer == "muon" else trace.total_parameters) / share

    def _timing(self, run: RunConfig, work: Work) -> tuple[Timing, float]:
        """The timing of a micro-batch of clips of mean length, and its FLOPs."""
        if isinstance(run, VQVAERunConfig):
            trace, timed = self.trace(run, [1] * work.micro), lambda: time_vqvae(run, work.micro, self._peak)
        else:
            lengths = [max(1, round(work.mean_frames))] * work.micro
            trace, timed = self.trace(run, lengths), lambda: time_transformer(run, lengths, self._peak)
        key = repr([run.model, run.train.precision, run.train.optimizer, work.micro])
        if key not in self._timings:
            self._timings[key] = timed()
        return self._timings[key], trace.flops + trace.again_flops

    def _peak(self, run: RunConfig) -> int:
        """What the run takes on this machine alone."""
        accelerator = self.config.accelerator if torch.cuda.is_available() else "cpu"
        quiet = Planner(dataclasses.replace(self.config, gpus=1, measure=False, accelerator=accelerator))
        return quiet.plan(run).memory.total


