"""torchinfer: inference for PyTorch models on TPU, GPU and CPU."""

from typing import TYPE_CHECKING

from torchinfer.config import EngineConfig
from torchinfer.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    EngineError,
    OverloadedError,
    RequestError,
    StepMemoryError,
    TorchinferError,
    UnsupportedModelError,
)
from torchinfer.lazy import lazy_names
from torchinfer.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs, Usage

if TYPE_CHECKING:
    from torchinfer.async_engine import AsyncEngine, EventStream
    from torchinfer.llm import LLM, Output

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "EngineConfig",
    "EngineError",
    "EventStream",
    "FinishReason",
    "Output",
    "OverloadedError",
    "Request",
    "RequestError",
    "SamplingParams",
    "StepMemoryError",
    "TokenEvent",
    "TokenLogprobs",
    "TorchinferError",
    "UnsupportedModelError",
    "Usage",
    "__version__",
]

# Imported when first asked for: they bring torch, which `torchinfer --help` and clients can do without.
_HOMES = {
    "LLM": "torchinfer.llm",
    "Output": "torchinfer.llm",
    "AsyncEngine": "torchinfer.async_engine",
    "EventStream": "torchinfer.async_engine",
}
__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
