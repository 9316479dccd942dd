"""Shipped helpers of the tests: tolerances, random checkpoints, batches made by hand, a driver without an engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchinfer import kernels
from torchinfer.batch import Batch, KVCache
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from torchinfer.models.decoder import Decoder

# (relative, absolute), for values of size about one: a few units of rounding after a few layers.
TOLERANCES = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (5e-3, 5e-3),
    torch.bfloat16: (3e-2, 3e-2),
}

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPTJ_SIZES = {"vocab_size": 160, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 8}
FALCON_SIZES = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MOE_SIZES = {**SIZES, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8.0, "truncate": False}
# Name of a tiny model -> (transformers' config class, its arguments). Every architecture has at least one.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama-tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-odd": (
        "LlamaConfig",
        {**SIZES, "hidden_size": 66, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10},
    ),
    "llama-one-key-head": ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}),
    "llama-llama3": ("LlamaConfig", {**SIZES, "rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-linear": ("LlamaConfig", {**SIZES, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-dynamic": (
        "LlamaConfig",
        {**SIZES, "max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "llama-yarn": ("LlamaConfig", {**SIZES, "max_position_embeddings": 128, "rope_scaling": YARN}),
    "llama-yarn-mscale": ("LlamaConfig", {**SIZES, "max_position_embeddings": 128, "rope_scaling": MSCALE}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 8}),
    "mistral-full": ("MistralConfig", {**SIZES, "sliding_window": None}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen2-window": (
        "Qwen2Config",
        {**SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 24}),
    "qwen3-tied": ("Qwen3Config", {**SIZES, "head_dim": 32, "tie_word_embeddings": True, "attention_bias": True}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 24}),
    "gemma2": (
        "Gemma2Config",
        {
            **SIZES,
            "head_dim": 24,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **SIZES,
            "num_hidden_layers": 7,
            "head_dim": 24,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gptj": ("GPTJConfig", GPTJ_SIZES),
    "gptj-inner": ("GPTJConfig", {**GPTJ_SIZES, "n_inner": 72, "rotary_dim": 16}),
    "falcon-7b": ("FalconConfig", FALCON_SIZES),
    "falcon-new": (
        "FalconConfig",
        {**FALCON_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 72},
    ),
    "falcon-new-one-norm": (
        "FalconConfig",
        {**FALCON_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-sequential": (
        "FalconConfig",
        {**FALCON_SIZES, "parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False},
    ),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "sliding_window": 8}),
    "qwen2-moe": ("Qwen2MoeConfig", {**MOE_SIZES, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]}),
    "qwen2-moe-window": (
        "Qwen2MoeConfig",
        {**MOE_SIZES, "use_sliding_window": True, "sliding_window": 8, "norm_topk_prob": True},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE_SIZES, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3-moe-mixed": ("Qwen3MoeConfig", {**MOE_SIZES, "head_dim": 24, "decoder_sparse_step": 2}),
}


def tiny_config(name: str) -> Any:
    """The transformers config of a tiny model."""
    import transformers

    kind, arguments = TINY[name]
    # Deep, because transformers 4.57 writes into rope_scaling.
    return getattr(transformers, kind)(**copy.deepcopy(arguments))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare with the tolerance of `dtype`, by default the dtype of `actual`; NaN equals nothing."""
    relative, absolute = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=absolute)


def random_matrix(scheme: str, outputs: int, inputs: int, seed: int = 0) -> QuantizedWeight:
    """[outputs, inputs] of random numbers in a scheme, on the CPU; the same for the same seed."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) / inputs**0.5
    return SCHEMES[scheme].weight(dict(SCHEMES[scheme].pack(weight)), inputs, ())


def moved(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    """The same matrix on another device."""
    tensors = {name: getattr(weight, name) for name in ("values", "scale", "zero", "input_scale")}
    return replace(weight, **{name: t.to(device) for name, t in tensors.items() if t is not None})


def exact_product(
    x: Tensor,  # [N, I]
    weight: QuantizedWeight,  # [O, I], one part
) -> Tensor:  # float64 [N, O]
    """x times the transposed matrix, with inputs rounded as the matrix asks."""
    inputs = x.double()
    if weight.activations != "none":
        group = weight.input_group or x.shape[1]
        inputs = torch.cat([_rounded(part.float(), weight) for part in torch.split(x, group, 1)], 1)
    return inputs @ kernels.dequantize(weight).double().T


def _rounded(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """float64 of what 8 bits leave of inputs that share a scale."""
    is_int8 = weight.activations == "int8"
    least, largest = (-128.0, 127.0) if is_int8 else (-448.0, 448.0)
    own = (x.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    scale = own if weight.input_scale is None else weight.input_scale
    numbers = (x / scale).clamp(least, largest)
    return (numbers.round() if is_int8 else numbers.to(torch.float8_e4m3fn)).double() * scale.double()


def rows_beside_nan(rows: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random rows of a wider tensor, in which NaN lies between them."""
    wide = torch.full((rows, inputs + 8), float("nan"), dtype=dtype)
    wide[:, :inputs] = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(7))
    return wide[:, :inputs]


def save_random_checkpoint(
    config: Any,  # a transformers config
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Write a random model of a transformers config to `folder` and return the transformers model.

    Every tensor is random, norms and biases too, so that one which is left out or swapped shows.
    """
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_random_values(name, noise))
    model.save_pretrained(folder, safe_serialization=True)
    return model


def _random_values(name: str, noise: Tensor) -> Tensor:
    """Matrices keep the size of what they multiply; norms stay near one (Gemma's weights are differences from it)."""
    if noise.ndim > 1:
        is_table = "embed" in name or "wte" in name
        return noise * (0.5 if is_table else 1.2 / noise.shape[-1] ** 0.5)
    return noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of a step: its new tokens, how many are in the cache already, and its pages."""

    tokens: Sequence[int]
    num_cached: int
    pages: Sequence[int]
    prompt_length: int


def make_batch(
    rows: Sequence[Row],
    page_size: int,
    *,
    num_padded_tokens: int = 0,
    num_padded_rows: int = 0,
    is_static: bool = False,
    device: torch.device | str = "cpu",
) -> Batch:
    """The batch of a step, decode rows first; `is_static` leaves out what only the host knows, as for XLA."""
    num_rows = len(rows) + num_padded_rows
    columns = _token_columns(rows, page_size)
    for name, padding in (("tokens", 0), ("positions", 0), ("slot", 0), ("row", num_rows - 1), ("rope_length", 1)):
        columns[name] += [padding] * num_padded_tokens
    starts = [0, *accumulate(len(row.tokens) for row in rows)]
    lengths = [row.num_cached + len(row.tokens) for row in rows]
    width = max(len(row.pages) for row in rows)
    table = [[*row.pages] + [0] * (width - len(row.pages)) for row in rows] + [[0] * width] * num_padded_rows

    def tensor(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    num_decodes = next((i for i, row in enumerate(rows) if len(row.tokens) > 1), len(rows))
    prefills = tuple((i, starts[i], starts[i + 1], lengths[i]) for i in range(num_decodes, len(rows)))
    return Batch(
        **{name: tensor(values) for name, values in columns.items()},
        query_start=tensor(starts + [starts[-1]] * num_padded_rows),
        kv_length=tensor(lengths + [0] * num_padded_rows),
        page_table=tensor(table),
        page_size=page_size,
        num_decodes=None if is_static else num_decodes,
        max_decode_kv_length=None if is_static else max(lengths[:num_decodes], default=0),
        prefills=None if is_static else prefills,
    )


def _token_columns(rows: Sequence[Row], page_size: int) -> dict[str, list[int]]:
    """The fields of `Batch` that have a value for each token."""
    columns: dict[str, list[int]] = {name: [] for name in ("tokens", "positions", "slot", "row", "rope_length")}
    for index, row in enumerate(rows):
        for position, token in enumerate(row.tokens, row.num_cached):
            columns["tokens"].append(token)
            columns["positions"].append(position)
            columns["slot"].append(row.pages[position // page_size] * page_size + position % page_size)
            columns["row"].append(index)
            columns["rope_length"].append(max(row.prompt_length, position + 1))
    return columns


def poisoned_cache(
    shape: tuple[int, ...],  # (2, P, page_size, K, D)
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> KVCache:
    """A cache that makes NaN of every result that a slot which nobody wrote takes part in."""
    is_scaled = dtype in (torch.int8, torch.float8_e4m3fn)
    poison = 127 if dtype == torch.int8 else torch.nan
    # Made on the CPU: not every device can fill a tensor of 8 bits with NaN.
    data = torch.full(shape, poison).to(dtype).to(device)
    return KVCache(data, torch.full(shape[:-1], torch.nan, device=device) if is_scaled else None)


@dataclass(slots=True)
class _Sequence:
    prompt_length: int
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)


class PagedDriver:
    """Runs a model over a paged cache without an engine. Pages are handed out in a scattered order and hold NaN.

    kv_cache_dtype: the model's dtype if None.
    """

    def __init__(
        self,
        model: Decoder,
        num_pages: int = 128,
        page_size: int = 8,
        seed: int = 0,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.page_size = model, page_size
        config, parameter = model.config, next(model.parameters())
        shape = (2, num_pages, page_size, config.num_kv_heads, config.head_dim)
        dtype = kv_cache_dtype or parameter.dtype
        self.kv_caches = [poisoned_cache(shape, dtype, parameter.device) for _ in range(config.num_layers)]
        order = torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(seed)) + 1
        self.free_pages: list[int] = order.tolist()
        self.sequences: dict[str, _Sequence] = {}

    @torch.inference_mode()
    def step(
        self, chunks: Mapping[str, Sequence[int]], prompt_lengths: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Compute the next tokens of some sequences, named by keys of their own: their logits [tokens, vocab].

        prompt_lengths: of sequences that begin and whose prompt comes in chunks; else the chunk is the prompt.
        """
        rows = {name: self._row(name, chunks[name], prompt_lengths or {}) for name in chunks}
        ordered = sorted(rows, key=lambda name: len(rows[name].tokens) > 1)
        device = self.kv_caches[0].data.device
        batch = make_batch([rows[name] for name in ordered], self.page_size, device=device)
        logits = self.model.logits(self.model(batch, self.kv_caches))
        parts = logits.split_with_sizes([len(rows[name].tokens) for name in ordered])
        return dict(zip(ordered, parts, strict=True))

    def greedy(self, prompts: Mapping[str, Sequence[int]], num_tokens: int) -> dict[str, list[int]]:
        """The most probable continuation of each prompt, all in one batch."""
        logits = self.step(prompts)
        results: dict[str, list[int]] = {name: [] for name in prompts}
        for _ in range(num_tokens):
            for name, values in logits.items():
                results[name].append(int(values[-1].argmax()))
            logits = self.step({name: ids[-1:] for name, ids in results.items()})
        return results

    def _row(self, name: str, tokens: Sequence[int], prompt_lengths: Mapping[str, int]) -> Row:
        if name not in self.sequences:
            self.sequences[name] = _Sequence(prompt_lengths.get(name, len(tokens)))
        sequence = self.sequences[name]
        row_start = sequence.num_cached
        sequence.num_cached += len(tokens)
        while len(sequence.pages) * self.page_size < sequence.num_cached:
            sequence.pages.append(self.free_pages.pop())
        return Row(tokens, row_start, sequence.pages, sequence.prompt_length)
