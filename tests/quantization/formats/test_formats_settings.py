"""quantization_config as tools and publishers write it is understood, field by field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from torchinfer.quantization.formats import METHODS, read_format

ARGS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": "minmax",
    "observer_kwargs": {},
    "symmetric": True,
    "type": "float",
}
# As in the config.json of checkpoints that many use.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "qwen3 fp8": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "autofp8": {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"},
    "llama fbgemm": {
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["model.layers.0.self_attn.q_proj", "lm_head"],
        "quant_method": "fbgemm_fp8",
    },
    "fp8 dynamic": {
        "config_groups": {
            "group_0": {
                "input_activations": {**ARGS, "dynamic": True, "observer": None, "strategy": "token"},
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**ARGS, "strategy": "channel"},
            }
        },
        "format": "float-quantized",
        "global_compression_ratio": 1.46,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {
            "format": "dense",
            "global_sparsity": 0.14,
            "ignore": [],
            "registry_requires_subclass": False,
            "sparsity_structure": "unstructured",
            "targets": [],
        },
        "transform_config": {},
        "version": "0.12.2",
    },
    "gptq by autogptq": {
        "bits": 4,
        "damp_percent": 0.1,
        "desc_act": True,
        "group_size": 128,
        "model_file_base_name": "model",
        "model_name_or_path": None,
        "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.up_proj"]],
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    },
    "gptq by optimum": {
        "batch_size": 1,
        "bits": 8,
        "block_name_to_quantize": None,
        "cache_block_outputs": True,
        "damp_percent": 0.01,
        "dataset": None,
        "desc_act": False,
        "exllama_config": {"version": 1},
        "group_size": 128,
        "max_input_length": None,
        "model_seqlen": None,
        "module_name_preceding_first_block": None,
        "modules_in_block_to_quantize": None,
        "pad_token_id": None,
        "quant_method": "gptq",
        "sym": True,
        "tokenizer": None,
        "true_sequential": True,
        "use_cuda_fp16": False,
        "use_exllama": True,
    },
    "gptq by gptqmodel": {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": True,
        "dynamic": {"-:.*mlp.gate$": {}},
        "group_size": 32,
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:2.0.0"], "static_groups": False},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": True,
    },
    "awq": {
        "backend": "autoawq",
        "bits": 4,
        "do_fuse": False,
        "exllama_config": None,
        "fuse_max_seq_len": None,
        "group_size": 128,
        "modules_to_fuse": None,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
}
TRANSFORMERS = {
    "gptq": lambda: transformers.GPTQConfig(bits=4, desc_act=True),
    "awq": lambda: transformers.AwqConfig(),
    "fp8": lambda: transformers.FineGrainedFP8Config(),
    "fbgemm_fp8": lambda: transformers.FbgemmFp8Config(),
}
NO_TENSORS: dict[str, torch.dtype] = {}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_publishers_write_is_read(name):
    found = read_format(PUBLISHED[name], NO_TENSORS)
    assert found.method == PUBLISHED[name]["quant_method"]
    assert found.recipe("model.layers.1.mlp.up_proj") is not None


@pytest.mark.parametrize("method", TRANSFORMERS)
def test_what_transformers_writes_is_read(method):
    settings = {**TRANSFORMERS[method]().to_dict(), "quant_method": method}
    assert read_format(settings, NO_TENSORS).recipe("model.layers.1.mlp.up_proj") is not None


def test_every_method_has_a_published_example():
    assert {str(settings["quant_method"]) for settings in PUBLISHED.values()} == set(METHODS)
