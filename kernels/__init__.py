"""Vector-quantization lookups, usable with nothing else of the project: `vq_lookup` and `vq_assign`."""

from .lookup import vq_assign, vq_lookup

__all__ = ["vq_assign", "vq_lookup"]
