"""The one kind of error a user is meant to read.

Everything that a user can cause and mend (a wrong key, a missing folder, a damaged file) is raised as `UserError`
with one sentence that says which file, key or flag, what was found and what is allowed. `t2v` prints that sentence
and exits with code 2, without a traceback. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input that the user can mend; `str(error)` is one clear sentence."""


class ConfigError(UserError):
    """A configuration key is unknown or its value is not allowed."""


class DataError(UserError):
    """A source, shard, manifest or index is missing, damaged or does not fit its contract."""


class CheckpointError(UserError):
    """A checkpoint or an exported model is missing, damaged or does not fit what it is used with."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one short line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the part of an error sentence that names the valid choices nearest to `name`.

    >>> nearest("widht", ["width", "layers"])
    "did you mean 'width'?"
    """
    valid = sorted(valid)
    matches = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if matches:
        return "did you mean " + " or ".join(f"'{match}'" for match in matches) + "?"
    return "valid: " + ", ".join(valid)
