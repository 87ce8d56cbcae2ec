"""Trained threads -> one tokenizer.

    threads (one run a chunk, from one start) -> checked: complete, of one kind
      -> codebooks aligned to the first one's: the assignment of codes that moves the least usage over the least distance
      -> averaged: weights by the number of threads, codebook rows and their statistics by usage
      -> OUT/average -> train_vqvae over all chunks alike, from there (the cumulative step) -> OUT

Permuting a codebook changes nothing that a VQ-VAE computes, because its decoder reads rows and not their numbers; but rows can only
be averaged with their like (compare the permutation symmetries of Ainsworth et al. 2023, Git Re-Basin, section 2).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from t2v_ds.config import MergeConfig, VQVAERunConfig
from t2v_ds.config_loader import from_dict
from t2v_ds.data.manifest import Manifest
from t2v_ds.errors import CheckpointError, ConfigError
from t2v_ds.evaluation.forgetting import MERGED, measure_all, measured_clips, write_forgetting_report
from t2v_ds.losses import PerceptualDistance
from t2v_ds.models.exported import load_state
from t2v_ds.models.facade import Tokenizer, export_tokenizer, load_tokenizer
from t2v_ds.models.vqvae import VQVAE
from t2v_ds.training.distributed import connect
from t2v_ds.training.run import train_vqvae

logger = logging.getLogger(__name__)

CODEBOOK, USAGE, SUMS = "quantizer.codebook", "quantizer.usage", "quantizer.sums"
AVERAGE_FOLDER = "average"  # in the merged run's folder: the threads' average, from which the cumulative step starts


@dataclass
class Thread:
    """A finished run on one chunk."""

    folder: Path
    chunk: int
    settings: dict[str, Any]  # of the run, without what may differ between threads
    code: str  # names the sources that trained it
    tokenizer: Tokenizer

    @property
    def state(self) -> dict[str, Tensor]:
        """Its weights and codebook."""
        return dict(self.tokenizer.model.state_dict())


def load_thread(folder: str | Path) -> Thread:
    """Read a finished run of `train_vqvae`.

    Raises:
        CheckpointError: it is not finished, or not a run on one chunk.
    """
    folder = Path(folder)
    done = folder / "DONE"
    if not done.is_file():
        raise CheckpointError(f"thread {folder} is not finished: it has no DONE; run the same training command again to finish it")
    try:
        content = json.loads(done.read_text(encoding="utf-8"))
        settings, code = dict(content["config"]), str(content["code"])
        chunk = int(settings.pop("chunk"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{done} is damaged ({error}): delete it and run the same training command again") from error
    if chunk < 0:
        raise CheckpointError(f"{folder} was trained on all chunks; a thread is trained on one (chunk=0, chunk=1, ...)")
    return Thread(folder, chunk, settings, code, load_tokenizer(folder))


def check_threads(threads: list[Thread], chunks: list[int], allow_missing: bool) -> list[int]:
    """Refuse threads that do not belong together; returns the chunks that have none.

    Raises:
        ConfigError: two threads of one chunk, a chunk without a thread unless `allow_missing`, or a thread of a chunk that is not there.
        CheckpointError: threads trained with different settings (names the first) or by different code.
    """
    by_chunk: dict[int, Thread] = {}
    for thread in threads:
        if thread.chunk in by_chunk:
            raise ConfigError(f"{thread.folder} and {by_chunk[thread.chunk].folder} are both of chunk {thread.chunk}; name one a chunk")
        if thread.chunk not in chunks:
            raise ConfigError(f"thread {thread.folder} is of chunk {thread.chunk}; the data has chunks {chunks}")
        by_chunk[thread.chunk] = thread
        other = _first_difference(threads[0].settings, thread.settings)
        if other:
            raise CheckpointError(f"threads {threads[0].folder} and {thread.folder} differ in the setting '{other}'; train them alike")
        if thread.code != threads[0].code:
            raise CheckpointError(f"threads {threads[0].folder} and {thread.folder} were trained by different versions of t2v_ds")
    missing = [chunk for chunk in chunks if chunk not in by_chunk]
    if missing and not allow_missing:
        raise ConfigError(f"chunks {missing} have no thread; train them, or merge without them: allow_missing=true")
    return missing


def _first_difference(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> str:
    for name in sorted({*a, *b}):
        if isinstance(a.get(name), dict) and isinstance(b.get(name), dict):
            found = _first_difference(a[name], b[name], f"{prefix}{name}.")
            if found:
                return found
        elif a.get(name) != b.get(name):
            return f"{prefix}{name}"
    return ""


def align(codebook: Tensor, usage: Tensor, other: Tensor, other_usage: Tensor) -> Tensor:
    """Which row of `other` belongs to each row of `codebook`, both [K, D] with usage [K]: a permutation int64 [K].

    It minimises the sum of squared distances, each weighted by the mean of both rows' usage: that a code which both use much
    finds its like counts, where unused ones end up does not. (Hungarian method, by scipy.)
    """
    distances = torch.cdist(codebook.double(), other.double()).square()  # [K, K]
    shares = (usage / usage.sum())[:, None] + (other_usage / other_usage.sum())[None]
    _, columns = linear_sum_assignment((distances * shares).numpy())
    return torch.from_numpy(columns)


def average(states: list[dict[str, Tensor]], aligned: bool = True) -> tuple[dict[str, Tensor], list[int]]:
    """The average of the states of VQ-VAEs of one config, and the number of codes that alignment renumbered in each.

    Weights are averaged evenly. A codebook row is the mean of its like, weighted by usage, as if all threads' latents had moved one
    codebook: with moving averages, usage and sums add up and the row is their quotient.
    """
    first = states[0]
    moved, permuted = [], []
    for state in states:
        order = torch.arange(len(first[CODEBOOK]))
        if aligned:
            order = align(first[CODEBOOK], first[USAGE], state[CODEBOOK], state[USAGE])
        moved.append(int((order != torch.arange(len(order))).sum()))
        permuted.append({**state, **{name: state[name][order] for name in (CODEBOOK, USAGE, SUMS) if name in state}})
    merged = {
        name: torch.stack([state[name].double() for state in permuted]).mean(0).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }
    weights = torch.stack([state[USAGE].double() for state in permuted])  # [threads, K]
    rows = torch.stack([state[CODEBOOK].double() for state in permuted])  # [threads, K, D]
    merged[CODEBOOK] = ((weights[..., None] * rows).sum(0) / weights.sum(0).clamp_min(1e-12)[:, None]).float()
    if SUMS in merged:
        merged[SUMS] = merged[CODEBOOK] * merged[USAGE][:, None]
    return merged, moved


def merge(config: MergeConfig) -> dict[str, float]:
    """Merge threads into `config.out`, or go on where an earlier call stopped; every rank calls.

    Returns:
        The last metrics of the cumulative training.

    Raises:
        ConfigError, CheckpointError: see `load_thread` and `check_threads`.
    """
    for flag, value in (("--threads", config.threads), ("--data", config.data), ("--out", config.out)):
        if not value:
            raise ConfigError(f"{flag} is not given; name a folder")
    out = Path(config.out)
    collectives = connect()
    manifest = Manifest.load(config.data, "raw")
    unfinished = [folder for folder in config.threads if config.allow_missing and not (Path(folder) / "DONE").is_file()]
    threads = sorted((load_thread(folder) for folder in config.threads if folder not in unfinished), key=lambda thread: thread.chunk)
    if not threads:
        raise ConfigError(f"none of the threads {', '.join(unfinished)} is finished: there is nothing to merge")
    missing = check_threads(threads, [one["chunk"] for one in manifest.chunks], config.allow_missing)
    if collectives.rank == 0:
        state, moved = average([thread.state for thread in threads])
        export_tokenizer(out / AVERAGE_FOLDER, threads[0].tokenizer.model.config, state)
        logger.info("averaged %d threads; codes renumbered: %s", len(threads), ", ".join(map(str, moved)))
    collectives.barrier()
    run = _cumulative_run(config, threads[0])
    metrics = train_vqvae(run)
    if collectives.rank == 0:
        _report(config, run, threads, missing)
    collectives.barrier()
    return metrics


def _cumulative_run(config: MergeConfig, thread: Thread) -> VQVAERunConfig:
    """The training over all chunks alike that starts from the average."""
    run: VQVAERunConfig = from_dict(VQVAERunConfig, {**thread.settings, "start": ""}, f"{thread.folder}/DONE")
    train = dataclasses.replace(
        run.train, steps=config.steps, epochs=config.epochs, batch=config.batch or run.train.batch, micro_batch=config.micro_batch,
        learning_rate=config.learning_rate or run.train.learning_rate, ds_config=config.ds_config or run.train.ds_config,
        save_every=config.save_every,
    )  # fmt: skip
    start = str(Path(config.out) / AVERAGE_FOLDER)
    return dataclasses.replace(run, train=train, start=start, balance=True, data=config.data, out=config.out)


def _report(config: MergeConfig, run: VQVAERunConfig, threads: list[Thread], missing: list[int]) -> None:
    """Measure the threads, the averages and the merged model on held-out clips of every chunk; write report.md and heat_map.png."""
    out = Path(config.out)
    plain, _ = average([thread.state for thread in threads], aligned=False)
    model = VQVAE(run.model)
    load_state(model, plain, "the average")
    models = {f"thread of chunk {thread.chunk}": thread.tokenizer for thread in threads}
    models["average, codes not aligned"] = Tokenizer(model, "none", torch.device("cpu"))
    models["average, codes aligned"] = load_tokenizer(out / AVERAGE_FOLDER)
    models |= {folder: load_tokenizer(folder) for folder in config.compare}
    models[MERGED] = load_tokenizer(out)
    losses = run.losses
    network = PerceptualDistance(losses.perceptual_network, losses.perceptual_weights) if losses.perceptual else None
    names = [f"chunk {one['chunk']}" for one in Manifest.load(config.data, "raw").chunks]
    clips = dict(zip(names, measured_clips(config.data, run.held_out, config.measured_clips), strict=True))
    write_forgetting_report(out, measure_all(models, clips, network), bool(run.held_out), missing)
