"""What a client asks for and what its stream yields: plain data, no tensors."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchinfer.errors import RequestError, raise_all

MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20


class FinishReason(enum.Enum):
    """Why a stream ended."""

    STOP = "stop"  # an EOS id, a stop id or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the client left or its deadline passed
    ERROR = "error"  # the engine failed


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the tokens of one request. Every field is honoured or refused.

    The order on the logits: repetition, presence and frequency penalty, logit_bias, min_tokens,
    temperature, top_k, top_p, min_p. Temperature 0 is greedy. Log-probabilities are those of the model's own
    distribution, before any of these.

    Raises:
        RequestError: with all fields that are out of range, their values and rules.
    """

    max_tokens: int = 128
    min_tokens: int = 0  # no EOS or stop id before this many tokens
    temperature: float = 1.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the most probable token
    repetition_penalty: float = 1.0  # over prompt and output, CTRL (arXiv 1909.05858)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # same seed, same prompt: same text, whatever else is in the batch
    n: int = 1  # independent samples
    stop: tuple[str, ...] = ()  # the match itself is not part of the text
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: of the sampled token and of the k most probable
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        raise_all(list(_problems(self)), RequestError, "invalid sampling parameters")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """The next token depends on the ids of all earlier ones, not only through the cache."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted prompt with its parameters. `priority`: smaller runs first; equal ones in order of arrival."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution (natural logarithm)."""

    token_id: int
    logprob: float
    rank: int  # 1: the most probable
    top: list[tuple[int, float]]  # (token id, logprob), most probable first; as many as asked for


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request has used, over all its samples."""

    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens that the prefix cache had
    num_output_tokens: int


@dataclass(slots=True)
class TokenEvent:
    """What a request's stream yields. Its last event, and only that one, carries `usage`."""

    request_id: str
    index: int  # which of the n samples
    token_ids: list[int]
    text: str  # whole UTF-8 characters; may be empty while one is incomplete or a stop string may begin
    logprobs: list[TokenLogprobs] | None = None  # one entry a token of `token_ids`
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # whole prompt, once, first entry None
    finish_reason: FinishReason | None = None  # on the last event of this index
    stop_match: str | int | None = None  # the stop string, or the stop or EOS id that ended this index
    error: str | None = None  # with FinishReason.ERROR
    usage: Usage | None = None


def _problems(params: SamplingParams) -> list[str]:
    return [*_number_problems(params), *_list_problems(params)]


def _number_problems(p: SamplingParams) -> list[str]:
    integers = {
        "max_tokens": (p.max_tokens, 1, math.inf, "at least 1"),
        "min_tokens": (p.min_tokens, 0, p.max_tokens, "between 0 and max_tokens"),
        "top_k": (p.top_k, 0, 2**31 - 1, "0 (keep all) or more, below 2**31"),
        "n": (p.n, 1, MAX_N, f"between 1 and {MAX_N}"),
    }
    if p.seed is not None:
        integers["seed"] = (p.seed, -(2**63), 2**63 - 1, "a 64-bit integer")
    for name in ("logprobs", "prompt_logprobs"):
        if (count := getattr(p, name)) is not None:
            integers[name] = (count, 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
    reals = {
        "temperature": (p.temperature, 0.0, 100.0, "between 0 (greedy) and 100"),
        "top_p": (p.top_p, math.ulp(0.0), 1.0, "more than 0 and at most 1"),
        "min_p": (p.min_p, 0.0, 1.0, "between 0 and 1"),
        "repetition_penalty": (p.repetition_penalty, 0.01, 100.0, "between 0.01 and 100"),
        "presence_penalty": (p.presence_penalty, -2.0, 2.0, "between -2 and 2"),
        "frequency_penalty": (p.frequency_penalty, -2.0, 2.0, "between -2 and 2"),
    }
    found = [
        f"{name}={value!r} must be an integer {rule}"
        for name, (value, low, high, rule) in integers.items()
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high
    ]
    found += [
        f"{name}={value!r} must be a number {rule}"
        for name, (value, low, high, rule) in reals.items()
        if not isinstance(value, int | float) or not low <= value <= high
    ]
    return found


def _list_problems(p: SamplingParams) -> list[str]:
    found = []
    if len(p.stop) > MAX_STOP_STRINGS:
        found.append(f"stop has {len(p.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
    elif not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_STRING_CHARACTERS for s in p.stop):
        found.append(f"each stop string must have 1 to {MAX_STOP_STRING_CHARACTERS} characters")
    if len(p.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        found.append(f"stop_token_ids has {len(p.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed")
    if not all(isinstance(i, int) and i >= 0 for i in p.stop_token_ids):
        found.append("stop_token_ids must be non-negative integers")
    if len(p.logit_bias) > MAX_LOGIT_BIAS:
        found.append(f"logit_bias has {len(p.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    for token_id, bias in p.logit_bias.items():
        if not isinstance(token_id, int) or token_id < 0 or not -100 <= bias <= 100:
            found.append(f"logit_bias[{token_id!r}]={bias!r} must map a token id to a number between -100 and 100")
            break
    return found
