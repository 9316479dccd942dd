"""Checkpoints: opening, checking, inspecting, and filling a model from one."""

from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.inspect import Inspection, inspect
from torchinfer.loader.options import LoadOptions
from torchinfer.loader.weights import LoadReport, load_model, load_weights

__all__ = ["Checkpoint", "Inspection", "LoadOptions", "LoadReport", "inspect", "load_model", "load_weights"]
