"""torchinfer: inference for PyTorch models on TPU, GPU and CPU."""

from torchinfer.async_engine import AsyncEngine, EventStream
from torchinfer.config import EngineConfig
from torchinfer.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    EngineError,
    OverloadedError,
    RequestError,
    TorchinferError,
    UnsupportedModelError,
)
from torchinfer.llm import LLM, Output
from torchinfer.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs, Usage

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
    "TokenEvent",
    "TokenLogprobs",
    "TorchinferError",
    "UnsupportedModelError",
    "Usage",
    "__version__",
]
