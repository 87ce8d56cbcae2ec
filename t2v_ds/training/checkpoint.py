"""Checkpoints that are complete or invisible, and the exact way back from them.

    save:  engine -> RUN/checkpoints/step_00000500.partial/native/  (DeepSpeed's own files, every rank)
                  +  state.json (step, stream position, config, ranks, ZeRO stage)
           all ranks done -> complete.json (size and sha256 of every file) -> rename to step_00000500 -> old ones deleted
    load:  newest folder with that name -> sizes and digests checked -> same ranks and stage: DeepSpeed loads its files;
           other ranks or stage: `portable` rebuilds whole tensors from them and the engine takes those in

DeepSpeed's files are pickles. They are read with `weights_only=True` and the few classes that DeepSpeed puts in them
allowed by name, so a checkpoint from elsewhere runs no code. Random state is not stored: the step loop derives it from
(seed, step, rank), so it is part of the position.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from t2v_ds.errors import CheckpointError
from t2v_ds.files import remove_folder, remove_temporaries, sync, write_atomically
from t2v_ds.training import portable
from t2v_ds.training.distributed import Collectives
from t2v_ds.training.engine import Engine

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
NATIVE = "native"
STATE_FILE = "state.json"
COMPLETE_FILE = "complete.json"
NAME = re.compile(r"step_(\d{8})")
FORMAT = 1

# Settings that may differ between a checkpoint and the run that resumes it: they do not change what was learned.
MAY_CHANGE = frozenset(
    [
        "out",
        "tokenizer",  # a path, kept by earlier versions; tokenizer_id is compared
        *(
            f"train.{key}"
            for key in "steps save_every log_every keep_checkpoints visual_every data_threads watchdog_s ds_config micro_batch".split()
        ),
        # Memory for time; the gradient stays.
        "model.activation_checkpointing",
        "model.loss_tile",
    ]
)
# Settings that checkpoints of earlier versions lack, and what they then were; None: what they are now.
ADDED = {
    "train.shard_window": 0,
    "length_buckets": 0,
    "tokenizer_id": None,
    "train.compile": False,
    "train.optimizer": "adamw",
    "train.sequence_parallel": 1,
    "context_confusion": 0.0,
    "model.head_ratio": 0,
}


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / COMPLETE_FILE).is_file())


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = checkpoints(run)
    return found[-1] if found else None


def remove_leftovers(run: Path) -> None:
    """Delete what killed saves and deletions left behind; call on one rank, before anything is saved."""
    folder = run / FOLDER
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.name.endswith((".partial", ".deleting")):
            shutil.rmtree(path, ignore_errors=True)
    remove_temporaries(run)


def remove_old(run: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints; call on one rank."""
    for old in checkpoints(run)[:-keep]:
        remove_folder(old)


def config_difference(saved: dict[str, Any], present: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs and may not: (dotted key, saved value, present value); None: none."""
    before, now = _flat(saved), _flat(present)
    for key in ADDED.keys() & now.keys():
        before.setdefault(key, now[key] if ADDED[key] is None else ADDED[key])
    if now.get("model.decoding") == "token" and "mask" in before:  # earlier versions had another default, which did nothing
        before["mask"] = now["mask"]
    for key in sorted(before.keys() | now.keys()):
        if key not in MAY_CHANGE and before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def check_config(saved: dict[str, Any], present: dict[str, Any], origin: Path) -> None:
    """Raise `CheckpointError` naming the first setting that differs from what `origin` was made with."""
    difference = config_difference(saved, present)
    if difference is not None:
        key, before, now = difference
        raise CheckpointError(
            f"setting '{key}' is {now!r} but {origin} was made with {before!r}: set it back, or choose another output folder"
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


# -- saving -------------------------------------------------------------------------------------------------------------


def save_checkpoint(engine: Engine, run: Path, state: dict[str, Any], keep: int) -> Path:
    """Save the engine and `state` as the checkpoint of `state["step"]`; all ranks call.

    Args:
        engine: what to save.
        run: the run's folder; on several nodes one that all of them see.
        state: what JSON can hold: at least `step`, `stream` and `config`.
        keep: how many of the newest checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    collectives = engine.collectives
    final = run / FOLDER / f"step_{state['step']:08d}"
    if collectives.broadcast_object(final.is_dir()):
        return final  # a finished run that is only extended or exported again
    partial = final.with_name(f"{final.name}.partial")
    if collectives.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    collectives.barrier()
    # DeepSpeed writes `latest` before the other ranks have finished and not atomically: never use it.
    with _as_full_disk(partial):
        engine.native.save_checkpoint(str(partial), tag=NATIVE, save_latest=False)
    if collectives.rank == 0:
        described = {
            "format": FORMAT,
            "world_size": collectives.world_size,
            "zero_stage": engine.stage,
            "groups": engine.group_names,
            **state,
        }
        (partial / STATE_FILE).write_text(json.dumps(described, indent=1), encoding="utf-8")
    collectives.barrier()
    files = _digests(partial, collectives)
    if collectives.rank == 0:
        write_atomically(partial / COMPLETE_FILE, json.dumps({"files": files}, indent=1).encode())
        os.replace(partial, final)
        sync(final.parent)
        remove_old(run, keep)
    collectives.barrier()
    return final


@contextlib.contextmanager
def _as_full_disk(partial: Path) -> Iterator[None]:
    """Turn what torch raises when its writer cannot write (a RuntimeError about positions) into a sentence."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise CheckpointError(
            f"checkpoint {partial.with_suffix('')} cannot be written: is the disk full, or a quota or file size limit reached? "
            "make room, then run the same command again"
        ) from error


def _digests(folder: Path, collectives: Collectives) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but `complete.json`; the ranks share the reading."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_FILE)
    names = collectives.broadcast_object(names)
    mine = {name: _digest(folder / name) for name in names[collectives.rank :: collectives.world_size]}
    return {name: entry for part in collectives.gather_object(mine) for name, entry in sorted(part.items())}


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


# -- loading ------------------------------------------------------------------------------------------------------------


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of a newer format.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read ({error}): {_advice(folder)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{folder / STATE_FILE} is not of format {FORMAT}, the one that this version reads")
    return state


def verify(folder: Path, collectives: Collectives) -> None:
    """Check sizes and digests of a complete checkpoint; all ranks call and all raise alike.

    Raises:
        CheckpointError: a file is missing or damaged; names it, its size, and what to do.
    """
    problem: str | None = None
    try:
        recorded = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        recorded, problem = {}, f"{folder / COMPLETE_FILE} cannot be read ({error})"
    for name in sorted(recorded)[collectives.rank :: collectives.world_size]:
        problem = problem or _problem(folder / name, recorded[name])
    found = [one for one in collectives.gather_object(problem) if one]
    if found:
        raise CheckpointError(f"checkpoint is damaged: {found[0]}; {_advice(folder)}")


def _problem(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing ({expected['size']} bytes expected)"
    size = path.stat().st_size
    if size != expected["size"]:
        return f"{path} has {size} bytes where {expected['size']} were written"
    if _digest(path)["sha256"] != expected["sha256"]:
        return f"{path} ({size} bytes) does not hold what was written (sha256 differs)"
    return None


def _advice(folder: Path) -> str:
    older = [path for path in checkpoints(folder.parent.parent) if path.name < folder.name]
    if older:
        return f"delete the folder {folder} and run again to go back to step {int(older[-1].name[5:])}"
    return f"delete the folder {folder} and run again to start over"


def load_checkpoint(engine: Engine, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Bring the engine to the state of a checkpoint and return its `state.json`; all ranks call.

    Same number of ranks and same ZeRO stage: exact, bit for bit. Others: every weight, buffer and moment is carried
    over exactly; sums over ranks are then taken in another order.

    Raises:
        CheckpointError: damaged files, or settings that differ (names the first).
    """
    verify(folder, engine.collectives)
    state = read_state(folder)
    check_config(state["config"], config, folder)
    same = state["world_size"] == engine.collectives.world_size and state["zero_stage"] == engine.stage
    try:
        with _safe_globals():
            if same and state["groups"] == engine.group_names:
                _load_native(engine, folder)
            else:
                logger.info(
                    "%s is of %d ranks at ZeRO stage %d; carrying it over to %d ranks at stage %d",
                    folder, state["world_size"], state["zero_stage"], engine.collectives.world_size, engine.stage,
                )  # fmt: skip
                portable.load(engine, folder / NATIVE, state)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"a file in {folder / NATIVE} holds what no checkpoint of ours does, and was not loaded: {error}") from error
    engine.collectives.barrier()
    return state


def _load_native(engine: Engine, folder: Path) -> None:
    engine.native.checkpoint_engine.load = _load_file  # DeepSpeed's own unpickles without limits
    path, _ = engine.native.load_checkpoint(str(folder), tag=NATIVE, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"DeepSpeed finds no checkpoint in {folder / NATIVE}: {_advice(folder)}")
    for group in engine.native.optimizer.param_groups:
        group["fused"] = engine.fused  # the checkpoint's is of the version and the device that wrote it


def _load_file(path: str, map_location: Any = None) -> Any:
    return torch.load(path, map_location=map_location, weights_only=True)


@contextlib.contextmanager
def _safe_globals() -> Iterator[None]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        yield
