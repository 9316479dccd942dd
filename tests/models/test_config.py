"""Reading config.json as transformers 4.57 and 5 write it, and refusing what cannot be computed."""

import logging

import pytest
import torch

from torchinfer.errors import ConfigError, UnsupportedModelError
from torchinfer.models import ARCHITECTURES, build_model
from torchinfer.models.config import ModelConfig
from torchinfer.testing import TINY, tiny_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
GEMMA3 = {
    **LLAMA,
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 6,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}


def refusal(raw):
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_dict(raw)
    return str(caught.value)


def test_older_and_newer_rope_keys_read_the_same():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    oldest = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}}
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}
    newer = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
    assert ModelConfig.from_dict(oldest) == ModelConfig.from_dict(older) == ModelConfig.from_dict(newer)
    assert ModelConfig.from_dict(newer).rope.theta == 5e5


def test_gemma3_older_and_newer_rope_keys_read_the_same():
    linear = {"rope_type": "linear", "factor": 8.0}
    older = {**GEMMA3, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear}
    nested = {
        "full_attention": {"rope_theta": 1e6, **linear},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    newer = ModelConfig.from_dict({**GEMMA3, "rope_parameters": nested})
    older = ModelConfig.from_dict(older)
    assert (older.rope.factor, older.rope.theta) == (newer.rope.factor, newer.rope.theta) == (8.0, 1e6)
    assert older.local_rope.theta == newer.local_rope.theta == 1e4
    assert older.local_rope.kind == newer.local_rope.kind == "default"


def test_gemma3_sees_everything_in_every_sixth_layer():
    assert ModelConfig.from_dict(GEMMA3).windows == (32, 32, 32, 32, 32, None)


def test_layer_types_decide_the_windows():
    raw = {**GEMMA3, "layer_types": ["full_attention", "sliding_attention"] * 3}
    assert ModelConfig.from_dict(raw).windows == (None, 32) * 3


def test_mistral_without_the_key_has_transformers_default_window():
    raw = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert ModelConfig.from_dict(raw).windows == (4096, 4096)


def test_mistral_with_null_has_no_window():
    raw = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert ModelConfig.from_dict(raw).windows == (None, None)


def test_qwen2_window_is_off_unless_switched_on():
    raw = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert ModelConfig.from_dict(raw).windows == (None, None)
    assert ModelConfig.from_dict({**raw, "use_sliding_window": True}).windows == (None, 8)


def test_number_of_experts_under_the_name_of_transformers_5():
    raw = {
        **LLAMA,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    assert ModelConfig.from_dict(raw).moe.num_experts == 6


def test_hidden_activation_of_gemma_corrects_hidden_act():
    raw = {**LLAMA, "architectures": ["GemmaForCausalLM"], "head_dim": 16, "hidden_act": "gelu"}
    assert ModelConfig.from_dict(raw).activation == "gelu"
    assert ModelConfig.from_dict({**raw, "hidden_activation": "gelu_pytorch_tanh"}).activation == "gelu_tanh"


def test_linear_and_dynamic_scaling_extend_the_context():
    for kind in ("linear", "dynamic"):
        raw = {**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 4.0}}
        assert ModelConfig.from_dict(raw).context_length == 2048


def test_only_dynamic_scaling_depends_on_length():
    dynamic = {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    assert ModelConfig.from_dict(dynamic).rope_depends_on_length
    assert not ModelConfig.from_dict(LLAMA).rope_depends_on_length


def test_unknown_architecture_is_refused_with_the_known_ones():
    message = refusal({**LLAMA, "architectures": ["BertModel"]})
    assert "BertModel" in message
    assert all(name in message for name in ARCHITECTURES)


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", 3])
def test_architectures_must_be_a_list(names):
    assert repr(names) in refusal({**LLAMA, "architectures": names})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": -64}, "hidden_size=-64"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"hidden_size": 64.0}, "hidden_size=64.0"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads=5"),
        ({"hidden_size": 60}, "15 values"),
        ({"hidden_act": "relu2"}, "'relu2'"),
        ({"hidden_act": 7}, "hidden_act=7"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_theta": 0.5, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta=0.5"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "more than 2"),
        ({"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_refusals_name_the_value(change, expected):
    assert expected in refusal({**LLAMA, **change})


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({**GEMMA3, "layer_types": ["full_attention"]}, "layer_types"),
        ({**GEMMA3, "layer_types": ["full_attention"] * 5 + ["chunked"]}, "chunked"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({**MIXTRAL, "num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ({**LLAMA, "architectures": ["FalconForCausalLM"], "alibi": True}, "alibi=True"),
        ({**LLAMA, "architectures": ["FalconForCausalLM"], "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ({"architectures": ["GPTJForCausalLM"], "n_embd": 64, "n_head": 4, "rotary_dim": 18}, "rotary_dim=18"),
    ],
)
def test_refusals_of_families(raw, expected):
    assert expected in refusal(raw)


def test_all_problems_come_at_once():
    message = refusal({**LLAMA, "vocab_size": 0, "hidden_act": "relu2", "rope_theta": -1.0})
    assert all(text in message for text in ("vocab_size=0", "'relu2'", "rope_theta=-1.0"))


def test_missing_keys_are_named():
    raw = {key: value for key, value in LLAMA.items() if key not in ("vocab_size", "intermediate_size")}
    message = refusal(raw)
    assert "vocab_size=None" in message
    assert "intermediate_size=None" in message


def test_unknown_keys_are_logged_once_together(caplog):
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_dict({**LLAMA, "use_magic": True, "another": 1, "torch_dtype": "bfloat16"})
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: keys without effect here: another, use_magic"
    ]


def test_usual_keys_are_silent(caplog):
    usual = {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
        "transformers_version": "5.10.1",
        "pretraining_tp": 1,
    }
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_dict({**LLAMA, **usual})
    assert not caplog.records


def test_capacity_of_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        build_model(ModelConfig.from_dict(LLAMA), moe_mode="capacity")


@pytest.mark.parametrize("name", {kind: name for name, (kind, _) in TINY.items()}.values())
def test_any_value_in_any_key_is_read_or_refused(name):
    raw = tiny_config(name).to_dict()
    raw["architectures"] = [TINY[name][0].removesuffix("Config").removesuffix("Text") + "ForCausalLM"]
    for key in raw:
        for value in (None, True, -1, 0, 3, 0.5, "x", [], ["x"], {}, {"rope_type": "yarn"}, {"rope_type": []}):
            try:
                config = ModelConfig.from_dict({**raw, key: value})
            except UnsupportedModelError:
                continue
            with torch.device("meta"):
                build_model(config)


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 2**62), ("vocab_size", 10**30), ("num_hidden_layers", 10**6)]
)
def test_an_absurd_size_is_refused_before_anything_is_built(key, value):
    raw = tiny_config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"], key: value}
    with pytest.raises(UnsupportedModelError, match=f"{key}={value} must be an integer from 1 to"):
        ModelConfig.from_dict(raw)
