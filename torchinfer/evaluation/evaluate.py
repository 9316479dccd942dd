"""Measures each pair of a weight scheme and a cache dtype against the model as it is stored.

The reference runs first and leaves its logits on disk; then each scheme is loaded once, and each cache dtype gets its
own caches.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torchinfer import kernels
from torchinfer.device import bound_cpu_caches, dtype_name
from torchinfer.evaluation.driver import Driver
from torchinfer.evaluation.inputs import Inputs, prepare
from torchinfer.evaluation.metrics import Bucket, Summary, TokenScores, score_rows, summarize, summarize_by_context
from torchinfer.evaluation.options import EvaluationOptions
from torchinfer.evaluation.passes import Layout, make_pass
from torchinfer.evaluation.store import ReferenceStore
from torchinfer.evaluation.variants import (
    allocate_caches,
    cache_bytes_per_1000_tokens,
    load_scheme,
    one_page_size,
    weight_bytes,
)
from torchinfer.models.decoder import Decoder

logger = logging.getLogger(__name__)

SCHEMA = 1  # of the JSON; docs/evaluation.md


@dataclass(frozen=True, slots=True)
class Result:
    """One pair."""

    scheme: str
    kv: str
    is_reference: bool
    weight_bytes: int
    kv_bytes_per_1000_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    overall: Summary
    by_context: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, on what, with what. The first result is the reference's."""

    facts: Mapping[str, Any]
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": SCHEMA, **self.facts, "results": [asdict(result) for result in self.results]}


def evaluate(options: EvaluationOptions) -> Evaluation:
    """Measure all pairs.

    Raises:
        ConfigError: with all that is wrong with options and files, before a model is loaded.
        CheckpointError, DeviceError: the checkpoint cannot be loaded, or memory does not suffice.
    """
    inputs = prepare(options)
    if inputs.device.type == "cpu":
        bound_cpu_caches()
    kernels.load_ports(inputs.device.type)
    all_dtypes = {name for names in inputs.pairs.values() for name in names}
    page_size = one_page_size(options.page_size, all_dtypes, inputs.model_config, inputs.device)
    layout = Layout.of(page_size, options.max_num_batched_tokens, inputs.context)
    results: list[Result] = []
    with _store(options, inputs) as store:
        reference: TokenScores | None = None
        for scheme, cache_dtypes in inputs.pairs.items():
            model = _load(scheme, inputs, options)
            for cache_dtype in cache_dtypes:
                pair = measure(model, scheme, cache_dtype, inputs, layout, store, reference, options.progress)
                reference = reference or pair[0]
                results.append(pair[1])
            del model
            _free(inputs.device)
    return Evaluation(_facts(options, inputs), tuple(results))


def measure(
    model: Decoder,
    scheme: str,
    cache_dtype: str,
    inputs: Inputs,
    layout: Layout,
    store: ReferenceStore | None,
    reference: TokenScores | None,
    progress: bool = False,
) -> tuple[TokenScores, Result]:
    """Measure a model with one cache dtype against what `store` and `reference` hold; without a reference, fill the
    store (if there is to be one)."""
    logger.info("measuring %s / %s", scheme, cache_dtype)
    device, dtype, config = inputs.device, inputs.dtype, inputs.model_config
    caches = allocate_caches(cache_dtype, config, layout.num_pages, layout.page_size, dtype, device)
    driver = Driver(make_pass(model, caches, layout, device), layout, device)
    with _bar(f"{scheme} / {cache_dtype}", inputs.num_scored, progress) as bar:
        scores = score_all(driver, inputs, store, reference is not None, bar)
    summary = summarize(scores, reference or scores)
    result = Result(
        scheme=scheme,
        kv=cache_dtype,
        is_reference=reference is None,
        weight_bytes=weight_bytes(model),
        kv_bytes_per_1000_tokens=cache_bytes_per_1000_tokens(cache_dtype, config, layout.page_size, device),
        prefill_tokens_per_second=driver.num_tokens / driver.seconds,
        decode_tokens_per_second=driver.decode_tokens_per_second(inputs.token_ids),
        overall=summary,
        by_context=summarize_by_context(scores, reference or scores),
    )
    logger.info("%s / %s: perplexity %.4f, KL %.3g", scheme, cache_dtype, summary.perplexity, summary.kl.mean)
    return scores, result


def score_all(
    driver: Driver, inputs: Inputs, store: ReferenceStore | None, has_reference: bool, bar: tqdm[None]
) -> TokenScores:
    """Score every token, against the store's logits or, without a reference, into the store."""
    offset = inputs.windows[0].first
    scores = TokenScores.empty(inputs.num_scored)
    text = torch.tensor(inputs.token_ids)
    for scored in driver.score(inputs.windows, inputs.prefix, inputs.token_ids):
        logits, count = scored.logits, len(scored.logits)
        row, here = scored.first - offset, slice(scored.first - offset, scored.first - offset + count)
        if store is None:
            reference = logits
        elif has_reference:
            reference = store.read(row, count).to(logits.device)
        else:
            store.write(row, logits)
            reference = logits
        targets = text[scored.first : scored.first + count].to(logits.device)
        scores.nll[here], scores.kl[here], scores.is_equal[here] = score_rows(logits, reference, targets)
        scores.context[here] = [scored.window.context_of(scored.first + index) for index in range(count)]
        bar.update(count)
    return scores


def _load(scheme: str, inputs: Inputs, options: EvaluationOptions) -> Decoder:
    return load_scheme(
        scheme,
        inputs.checkpoint,
        inputs.model_config,
        inputs.dtype,
        inputs.device,
        options.load_memory,
        options.progress,
    )


def _store(options: EvaluationOptions, inputs: Inputs) -> contextlib.AbstractContextManager[ReferenceStore | None]:
    if inputs.num_pairs == 1:
        return contextlib.nullcontext()
    vocab_size = inputs.model_config.vocab_size
    return ReferenceStore(inputs.num_scored, vocab_size, options.reference_dtype, options.scratch)


@contextlib.contextmanager
def _bar(name: str, total: int, progress: bool) -> Iterator[tqdm[None]]:
    is_shown = progress and sys.stderr.isatty()
    with tqdm(total=total, unit="token", unit_scale=True, desc=name, disable=not is_shown) as bar:
        yield bar


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _facts(options: EvaluationOptions, inputs: Inputs) -> dict[str, Any]:
    return {
        "model": str(options.model),
        "architecture": inputs.model_config.architecture,
        "dtype": dtype_name(inputs.dtype),
        "device": inputs.device.type,
        "text": Path(options.text).name,
        "num_text_tokens": inputs.num_text_tokens,
        "num_scored_tokens": inputs.num_scored,
        "context": inputs.context,
        "stride": inputs.stride,
        "num_windows": len(inputs.windows),
        "reference_dtype": options.reference_dtype,
        "versions": {
            "torchinfer": version("torchinfer"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
