"""Text-to-video models on animated GIFs: from a folder of GIFs to a model that draws GIFs.

    import t2v_ds
    tokenizer = t2v_ds.load_tokenizer("runs/demo/tokenizer")
    codes = tokenizer.encode(frames)                      # uint8 [T, H, W, 3] -> uint16 [T, h, w]
    generator = t2v_ds.load_generator("runs/demo/generator")
    [clip] = generator.generate("a red circle moves right")   # uint8 [T, H, W, 3]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2v_ds.models.facade import Generator, Tokenizer, load_generator, load_tokenizer

__version__ = "0.1.0"
__all__ = ["Generator", "Tokenizer", "__version__", "load_generator", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Import the models only when they are asked for: worker processes that decode GIFs need no torch."""
    if name in __all__:
        from t2v_ds.models import facade

        return getattr(facade, name)
    raise AttributeError(f"module 't2v_ds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
