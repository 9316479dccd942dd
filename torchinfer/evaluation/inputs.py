"""Everything that an evaluation needs, checked before a model is loaded; what is wrong is told all at once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from torchinfer.config import DEVICES, DTYPES, SMALLEST_LOAD_MEMORY
from torchinfer.device import resolve_device
from torchinfer.errors import ConfigError, TorchinferError, raise_all
from torchinfer.evaluation.options import REFERENCE_DTYPES, EvaluationOptions
from torchinfer.evaluation.store import needed_bytes, space_problems
from torchinfer.evaluation.variants import SCHEMES, UNQUANTIZED, cache_dtypes, scheme_problems
from torchinfer.evaluation.windows import Window, find_prefix, make_windows
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.models.config import ModelConfig
from torchinfer.startup import resolve_dtype
from torchinfer.tokenizer import Tokenizer
from torchinfer.tokenizer_files import load_tokenizer

DEFAULT_CONTEXT = 2048
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is measured: `pairs` has the cache dtypes of each scheme; the first of the first is the reference."""

    checkpoint: Checkpoint
    model_config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    pairs: dict[str, tuple[str, ...]]
    prefix: list[int]  # special tokens in front of each window
    token_ids: list[int]  # of the part of the text that is evaluated
    num_text_tokens: int  # of the whole text
    windows: list[Window]
    context: int
    stride: int

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.windows[0].first

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.pairs.values()))


def prepare(options: EvaluationOptions) -> Inputs:
    """Read and check.

    Raises:
        ConfigError: with all that is wrong with options and files.
    """
    problems = [*_option_problems(options), *_report_problems(options.report)]
    text = _read_text(options.text, problems)
    model = _open_model(options, problems)
    device = _device(options.device, problems)
    inputs = _inputs(options, text, model, device, problems) if model is not None else None
    raise_all(problems, ConfigError, "nothing can be evaluated")
    assert inputs is not None
    return inputs


@dataclass(frozen=True, slots=True)
class _Model:
    checkpoint: Checkpoint
    config: ModelConfig
    dtype: torch.dtype
    tokenizer: Tokenizer | None


def _option_problems(options: EvaluationOptions) -> list[str]:
    choices = {"device": DEVICES, "dtype": DTYPES, "reference_dtype": REFERENCE_DTYPES}
    found = [
        f"{name}={getattr(options, name)!r} must be one of {', '.join(allowed)}"
        for name, allowed in choices.items()
        if getattr(options, name) not in allowed
    ]
    least = {"context": 3, "stride": 1, "max_tokens": 3, "max_num_batched_tokens": 1, "page_size": 1}
    for name, smallest in (least | {"load_memory": SMALLEST_LOAD_MEMORY}).items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            found.append(f"{name}={value} must be at least {smallest}")
    if options.page_size is not None and options.page_size & (options.page_size - 1):
        found.append(f"page_size={options.page_size} must be a power of two")
    return found + _unknown("schemes", options.schemes, SCHEMES)


def _unknown(name: str, values: Iterable[str], known: Iterable[str]) -> list[str]:
    given = list(values)
    if not given:
        return [f"{name} names nothing; give some of {', '.join(known)}"]
    unknown = [value for value in given if value not in known]
    return [f"{name} has {', '.join(map(repr, unknown))}; known are {', '.join(known)}"] if unknown else []


def _report_problems(path: str | Path | None) -> list[str]:
    if path is None:
        return []
    if Path(path).is_dir():
        return [f"report={str(path)!r} is a folder; name a file in it"]
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
    except OSError as error:
        return [f"report={str(path)!r} cannot be written: {error.strerror}; its folder must be there and writable"]
    return []


def _read_text(path: str | Path, problems: list[str]) -> str | None:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"text={str(path)!r} cannot be read: {error}; it must be a text file in UTF-8")
        return None
    if not text.strip():
        problems.append(f"text={str(path)!r} is empty; give a text that is like what the model is used for")
        return None
    return text


def _open_model(options: EvaluationOptions, problems: list[str]) -> _Model | None:
    try:
        checkpoint = Checkpoint.open(options.model)
        config = ModelConfig.from_dict(checkpoint.config)
        dtype = resolve_dtype(options.dtype if options.dtype in DTYPES else AUTO, checkpoint.config)
        tokenizer = load_tokenizer(options.model)
    except TorchinferError as error:
        problems.append(str(error))
        return None
    if tokenizer is None:
        problems.append(f"model={str(options.model)!r} has no tokenizer; add its tokenizer.json, the text needs it")
    return _Model(checkpoint, config, dtype, tokenizer)


def _device(name: str, problems: list[str]) -> torch.device:
    try:
        if name in DEVICES:
            return resolve_device(name)
    except TorchinferError as error:
        problems.append(str(error))
    return torch.device("cpu")


def _inputs(
    options: EvaluationOptions, text: str | None, model: _Model, device: torch.device, problems: list[str]
) -> Inputs | None:
    known = cache_dtypes(model.dtype)
    problems += _unknown("kv", options.kv, (AUTO, *known))
    problems += _scheme_problems(options, model, device)
    context = options.context or min(model.config.context_length, DEFAULT_CONTEXT)
    if context > model.config.context_length:
        problems.append(f"context={context} exceeds the model's context of {model.config.context_length} tokens")
    if text is None or model.tokenizer is None or problems:
        return None  # what follows can only be said of a text in tokens and of sizes that are valid
    text_ids = model.tokenizer.encode(text, add_special_tokens=False)
    prefix = find_prefix(model.tokenizer)
    stride = options.stride or max(1, context - len(prefix) - 1)
    problems += _token_problems(options, text_ids, prefix, model.config.vocab_size, context, stride)
    if problems:
        return None
    token_ids = text_ids[: options.max_tokens]
    inputs = Inputs(
        checkpoint=model.checkpoint,
        model_config=model.config,
        dtype=model.dtype,
        device=device,
        pairs=_pairs(options, known[0]),
        prefix=prefix,
        token_ids=token_ids,
        num_text_tokens=len(text_ids),
        windows=make_windows(len(token_ids), context, stride, len(prefix)),
        context=context,
        stride=stride,
    )
    size = needed_bytes(inputs.num_scored, model.config.vocab_size, options.reference_dtype)
    problems += space_problems(size if inputs.num_pairs > 1 else 0, options.scratch)
    return inputs


def _scheme_problems(options: EvaluationOptions, model: _Model, device: torch.device) -> list[str]:
    asked = [scheme for scheme in options.schemes if scheme in SCHEMES]
    if model.checkpoint.quantization is None:
        return scheme_problems(asked, model.config, device)
    schemes = [scheme for scheme in asked if scheme != UNQUANTIZED]
    if not schemes:
        return []
    return [
        f"schemes has {', '.join(schemes)}, but {model.checkpoint.address} is quantized already: leave them out, or "
        "take the checkpoint that it was made of"
    ]


def _token_problems(
    options: EvaluationOptions, text_ids: list[int], prefix: list[int], vocab_size: int, context: int, stride: int
) -> list[str]:
    found = []
    longest = context - len(prefix) - 1
    if stride > longest:
        found.append(
            f"stride={stride} must be at most {longest}: of the context of {context} tokens, {len(prefix)} are special "
            "ones, and windows share a token"
        )
    if len(text_ids) < 2:
        found.append(f"text={str(options.text)!r} has {len(text_ids)} tokens; at least 2 are needed")
    if text_ids and max(text_ids) >= vocab_size:
        found.append(
            f"the tokenizer gives the id {max(text_ids)}, beyond the model's vocabulary of {vocab_size}; take the "
            "tokenizer that belongs to the model"
        )
    return found


def _pairs(options: EvaluationOptions, own: str) -> dict[str, tuple[str, ...]]:
    """The reference first, then in the order that was asked for."""
    asked = list(dict.fromkeys(own if name == AUTO else name for name in options.kv))
    pairs = {UNQUANTIZED: tuple(dict.fromkeys([own, *(asked if UNQUANTIZED in options.schemes else [])]))}
    return pairs | {scheme: tuple(asked) for scheme in options.schemes if scheme != UNQUANTIZED}
