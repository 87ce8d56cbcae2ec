"""What a data set consists of, small enough to be kept with a position in it, and how another differs from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t2v_ds.data.manifest import digest_of

Contents = Mapping[str, Sequence[Any]]  # of each shard, by name: [clips, a hash]
_NAMED = 3  # shards that a sentence names


def contents(dataset: Any) -> dict[str, list[Any]]:
    """The contents of a data set of shards, as JSON can hold them; empty for one without."""
    return {shard.name: [shard.clips, digest_of([shard])[:16]] for shard in getattr(dataset, "shards", ())}


def describe_change(before: Contents, now: Contents) -> str:
    """What differs now, as the end of a sentence: "shards were added: b.tar (50 clips); changed: a.tar (50 clips, were 60)"."""
    added = [f"{name} ({now[name][0]} clips)" for name in now if name not in before]
    removed = [f"{name} ({before[name][0]} clips)" for name in before if name not in now]
    both = [name for name in now if name in before]
    changed = [f"{name} ({_clips(before[name][0], now[name][0])})" for name in both if list(before[name]) != list(now[name])]
    parts = [f"{what}: {_names(names)}" for what, names in (("added", added), ("removed", removed), ("changed", changed)) if names]
    if not parts:
        return "the shards are the same, but in another order, or other clips of them are used"
    return f"shards were {'; '.join(parts)}"


def _clips(before: int, now: int) -> str:
    return f"{now} clips" if now == before else f"{now} clips, were {before}"


def _names(names: list[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
