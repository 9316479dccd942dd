"""Checkpoints: opening, checking, and filling a model from one; where they lie, and how fast that is."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchinfer.loader.checkpoint import Checkpoint
    from torchinfer.loader.options import LoadOptions
    from torchinfer.loader.weights import LoadReport, load_model, load_weights

__all__ = ["Checkpoint", "LoadOptions", "LoadReport", "load_model", "load_weights"]

# Imported when first asked for: they bring torch, which storage, and so a server's own process, can do without.
_LAZY = {
    "Checkpoint": "torchinfer.loader.checkpoint",
    "LoadOptions": "torchinfer.loader.options",
    "LoadReport": "torchinfer.loader.weights",
    "load_model": "torchinfer.loader.weights",
    "load_weights": "torchinfer.loader.weights",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'torchinfer.loader' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
