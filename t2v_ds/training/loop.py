"""The one step loop, for both models.

    start: connect -> engine -> newest complete checkpoint (or `initialise` from the first batch)
    step:  micro-batches -> forward, backward, step -> after_step -> log | show | save, each at its own interval and at the end
    end:   export -> DONE

A run's folder:  config.yaml  checkpoints/  tensorboard/  metrics.jsonl  DONE  + what the objective exports.
Random generators are set anew in every step from (seed, step, rank): a resumed run draws what the undisturbed one would,
and showing pictures does not change the training.
"""

from __future__ import annotations

import abc
import json
import logging
import math
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from t2v_ds.config import TrainConfig
from t2v_ds.data.contents import contents, describe_change
from t2v_ds.errors import CheckpointError, ConfigError, UserError
from t2v_ds.files import FULL, code_digest, remove_folder, write_atomically
from t2v_ds.training import checkpoint, health
from t2v_ds.training.distributed import Collectives, connect
from t2v_ds.training.ds_config import complete_ds_config
from t2v_ds.training.engine import Engine
from t2v_ds.training.metrics import METRICS_FILE, Window, append_metrics, last_metrics, sync_file, truncate_metrics
from t2v_ds.training.monitor import Monitor
from t2v_ds.training.optimizer import learning_rate_at

logger = logging.getLogger(__name__)

DONE_FILE = "DONE"
CONFIG_FILE = "config.yaml"
MONITOR_FOLDER = "tensorboard"


class Objective(nn.Module, abc.ABC):
    """A model with all that training it takes. Trainable parameters and buffers must be registered in it."""

    @property
    def parameters_trained(self) -> int:
        """How many numbers are trained, wherever they are partitioned."""
        return sum(int(getattr(one, "ds_numel", one.numel())) for one in self.parameters() if one.requires_grad)

    @abc.abstractmethod
    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole loss (scalar) of one micro-batch and its detached scalar metrics by name, the same names on all ranks.

        The whole loss, because at ZeRO stage 3 parameters exist only within this call.
        """

    @abc.abstractmethod
    def export(self, folder: Path, state: dict[str, Tensor]) -> None:
        """On rank 0: write `config.json` and `model.safetensors` from the full fp32 state of this objective."""

    def initialise(self, batch: dict[str, Any], engine: Engine) -> None:
        """Called once on a fresh start, on all ranks, with this rank's first micro-batch; not on resume."""

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        """Called on all ranks after each optimizer step that was applied (counted from 1); returns further metrics."""
        return {}

    def discard_step(self) -> None:
        """Called instead of `after_step` when a step was skipped: forget what its forward passes have gathered."""

    def visualise(self, step: int, engine: Engine, monitor: Monitor) -> None:
        """Called on all ranks at `visual_every` and at the end."""


class Stream(Protocol):
    """Endless micro-batches of one rank (`data.stream.ClipStream` is one)."""

    micro_steps: int
    dataset: Any  # has a length

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]:
        """The position; valid for any number of ranks."""

    def load_state_dict(self, state: dict[str, Any], accept_new_data: bool = False) -> None:
        """Go to a position; one in other data is refused, or with `accept_new_data` becomes the start of its epoch."""


def total_steps(train: TrainConfig, samples: int) -> int:
    """Optimizer steps of a run over a data set of `samples`."""
    return train.steps or max(1, math.ceil(train.epochs * samples / train.batch))


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Set torch's, numpy's and Python's global generators as a pure function of the arguments."""
    state = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(state)
    np.random.seed(state)
    random.seed(state)


def train(
    objective: Objective,
    stream: Stream,
    train: TrainConfig,
    run: Path,
    seed: int,
    config: dict[str, Any],
    collate: Callable[[Any], dict[str, Any]],
    resume: bool = True,
    accept_new_data: bool = False,
    description: str = "train",
) -> dict[str, float]:
    """Train `objective` to the end, from wherever an earlier call of the same run got to; every rank calls.

    Args:
        objective: freshly made.
        stream: at its start; its `micro_steps` must be the engine's accumulation (see `ds_config.accumulation_steps`).
        train: the settings of the optimisation.
        run: the run's folder, seen by all ranks.
        seed: of the run.
        config: the whole run's settings, kept with it and compared on resume.
        collate: what the stream returns -> the batch given to `objective.forward`.
        resume: False: delete the run's checkpoints and curves, and start over.
        accept_new_data: where the data has changed since, keep the model and begin the epoch anew; else that is refused.
        description: beside the progress bar.

    Returns:
        The last logged metrics.

    Raises:
        CheckpointError: a damaged checkpoint, or one made with other settings; a run finished on other data.
        DataError: the data has changed since the checkpoint; says what.
        ConfigError: settings or a DeepSpeed file that do not fit, or `run` cannot be written.
        UserError: losses stay non-finite.
        StopRequested: a stop signal came; the checkpoint is saved. A `SystemExit` with code 0.
    """
    collectives = connect()
    complete_ds_config(train, collectives.world_size)  # a file that does not fit is told of before anything is written
    steps = total_steps(train, len(stream.dataset))
    finished = _prepare_folder(run, config, stream.dataset, steps, resume, accept_new_data, collectives)
    if finished is not None:
        logger.info("%s is finished already", run)
        return finished
    training = _Training(objective, stream, train, run, seed, config, collate, accept_new_data, description, collectives, steps)
    return training.run_to_end()


def _prepare_folder(
    run: Path, config: dict[str, Any], dataset: Any, steps: int, resume: bool, accept_new_data: bool, collectives: Collectives
) -> dict[str, float] | None:
    """Make the folder ready on rank 0; return the metrics of a run that is finished already."""
    outcome: Any = None
    if collectives.rank == 0:
        try:
            outcome = _prepare_on_rank_0(run, config, dataset, steps, resume, accept_new_data)
        except UserError as error:  # all ranks must raise, or the others would wait for rank 0
            outcome = error
        except OSError as error:
            place = ConfigError(f"a run cannot be kept in {run}: {error.strerror or error}; choose another folder with --out")
            outcome = error if error.errno in FULL else place
    outcome = collectives.broadcast_object(outcome)
    if isinstance(outcome, UserError | OSError):
        raise outcome
    return outcome  # type: ignore[no-any-return]


def _prepare_on_rank_0(
    run: Path, config: dict[str, Any], dataset: Any, steps: int, resume: bool, accept_new_data: bool
) -> dict[str, float] | None:
    run.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in (checkpoint.FOLDER, MONITOR_FOLDER):
            if (run / name).is_dir():
                remove_folder(run / name)
        for name in (DONE_FILE, METRICS_FILE):
            (run / name).unlink(missing_ok=True)
    checkpoint.remove_leftovers(run)
    done = run / DONE_FILE
    if done.is_file():
        try:
            content = json.loads(done.read_text(encoding="utf-8"))
            step, saved, metrics = int(content["step"]), content["config"], dict(content["metrics"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{done} is damaged ({error}): delete it and run again to finish from the last checkpoint") from error
        checkpoint.check_config(saved, config, done)
        if content.get("data") != dataset.digest:
            change = describe_change(content.get("shards", {}), contents(dataset))
            if not accept_new_data:
                raise CheckpointError(
                    f"{run} was trained on other data ({change}): choose another output folder, "
                    "or train its model on this data, too, with accept_new_data=true and more train.steps or train.epochs"
                )
            if step >= steps:
                raise CheckpointError(
                    f"{run} has made {step} steps on other data ({change}), and the settings ask for {steps}: "
                    "raise train.steps or train.epochs to train its model on this data, too"
                )
        if step >= steps:
            return metrics
        done.unlink()  # the run was made longer
    write_atomically(run / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
    return None


class _Training:
    """The state of one call of `train`."""

    def __init__(
        self,
        objective: Objective,
        stream: Stream,
        train: TrainConfig,
        run: Path,
        seed: int,
        config: dict[str, Any],
        collate: Callable[[Any], dict[str, Any]],
        accept_new_data: bool,
        description: str,
        collectives: Collectives,
        steps: int,
    ) -> None:
        self.objective, self.stream, self.train, self.run, self.seed = objective, stream, train, run, seed
        self.config, self.collate, self.accept_new_data, self.description = config, collate, accept_new_data, description
        self.collectives, self.steps = collectives, steps
        self.watchdog = health.Watchdog(train.watchdog_s, collectives.rank, board=collectives.noticeboard())
        self.policy = health.NonFinitePolicy()
        self.window = Window()
        self.started_window, self.window_steps = time.monotonic(), 0

    def run_to_end(self) -> dict[str, float]:
        """Resume or start, step to the end, finish."""
        with health.stop_signals(), self.watchdog:
            self.engine = Engine(self.objective, self.train, self.seed, self.collectives, self.steps)
            if self.stream.micro_steps != self.engine.accumulation:
                raise ConfigError(
                    f"the stream gives {self.stream.micro_steps} micro-batches a step; DeepSpeed expects {self.engine.accumulation}"
                )
            self.step = self._resume()
            first = self._first_batch() if self.step == 0 else None
            self.monitor = Monitor(self.run / MONITOR_FOLDER, self.collectives.rank, self.step)
            try:
                self._steps(first)
                return self._finish()
            finally:
                self.monitor.close()

    def _resume(self) -> int:
        """Load the newest complete checkpoint, and return its step; 0: there is none."""
        self.watchdog.beat(0, "resume")
        folder = self.collectives.broadcast_object(checkpoint.latest_checkpoint(self.run))
        step = 0
        if folder is not None:
            state = checkpoint.load_checkpoint(self.engine, folder, self.config)
            step = int(state["step"])
            if step > self.steps:
                raise CheckpointError(
                    f"{folder} has made {step} steps but the settings ask for {self.steps}: "
                    "raise train.steps, or choose another output folder"
                )
            self.stream.load_state_dict(state["stream"], self.accept_new_data)
            self.window.load_state_dict(state["window"])
            self.policy.total, self.policy.in_a_row = state["skipped"]
            logger.info("resumed from step %d of %d", step, self.steps)
        if self.collectives.rank == 0:
            checkpoint.remove_old(self.run, self.train.keep_checkpoints)  # a kill may have come between a save and this
            truncate_metrics(self.run / METRICS_FILE, step)
        return step

    def _first_batch(self) -> dict[str, Any]:
        seed_generators(self.seed, 0, self.collectives.rank)
        self.watchdog.beat(0, "initialise")
        batch = self.engine.to_device(self.collate(next(self.stream)))
        self.objective.initialise(batch, self.engine)
        return batch

    def _steps(self, first: dict[str, Any] | None) -> None:
        seen = tqdm(
            total=self.steps, initial=self.step, desc=self.description, unit="step", dynamic_ncols=True,
            disable=self.collectives.rank != 0, mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )  # fmt: skip
        with seen:
            self.started_window = time.monotonic()
            while self.step < self.steps:
                self._one_step(first)
                first = None
                self.step += 1
                self.window_steps += 1
                if self.step % self.train.log_every == 0 or self.step == self.steps:
                    seen.set_postfix(self._log(), refresh=False)
                seen.update()
                # Before the save, also at the end: a run that resumes from the last checkpoint shows nothing twice.
                if self.step == self.steps or (self.train.visual_every and self.step % self.train.visual_every == 0):
                    self._visualise()
                stop = self.collectives.any(health.stop_requested())
                if self.step % self.train.save_every == 0 or self.step == self.steps or stop:
                    self._save()
                if stop and self.step < self.steps:
                    logger.warning("stop signal: saved step %d; run again to resume", self.step)
                    raise health.StopRequested(self.step)

    def _one_step(self, first: dict[str, Any] | None) -> None:
        done = self.step + 1
        seed_generators(self.seed, done, self.collectives.rank)
        gathered: list[dict[str, Tensor]] = []
        applied = True
        for micro in range(self.engine.accumulation):
            self.watchdog.beat(done, "data")
            batch = first if first is not None and micro == 0 else self.collate(next(self.stream))
            self.watchdog.beat(done, "forward and backward")
            loss, metrics = self.engine.forward(batch)
            self.engine.backward(loss)
            self.watchdog.beat(done, "optimizer step")
            applied = self.engine.step(self.step, last=micro == self.engine.accumulation - 1)
            gathered.append({"loss": loss.detach(), **metrics})
        if not applied:
            self._skipped(done, gathered)
            return
        self.policy.applied()
        for metrics in gathered:
            self.window.add(metrics)
        self.window.add({"train/gradient_norm": self.engine.gradient_norm()})
        self.watchdog.beat(done, "after step")
        self.window.add(self.objective.after_step(done, self.engine))

    def _skipped(self, done: int, gathered: list[dict[str, Tensor]]) -> None:
        self.objective.discard_step()
        mine = sorted({name for metrics in gathered for name, value in metrics.items() if not bool(torch.isfinite(value).all())})
        everywhere = sorted({name for names in self.collectives.gather_object(mine) for name in names})
        self.policy.skipped(done, everywhere)

    def _log(self) -> dict[str, str]:
        values = self.window.take(self.collectives)
        values["train/learning_rate"] = learning_rate_at(self.step - 1, self.train, self.steps)
        values["train/skipped_steps"] = float(self.policy.total)
        line = {name: float(f"{value:.9g}") for name, value in values.items()}
        seconds = (time.monotonic() - self.started_window) / max(1, self.window_steps)
        speed = {
            "performance/step_seconds": seconds,
            "performance/clips_per_second": self.train.batch / max(seconds, 1e-9),
            "performance/memory_gib": self._peak_memory(),
        }
        self.started_window, self.window_steps = time.monotonic(), 0
        line.update({name: float(f"{value:.5g}") for name, value in speed.items()})
        if self.collectives.rank == 0:
            append_metrics(self.run / METRICS_FILE, self.step, line)
        self.monitor.scalars(line, self.step)
        loss = line.get("loss", math.nan)  # no step of the window was applied: no loss
        return {"loss": f"{loss:.4g}", "clips/s": f"{speed['performance/clips_per_second']:.3g}"}

    def _peak_memory(self) -> float:
        """GiB: of the GPU, or resident on a machine without; the highest of the ranks."""
        if self.engine.device.type == "cuda":
            mine = torch.cuda.max_memory_allocated() / 2**30
        else:
            mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return float(max(self.collectives.gather_object(mine)))

    def _visualise(self) -> None:
        self.watchdog.beat(self.step, "visuals")
        self.objective.visualise(self.step, self.engine, self.monitor)
        self.objective.train()
        self.monitor.flush()

    def _save(self) -> None:
        self.watchdog.beat(self.step, "checkpoint")
        self.monitor.flush()
        if self.collectives.rank == 0:
            sync_file(self.run / METRICS_FILE)  # a checkpoint never runs ahead of its curve
        state = {
            "step": self.step,
            "stream": self.stream.state_dict(),
            "window": self.window.state_dict(self.collectives),
            "skipped": [self.policy.total, self.policy.in_a_row],
            "seed": self.seed,
            "config": self.config,
        }
        checkpoint.save_checkpoint(self.engine, self.run, state, self.train.keep_checkpoints)

    def _finish(self) -> dict[str, float]:
        self.watchdog.beat(self.step, "export")
        state = self.engine.full_state_dict()
        metrics: dict[str, float] = {}
        if self.collectives.rank == 0:
            self.objective.export(self.run, state)
            metrics = last_metrics(self.run / METRICS_FILE)
            content = {
                "step": self.step, "metrics": metrics, "config": self.config, "data": self.stream.dataset.digest,
                "shards": contents(self.stream.dataset), "code": code_digest(),
            }  # fmt: skip
            write_atomically(self.run / DONE_FILE, (json.dumps(content, indent=1) + "\n").encode())
        metrics = self.collectives.broadcast_object(metrics)
        return metrics
