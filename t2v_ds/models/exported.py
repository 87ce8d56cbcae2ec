"""Trained models as folders: `config.json` + `model.safetensors`, written whole or not at all, loaded without DeepSpeed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from t2v_ds.errors import CheckpointError, nearest
from t2v_ds.files import write_atomically

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
METADATA_KEY = "t2v_ds"  # one only: safetensors writes several in random order, and equal exports shall be equal files


def export_model(folder: str | Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, which is made if missing.

    The weights name the config they belong to, so that a folder killed between the two renames is noticed when loaded,
    and carry a hash of themselves, so that a changed byte is: safetensors has none.

    Args:
        folder: where to write; other files in it are left alone.
        config: what `json` can write.
        state: tensors by name, any dtype; names that share one tensor are stored once.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in sorted(state.items()):
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            tied[name] = seen[identity]
            continue
        seen[identity] = name
        unique[name] = tensor.detach().cpu().contiguous().clone()
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    notes = {"tied": tied, "config_sha256": hashlib.sha256(text.encode()).hexdigest(), "content": content_id({}, state)}
    write_atomically(folder / WEIGHTS_FILE, save_bytes(unique, {METADATA_KEY: json.dumps(notes, sort_keys=True)}))
    write_atomically(folder / CONFIG_FILE, text.encode())


def load_exported(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a folder written by `export_model`: (config, tensors by name on the CPU).

    Raises:
        CheckpointError: missing, cut, damaged, or weights and config of two different exports.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no exported model: it has no {name}")
    try:
        text = (folder / CONFIG_FILE).read_bytes()
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} holds a {type(config).__name__}; expected an object")
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            notes = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            state.update({name: state[source] for name, source in notes.get("tied", {}).items()})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        size = (folder / WEIGHTS_FILE).stat().st_size
        raise CheckpointError(f"{folder / WEIGHTS_FILE} ({size} bytes) is cut or damaged: {error}; copy or train it again") from error
    if notes.get("content") not in (None, content_id({}, state)):
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is damaged: a byte has changed since it was written; copy or train it again")
    recorded = notes.get("config_sha256")
    if recorded is not None and recorded != hashlib.sha256(text).hexdigest():
        raise CheckpointError(
            f"{folder / CONFIG_FILE} was changed after {WEIGHTS_FILE} was written, or its export was interrupted: export again"
        )
    return config, state


def load_state(module: nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Copy `state` into `module`, whose every tensor it must name with the right shape.

    Raises:
        CheckpointError: a missing or unknown key, or a wrong shape; names it and `origin`.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise CheckpointError(f"{origin} lacks the tensor '{name}', which the model of its config needs")
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor '{name}' in {origin} has shape {list(state[name].shape)}; the model of its config needs {list(tensor.shape)}"
            )
    for name in state:
        if name not in own:
            raise CheckpointError(f"{origin} holds an unknown tensor '{name}': {nearest(name, own)}")
    module.load_state_dict(state)


def content_id(config: dict[str, Any], state: dict[str, Tensor]) -> str:
    """16 hex digits that name this config and these weights: equal content, equal id, on every machine."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]
