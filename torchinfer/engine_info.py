"""What an engine tells of itself, and what that means for a request. No tensors: a server needs no torch for it."""

from __future__ import annotations

from dataclasses import dataclass

from torchinfer.errors import RequestError, raise_all
from torchinfer.request import Request


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine serves, for people and clients."""

    name: str
    architecture: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    num_pages: int
    page_size: int
    max_num_requests: int
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    kv_cache_dtype: str  # what dtype may be, int8, or float8_e4m3fn


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, and what is now. Tokens are counted when they are known on the host."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_pages: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_steps: int = 0
    num_compilations: int = 0
    num_dropped_expert_tokens: int = 0  # moe_mode capacity: (token, expert) pairs beyond the capacity


def validate(request: Request, info: ModelInfo) -> None:
    """Check what depends on the model.

    Raises:
        RequestError: with all problems.
    """
    raise_all(_problems(request, info), RequestError, "the request cannot be honoured")


def _problems(request: Request, info: ModelInfo) -> list[str]:
    params, prompt, vocab = request.params, request.prompt_ids, info.vocab_size
    found = []
    if not prompt:
        found.append("the prompt has no tokens; give at least one")
    if outside := [i for i in prompt if not 0 <= i < vocab][:5]:
        found.append(f"prompt token ids {outside} are outside of the vocabulary of {vocab}")
    if len(prompt) >= info.max_model_len:
        found.append(
            f"the prompt has {len(prompt)} tokens; with max_model_len={info.max_model_len} "
            f"at most {info.max_model_len - 1} leave room for output"
        )
    elif len(prompt) + params.min_tokens > info.max_model_len:
        found.append(
            f"min_tokens={params.min_tokens} after {len(prompt)} prompt tokens "
            f"exceeds max_model_len={info.max_model_len}"
        )
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        if outside := [i for i in ids if i >= vocab][:5]:
            found.append(f"{name} {outside} are outside of the vocabulary of {vocab}")
    if params.stop and not info.has_tokenizer:
        found.append("stop strings need a tokenizer, which this checkpoint has not; use stop_token_ids")
    return found
