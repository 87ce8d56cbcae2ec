"""The operators `torch.ops.t2v_vq.lookup` and `assign`: who computes them, their shapes for tracing, and their gradients.

    native.py: compiled for the CPU? -> its schema and its CPU implementation         else the schema here and reference.py for every device
               compiled for CUDA too? -> its CUDA implementation                      else reference.py for CUDA

Either way `torch.compile(fullgraph=True)`, autograd and `torch.library.opcheck` see the same two operators.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from . import native, reference

_SCHEMAS = (
    "lookup(Tensor latents, Tensor codebook, bool mark_bad) -> Tensor",
    "assign(Tensor latents, Tensor codebook, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)",
)
_libraries: list[torch.library.Library] = []  # registrations last as long as these
_lock = threading.Lock()


@torch.compiler.assume_constant_result
def ready() -> bool:
    """Define the operators, if that has not been done; the first call may compile them (seconds)."""
    with _lock:
        if not _libraries:
            _define()
    return True


def _define() -> None:
    compiled = native.available()
    library = torch.library.Library("t2v_vq", "FRAGMENT")
    _libraries.append(library)
    if not compiled:
        for schema in _SCHEMAS:
            library.define(schema)
    for device in ("CPU", "CUDA"):
        if device not in compiled:
            library.impl("lookup", _reference_lookup, device)
            library.impl("assign", _reference_assign, device)
    torch.library.register_fake("t2v_vq::lookup", _fake_lookup, lib=library)
    torch.library.register_fake("t2v_vq::assign", _fake_assign, lib=library)
    torch.library.register_autograd("t2v_vq::lookup", _no_gradient, lib=library)
    torch.library.register_autograd("t2v_vq::assign", _straight_through, setup_context=_keep_type, lib=library)


def _reference_lookup(latents: Tensor, codebook: Tensor, mark_bad: bool) -> Tensor:
    bad = (~torch.isfinite(codebook).all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"codebook row {int(bad[0])} holds NaN or infinity")
    codes = reference.lookup(latents.float(), codebook)
    if not mark_bad and len(codes) and int(codes.min()) < 0:
        raise ValueError(f"latents row {int((codes < 0).nonzero()[0])} holds NaN or infinity")
    return codes


def _reference_assign(latents: Tensor, codebook: Tensor, deterministic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = _reference_lookup(latents, codebook, False)
    quantized, counts, sums = reference.statistics(latents.float(), codebook, codes, deterministic)
    return quantized, codes, counts, sums


def _fake_lookup(latents: Tensor, codebook: Tensor, mark_bad: bool) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


def _fake_assign(latents: Tensor, codebook: Tensor, deterministic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = codebook.new_empty(latents.shape)
    return rows, latents.new_empty(latents.shape[0], dtype=torch.int64), codebook.new_empty(codebook.shape[0]), torch.empty_like(codebook)


def _no_gradient(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
    return None, None, None


def _keep_type(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[0].dtype


def _straight_through(ctx: Any, quantized: Tensor, *others: Tensor) -> tuple[Tensor, None, None]:
    """The gradient of the quantized rows goes to the latents as it is (van den Oord et al. 2017, section 3.2)."""
    return quantized.to(ctx.dtype), None, None
