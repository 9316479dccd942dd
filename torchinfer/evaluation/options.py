"""What `torchinfer eval` is asked for, and its flags. Values are checked with the files, in inputs.py, all at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchinfer.config import DEVICES, DTYPES, SCHEMES, Size
from torchinfer.flags import FlagSet

REFERENCE_DTYPES = ("float32", "float16")
Names = tuple[str, ...]  # the command line takes A,B,C

EXAMPLES = """examples:
  torchinfer eval --model path/to/checkpoint --text held-out.txt
  torchinfer eval --model path/to/checkpoint --text held-out.txt --schemes none,int8,int4 --kv auto,int8 --json
  torchinfer eval --model path/to/checkpoint --text book.txt --context 8192 --max-tokens 65536 --report report.html

The model as it is stored, with a KV cache of its own dtype, is always measured first: it is the reference.
docs/evaluation.md tells how to read the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """What to measure, on which text, and where."""

    model: str | Path
    text: str | Path  # a file in UTF-8
    schemes: Names = ("none",)  # of weights
    kv: Names = ("auto",)  # dtypes of the KV cache; auto: the model's
    context: int | None = None  # tokens of a window; None: the model's context, at most 2,048
    stride: int | None = None  # tokens between the beginnings of two windows; None: no overlap but one token
    max_tokens: int = 16384  # of the text
    report: str | Path | None = None  # HTML file to write
    reference_dtype: str = "float32"  # of the reference's logits on disk
    scratch: str | Path | None = None  # folder for them; None: the system's
    device: str = "auto"
    dtype: str = "auto"
    page_size: int | None = None
    max_num_batched_tokens: int = 512
    load_memory: Size | None = None
    progress: bool = True


EVALUATION = FlagSet(
    EvaluationOptions,
    "evaluation options",
    {
        "model": "folder of a Hugging Face checkpoint",
        "text": "file in UTF-8 that the model was not trained on",
        "schemes": f"weight schemes to compare: none, {', '.join(SCHEMES)}",
        "kv": "dtypes of the KV cache to compare, each with each scheme; auto: the model's",
        "context": "tokens of a window (default: the model's context, at most 2048)",
        "stride": "tokens between the beginnings of two windows (default: windows share one token)",
        "max_tokens": "evaluate the first N tokens of the text",
        "report": "write an HTML file with plots",
        "reference_dtype": "of the reference's logits, which lie on disk meanwhile; float16 halves them",
        "scratch": "folder for them (default: the system's for temporary files)",
        "device": "where to compute; auto: the first of xla, cuda, cpu that is there",
        "dtype": "of weights and activations as stored; auto: the checkpoint's",
        "page_size": "tokens in a page of the KV cache, a power of two (default: 128 for a TPU's kernel, else 16)",
        "max_num_batched_tokens": "tokens computed at once",
        "load_memory": "host memory for what is on its way from the checkpoint to its place (default: 2GiB, or more "
        "where the largest tensors need it)",
        "progress": "progress bars on standard error, if it is a terminal",
    },
    choices={"device": DEVICES, "dtype": DTYPES, "reference_dtype": REFERENCE_DTYPES},
)
