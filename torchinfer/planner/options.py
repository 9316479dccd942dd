"""What `torchinfer plan` is asked for, and its flags. Values are checked with the model, in planner.py, all at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchinfer.config import DTYPES, KV_CACHE_DTYPES, SCHEMES, Quantization
from torchinfer.flags import FlagSet

Numbers = tuple[int, ...]  # the command line takes 8,64,256
ALL = "all"
KINDS = ("v5e", "v5p", "h200", "h100", "l4", ALL)

EXAMPLES = """examples:
  torchinfer plan --model path/to/checkpoint
  torchinfer plan --model path/to/config.json --quantization int8 --kv-cache int8 --accelerator v5e
  torchinfer plan --model path/to/config.json --accelerator v5p --topology 2x2x1 --context 8192 --price 2.10
  torchinfer plan --model path/to/config.json --quantization int8 --accelerator v5e --compile --batch 8,64
  torchinfer plan --model path/to/config.json --quantization int8 --plot plan.svg --json | jq .placements

Needs config.json and nothing else: no weights, no accelerator. docs/planning.md tells how to read the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Which model, held how, on what."""

    model: str | Path
    quantization: Quantization | None = None
    kv_cache_dtype: str = "auto"
    dtype: str = "auto"
    expert_parallel: bool = False  # chips have some of the experts each, whole, not a part of each
    context: int | None = None  # tokens of a request; None: 4,096, or the model's context if that is less
    accelerator: str = ALL
    topology: str | None = None  # None: the smallest that fits
    price: float | None = None  # USD for a chip and hour; None: prices.toml
    max_num_batched_tokens: int = 512
    page_size: int | None = None  # None: the engine's default on each kind of chip
    plot: str | Path | None = None  # SVG file to write
    compile: bool = False  # with the TPU's own compiler
    batch: Numbers = ()  # requests of each decode step that is compiled; none: 64, or what fits if that is less
    compile_seconds: float = 900.0  # for each program


PLAN = FlagSet(
    PlanOptions,
    "plan options",
    {
        "model": "config.json of a Hugging Face checkpoint, or a folder or gs://bucket/prefix that has one",
        "quantization": f"weights: {', '.join(SCHEMES)}, none; with a pattern for the layers that it fits; repeatable "
        "(default: as the checkpoint has them)",
        "kv_cache_dtype": "of the KV cache; auto: the model's",
        "dtype": "of weights that are not quantized, and activations; auto: the checkpoint's, for TPU bfloat16 in "
        "place of float16",
        "expert_parallel": "chips have some of the experts each, whole, not a part of each",
        "context": "tokens of a request, prompt and output together (default: 4096, or the model's context if less)",
        "accelerator": "kind of chip",
        "topology": "chips that hold the model: 2x4 on v5e, 2x2x1 on v5p, a number of GPUs (default: the smallest "
        "that fits)",
        "price": "USD for a chip and hour (default: list prices, with their date in the output)",
        "max_num_batched_tokens": "tokens of a prompt that one step computes",
        "page_size": "tokens in a page of the KV cache, a power of two (default: 128 for a TPU's kernel, else 16)",
        "plot": "write an SVG: tokens a second and memory against the batch",
        "compile": "compile decode steps and a prefill step with the TPU's own compiler, which needs no TPU",
        "batch": "requests of each decode step that is compiled, such as 8,64,256 (default: 64, or what fits if that "
        "is less)",
        "compile_seconds": "give up a program after so long",
    },
    choices={"kv_cache_dtype": KV_CACHE_DTYPES, "dtype": DTYPES, "accelerator": KINDS},
    names={"kv_cache_dtype": ("--kv-cache", "--kv-cache-dtype")},
)
