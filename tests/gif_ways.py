"""The two ways in which `decode_gif` works, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from t2v_ds.kernels import gif as compiled

WAYS = ("compiled", "pillow")


@contextmanager
def decoding_by(way: str) -> Iterator[None]:
    """Within, GIFs are decoded by the compiled decoder, which has to be there, or by Pillow."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "pillow":
            patch.setattr(compiled, "_library", lambda: None)
        elif not compiled.available():
            raise RuntimeError("the GIF decoder does not compile here; the log says why")
        yield
