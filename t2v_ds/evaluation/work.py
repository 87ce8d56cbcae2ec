"""An evaluation's folder: what is asked for, what is measured already, and what is in the way.

    OUT/.work/settings.json, *.json, *.npz   while it runs: each file appears whole, and what is there is not made again
    OUT/report.json                          last of all: the folder is finished, and .work goes
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.errors import DataError
from t2v_ds.files import code_digest, require_writable, write_atomically

logger = logging.getLogger(__name__)

REPORT, PAGE, SHEET, EVENTS, WORK = "report.json", "report.md", "sheet.png", "tensorboard", ".work"


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by name as .npz, compressed, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type] # numpy's stubs take names of its own options for arrays'
    write_atomically(path, buffer.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `save_arrays` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


class Work:
    """What is measured already, in a folder that a restarted run finds again."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """Open `out`/.work, or begin it; what other code has begun is thrown away, because it may measure otherwise."""
        self.folder = out / WORK
        settings = self.folder / "settings.json"
        begun = {"identity": identity, "code": code_digest()}
        if self.folder.is_dir() and (not settings.is_file() or json.loads(settings.read_bytes()) != begun):
            logger.info("%s was begun by another version of t2v_ds: it begins anew", out)
            shutil.rmtree(self.folder)
        if not settings.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(settings, json.dumps(begun).encode())

    def values(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` returns, measured once."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_atomically(path, json.dumps(measure()).encode())
        return dict(json.loads(path.read_bytes()))

    def arrays(self, name: str, measure: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays that `measure` returns, measured once."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            save_arrays(path, measure())
        return load_arrays(path)


def check_out(out: Path) -> None:
    """Find out before anything is loaded whether a report can be written into `out`.

    Raises:
        DataError: it holds something else.
        ConfigError: it is a file, or no folder can be made there.
    """
    ours = {REPORT, PAGE, SHEET, EVENTS, WORK, *(f".{name}.tmp" for name in (REPORT, PAGE, SHEET))}
    strangers = sorted(path.name for path in out.iterdir() if path.name not in ours) if out.is_dir() else []
    if strangers:
        raise DataError(f"{out} holds other files ('{strangers[0]}'): choose a new or empty folder for the report")
    if not out.is_dir():
        require_writable("--out", out, folder=True)
    elif not (out / REPORT).is_file():
        require_writable("--out", out / REPORT)


def finished(out: Path, identity: dict[str, Any], again: bool) -> dict[str, Any] | None:
    """The report of `out` if it was made with these settings; None where there is still something to measure.

    Args:
        out: an evaluation's folder, which need not exist.
        identity: models, data and settings.
        again: throw away a report, or a part of one, that was made with others.

    Raises:
        DataError: made with others (names the first difference).
    """
    report, settings = out / REPORT, out / WORK / "settings.json"
    found = _read(report).get("identity") if report.is_file() else _read(settings).get("identity") if settings.is_file() else None
    if found is None:
        return None
    difference = next(_differences(found, identity), None)
    if difference is None and not (again and report.is_file()):
        return _read(report) if report.is_file() else None
    if not again:
        name, was, now = difference or ("", None, None)
        state = "holds a report" if report.is_file() else "holds a part of a report"
        raise DataError(f"{out} {state} with {name} {was!r}, this run has {now!r}: choose another folder, or again=true to measure anew")
    for path in (report, out / PAGE, out / SHEET):
        path.unlink(missing_ok=True)
    for folder in (out / WORK, out / EVENTS):
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it and run again") from error


def _differences(found: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value found, value asked for) of everything that differs."""
    for name in dict.fromkeys([*asked, *found]):
        was, now = found.get(name), asked.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}", was, now
