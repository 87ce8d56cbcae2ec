"""Compiled code of our own: `vq_lookup` and `vq_assign`, usable with nothing else of the project, and the readers `gif` and `clips`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lookup import vq_assign, vq_lookup

__all__ = ["vq_assign", "vq_lookup"]


def __getattr__(name: str) -> Any:
    """Import torch only when a lookup is asked for: the readers do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import lookup

    return getattr(lookup, name)
