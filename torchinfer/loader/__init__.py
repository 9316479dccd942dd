"""Checkpoints: opening, checking, and filling a model from one; where they lie, and how fast that is."""

from typing import TYPE_CHECKING

from torchinfer.lazy import lazy_names

if TYPE_CHECKING:
    from torchinfer.loader.checkpoint import Checkpoint
    from torchinfer.loader.options import LoadOptions
    from torchinfer.loader.weights import LoadReport, load_model, load_weights

__all__ = ["Checkpoint", "LoadOptions", "LoadReport", "load_model", "load_weights"]

# Imported when first asked for: they bring torch, which storage, and so a server's own process, can do without.
_HOMES = {
    "Checkpoint": "torchinfer.loader.checkpoint",
    "LoadOptions": "torchinfer.loader.options",
    "LoadReport": "torchinfer.loader.weights",
    "load_model": "torchinfer.loader.weights",
    "load_weights": "torchinfer.loader.weights",
}
__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
