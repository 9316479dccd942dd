"""EngineConfig and device names: what cannot be honoured is refused with the value and the rule."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from torchinfer import ConfigError, DeviceError, EngineConfig, quantization
from torchinfer.config import SCHEMES
from torchinfer.device import resolve_device
from torchinfer.startup import resolve_dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device='tpu' must be one of auto, cpu, cuda, xla"),
        ({"dtype": "int8"}, "dtype='int8' must be one of auto, bfloat16, float16, float32"),
        (
            {"kv_cache_dtype": "int4"},
            "kv_cache_dtype='int4' must be one of auto, bfloat16, float16, float32, int8, fp8",
        ),
        ({"moe_mode": "some"}, "moe_mode='some' must be one of dropless, capacity"),
        ({"max_num_requests": 0}, "max_num_requests=0 must be at least 1"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens=8 must be at least max_num_requests=64"),
        ({"page_size": 24}, "page_size=24 must be a power of two"),
        ({"max_model_len": 1}, "max_model_len=1 must be at least 2"),
        ({"kv_cache_memory": 0}, "kv_cache_memory=0 must be a share"),
        ({"kv_cache_memory": float("nan")}, "kv_cache_memory=nan must be a share"),
        ({"moe_capacity_factor": -1.0}, "moe_capacity_factor=-1.0 must be positive"),
        ({"quantization": 5}, "quantization=5 must be the name of a scheme, or a mapping from patterns to names"),
        ({"quantization": ["int8"]}, "quantization=['int8'] must be the name of a scheme"),
        ({"quantization": {"*": {"a": "int8"}}}, "quantization={'*': {'a': 'int8'}} must be the name of a scheme"),
        ({"quantization": {5: "int8"}}, "quantization={5: 'int8'} must be the name of a scheme"),
        ({"quantization": {}}, "quantization={} names no scheme"),
        ({"quantization": {"*": ["int8_w8a8"]}, "calibration": "text"}, "quantization={'*': ['int8_w8a8']} must be"),
        ({"calibration": 1, "quantization": "int8_w8a8"}, "calibration=1 must be a path"),
        ({"load_memory": "2GiB"}, "load_memory='2GiB' must be a whole number"),
        ({"page_size": 2.5}, "page_size=2.5 must be a whole number"),
        ({"max_model_len": True}, "max_model_len=True must be a whole number"),
        ({"kv_cache_memory": "1GiB"}, "kv_cache_memory='1GiB' must be a number"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be at least 1"),
        ({"expert_parallel": True}, "expert_parallel=True divides experts among chips, but tensor_parallel_size=1"),
        (
            {"tensor_parallel_size": 4, "quantization": "int8_w8a8", "calibration": "text"},
            "calibration='text' runs the model on one chip, not on 4: write a smoothed checkpoint",
        ),
        ({"prefix_cache": 1}, "prefix_cache=1 must be True or False"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(model="anywhere", **options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(model="anywhere", device="tpu", page_size=0)
    assert "device='tpu'" in str(error.value) and "page_size=0" in str(error.value)


def test_options_of_the_wrong_type_come_at_once_too() -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(model=7, page_size="16", quantization=5)  # type: ignore[arg-type]
    assert str(error.value).count("\n  - ") == 3


def test_the_schemes_that_help_names_are_those_that_there_are() -> None:
    assert tuple(quantization.SCHEMES) == SCHEMES


def test_cuda_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        assert resolve_device("cuda").type == "cuda"
        return
    with pytest.raises(DeviceError, match="device='cuda' was asked for, but torch sees no CUDA device"):
        resolve_device("cuda")


def test_xla_without_torch_xla_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="device='xla' needs torch_xla, which is not installed"):
        resolve_device("xla")


def test_a_checkpoint_in_float16_is_bfloat16_on_a_tpu_which_has_no_other() -> None:
    assert resolve_dtype("auto", {"torch_dtype": "float16"}) == torch.float16
    assert resolve_dtype("auto", {"torch_dtype": "float16"}, is_tpu=True) == torch.bfloat16
    assert resolve_dtype("auto", {"dtype": "float32"}, is_tpu=True) == torch.float32
    with pytest.raises(ConfigError, match=r"dtype='float16': a TPU has bfloat16 in its place; use dtype='bfloat16'"):
        resolve_dtype("float16", {}, is_tpu=True)
