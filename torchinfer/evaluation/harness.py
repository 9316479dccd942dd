"""A model of lm-evaluation-harness that is an engine in this process.

All requests of a call are open at once and the engine batches them; results come in the order of the requests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from torchinfer.errors import ConfigError, EngineError, RequestError
from torchinfer.llm import LLM
from torchinfer.request import SamplingParams, TokenEvent, TokenLogprobs

Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, tokens of the context, of the continuation
DEFAULT_MAX_GEN_TOKS = 256
MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
PASSED_ON = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
KNOWN = ("until", "do_sample", "temperature", *MAX_TOKENS_NAMES, *PASSED_ON)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """`--model torchinfer`; `--model_args` are pretrained=DIR and the fields of EngineConfig."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """
        Raises:
            ConfigError: an option is unknown or out of range, or the checkpoint has no tokenizer.
        """
        super().__init__()
        if str(batch_size) not in ("1", "auto") or max_batch_size is not None:
            raise ConfigError(
                f"batch_size={batch_size}, max_batch_size={max_batch_size}: the engine makes its own batches; leave "
                "them out, and set max_num_requests or max_num_batched_tokens in model_args"
            )
        self._llm = LLM(pretrained, **options, **({} if device is None else {"device": device}))
        if self._llm.tokenizer is None:
            self._llm.close()
            raise ConfigError(f"{pretrained} has no tokenizer, and tasks are text; add its tokenizer.json")
        self._tokenizer = self._llm.tokenizer
        self._name = str(pretrained)

    @property
    def eot_token_id(self) -> int:
        """
        Raises:
            ConfigError: the model has no end-of-text token.
        """
        token_ids = self._llm.model_info.eos_token_ids
        if not token_ids:
            raise ConfigError(f"{self._name} names no end-of-text token; set eos_token_id in generation_config.json")
        return token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of input. Two less than the engine's: its prompts hold the last scored token too, and leave room for
        another one."""
        return self._llm.model_info.max_model_len - 2

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; one that begins with BOS already, as chat templates write it, does not get another."""
        ids = self._tokenizer.encode(string, add_special_tokens is not False)
        is_doubled = len(ids) > 1 and ids[0] == ids[1] == self._tokenizer.bos_token_id
        return ids[1:] if is_doubled and add_special_tokens is None else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.chat_text(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """
        Raises:
            ConfigError: another template than the checkpoint's was asked for.
        """
        if isinstance(chat_template, str):
            raise ConfigError(f"chat_template={chat_template!r}: only the checkpoint's own is there; give no name")
        return self._tokenizer.chat_template if chat_template else None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context that score each token once."""
        pairs: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts: list[Pair] = [(None, *utils.make_disjoint_window(window)) for window in windows]
            pairs += parts
            counts.append(len(parts))
        values = iter(self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
        totals = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, end of text or a number of tokens.

        Raises:
            RequestError: a generation argument is unknown or out of range; nothing is computed then.
        """
        prompts, params = [], []
        for context, arguments in (request.args for request in requests):
            params.append(self._params(arguments))
            room = self.max_length - params[-1].max_tokens
            if room < 1:
                raise RequestError(
                    f"max_gen_toks={params[-1].max_tokens} leaves no room for a prompt: the model's context holds "
                    f"{self.max_length} tokens of both; ask for fewer"
                )
            prompts.append(self.tok_encode(context)[-room:])
        texts = []
        for request, events in zip(requests, self._run(prompts, params, "generating", disable_tqdm), strict=True):
            texts.append("".join(event.text for event in events))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations and whether each is the greedy one; contexts are cut from the left."""
        prompts, lengths = [], []
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation has {len(continuation)} tokens; with max_model_len="
                    f"{self._llm.model_info.max_model_len} at most {self.max_length} can be scored"
                )
            prompts.append(tokens)
            lengths.append(len(continuation))
        params = [SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)] * len(prompts)
        results = []
        streams = self._run(prompts, params, "scoring", disable_tqdm)
        for (texts, *_), length, events in zip(requests, lengths, streams, strict=True):
            results.append(_score(events, length))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams], name: str, disable_tqdm: bool
    ) -> Iterator[list[TokenEvent]]:
        """The events of each request, in order; all are open from the beginning."""
        streams = [self._llm.stream(*each) for each in zip(prompts, params, strict=True)]
        is_hidden = disable_tqdm or not sys.stderr.isatty()
        for stream in tqdm(streams, desc=name, unit="request", disable=is_hidden):
            events = list(stream)
            if events[-1].error is not None:
                raise EngineError(events[-1].error)
            yield events

    def _params(self, arguments: Mapping[str, Any]) -> SamplingParams:
        """The harness's generation arguments: without do_sample, temperature decides, and 0 or none is greedy."""
        if unknown := sorted(set(arguments) - set(KNOWN)):
            raise RequestError(f"generation arguments {', '.join(unknown)} are unknown; known are {', '.join(KNOWN)}")
        lengths = [arguments[name] for name in MAX_TOKENS_NAMES if arguments.get(name) is not None]
        do_sample, temperature = arguments.get("do_sample"), arguments.get("temperature")
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        until = arguments.get("until") or ()
        return SamplingParams(
            max_tokens=int(lengths[0]) if lengths else DEFAULT_MAX_GEN_TOKS,
            temperature=0.0 if do_sample is False else float(temperature),
            stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
            **{name: arguments[name] for name in PASSED_ON if arguments.get(name) is not None},
        )


def _score(events: Iterable[TokenEvent], length: int) -> tuple[float, bool]:
    """Sum over the last `length` tokens of the prompt, and whether each was the most probable one."""
    entries = next(event.prompt_logprobs for event in events if event.prompt_logprobs is not None)
    scored: list[TokenLogprobs] = [entry for entry in entries[len(entries) - length :] if entry is not None]
    assert len(scored) == length, (len(scored), length)
    return sum(entry.logprob for entry in scored), all(entry.rank == 1 for entry in scored)
