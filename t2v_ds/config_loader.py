"""Filling the dataclasses of `config.py`: defaults <- YAML file <- `key=value` overrides.

An unknown key is an error that names the nearest valid ones; a value of the wrong type is one that names the key and
what is expected there. Ranges are checked by the dataclasses themselves.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from t2v_ds.config import PRESETS, PlanConfig, TransformerConfig, TransformerRunConfig, VQVAERunConfig
from t2v_ds.errors import ConfigError, nearest
from t2v_ds.files import is_url

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Build `cls` from its defaults, then a YAML file, then `key=value` overrides.

    Args:
        cls: one of the dataclasses of `config.py`.
        path: a YAML file whose keys are those of `cls`; None: defaults only.
        overrides: `a.b=value` strings; values are read as YAML.

    Raises:
        ConfigError: unreadable file, unknown key (names the nearest valid ones), wrong type, or value out of range.
    """
    data, origin = _read_settings(path, overrides)
    config = from_dict(cls, data, origin)
    _refuse_urls(config)
    return config


def load_plan(path: str | Path | None = None, overrides: Iterable[str] = ()) -> tuple[PlanConfig, TransformerRunConfig | VQVAERunConfig]:
    """Build a `PlanConfig` and the run that is planned, whose settings stand beside one another.

    The run is a VQVAERunConfig where more of the settings are ones of it, else a TransformerRunConfig.

    Raises:
        ConfigError: as `load_config`.
    """
    data, origin = _read_settings(path, overrides)
    own = [f.name for f in dataclasses.fields(PlanConfig)]
    rest = {key: value for key, value in data.items() if key not in own}
    vqvae = _unknown(VQVAERunConfig, rest) < _unknown(TransformerRunConfig, rest)
    cls: type[TransformerRunConfig] | type[VQVAERunConfig] = VQVAERunConfig if vqvae else TransformerRunConfig
    names = [f.name for f in dataclasses.fields(cls)]
    for key in rest:
        if key not in names:
            raise ConfigError(f"unknown setting '{key}' in {origin}: {nearest(key, [*names, *own])}")
    run: TransformerRunConfig | VQVAERunConfig = from_dict(cls, rest, origin)
    _refuse_urls(run)
    return from_dict(PlanConfig, {key: value for key, value in data.items() if key in own}, origin), run


def _unknown(cls: type[Any], data: dict[str, Any]) -> int:
    """How many keys, at any depth, are none of `cls`."""
    hints, count = typing.get_type_hints(cls), 0
    for key, value in data.items():
        if key not in hints:
            count += 1
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            count += _unknown(hints[key], value)
    return count


def _read_settings(path: str | Path | None, overrides: Iterable[str]) -> tuple[dict[str, Any], str]:
    """A YAML file with `key=value` overrides put into it, and what to call where a setting comes from."""
    data: dict[str, Any] = {}
    origin, overrides = "defaults", list(overrides)
    if path is not None:
        origin = str(path)
        data = _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{override}' is not of the form key=value, such as train.steps=100")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # ValueError: of a day that no month has, or of thousands of digits
            value = text
        _set_nested(data, key.split("."), value, override)
    if overrides:
        origin = f"{origin} or the command line" if path is not None else "the command line"
    return data, origin


def _refuse_urls(config: Any) -> None:
    """A URL where a folder must be: it would be taken for the name of one here."""
    for name in ("out", "data", "validation", "model", "tokenizer"):
        value = getattr(config, name, "")
        if isinstance(value, str) and is_url(value) and not (name == "data" and hasattr(config, "cache")):
            hint = "; only training reads data at URLs" if name in ("data", "validation") else ""
            raise ConfigError(f"setting '{name}' is {value}, a URL; allowed: a folder of this machine{hint}")


def from_dict(cls: type[T], data: dict[str, Any], origin: str = "config", prefix: str = "") -> T:
    """Build the dataclass `cls` from nested dictionaries; errors name `origin` and the dotted key."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if cls is TransformerConfig and isinstance(data.get("preset"), str) and data["preset"] in PRESETS:
        data = {**PRESETS[data["preset"]], **data}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if key not in names:
            choices = [f"{prefix}{name}" for name in names]
            raise ConfigError(f"unknown setting '{dotted}' in {origin}: {nearest(dotted, choices)}")
        values[key] = _coerce(hints[key], value, dotted, origin)
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config dataclass into plain dictionaries and lists, as written to `config.json` and YAML."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text") from error
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a day that no month has, or of thousands of digits
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} holds a {type(data).__name__}; expected settings as 'key: value'")
    return data


def _set_nested(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override '{override}': '{key}' is a value, not a group of settings")
        data = inner
    data[keys[-1]] = value


def _coerce(hint: Any, value: Any, key: str, origin: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"setting '{key}' in {origin} is {value!r}; expected a group of settings")
        return from_dict(typing.cast("type[Any]", hint), value, origin, prefix=f"{key}.")
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, one, key, origin) for one in items)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # pragma: no cover - no setting is a union today
        raise TypeError(f"{key}: unions are not supported")
    return _scalar(hint, value, key, origin)


def _scalar(hint: Any, value: Any, key: str, origin: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63 and value == int(value):
        return int(value)
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)  # also reads YAML's "1e-4", which is text to YAML 1.1
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint is str:
        if value is None:
            return ""
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    shown = repr(value)
    if isinstance(value, (int, float)) and len(shown) > 40:
        shown = f"{shown[:20]}... ({len(shown)} characters)"
    bounds = " below 2^63" if hint is int and isinstance(value, (int, float)) and abs(value) >= 2**63 else ""
    raise ConfigError(f"setting '{key}' in {origin} is {shown}; expected {names[hint]}{bounds}")


def resolve_recipe(name: str) -> Path:
    """A recipe's file: a path as it is, or the name of one in `configs/` (such as "demo").

    Raises:
        ConfigError: there is no such file; names the recipes that there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    recipes = {file.name.removesuffix(".yaml"): file for file in _recipe_files()}
    if name not in recipes:
        raise ConfigError(f"--config is {name!r}, which is no file and no recipe: {nearest(name, recipes)}")
    return recipes[name]


def _recipe_files() -> list[Path]:
    """The YAML files of `configs/`: in a checkout beside the package, in an installation inside it."""
    for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs"):
        files = sorted(folder.glob("*.yaml"))
        if files:
            return files
    return []
