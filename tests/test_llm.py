"""LLM on the embedded checkpoint, float32 on the CPU: transformers as the truth, and equalities that need none."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchinfer import LLM, ConfigError, EngineError, FinishReason, Output, RequestError, SamplingParams
from torchinfer.kernels.cpu.library import open_library
from torchinfer.models.decoder import Decoder
from torchinfer.testing import save_random_checkpoint, tiny_config

CHECKPOINT = Path(__file__).parents[1] / "recipes" / "tiny-llama"
PROMPTS = ["def main(", "class Foo:\n    def __init__(self", "import os\n", "for i in range(10):\n    print("]
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "progress": False}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(CHECKPOINT, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def greedy(max_tokens: int = 24, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **params)


def ids(outputs: list[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 4000) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def generate_reference(reference: Any, prompt: list[int], **options: Any) -> list[int]:
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        result = reference.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **options)
    return result[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def test_greedy_text_equals_transformers(llm: LLM, reference: Any, tokenizer: Any) -> None:
    for output in llm.generate(PROMPTS, greedy()):
        expected = generate_reference(reference, tokenizer(output.prompt).input_ids, max_new_tokens=24)
        assert output.token_ids == expected
        assert output.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_repetition_penalty_equals_transformers(llm: LLM, reference: Any) -> None:
    prompt = random_prompts(1, 30)[0]
    expected = generate_reference(reference, prompt, max_new_tokens=30, repetition_penalty=1.3)
    assert llm.generate([prompt], greedy(30, repetition_penalty=1.3))[0].token_ids == expected


def test_min_tokens_equals_transformers(llm: LLM, reference: Any, tokenizer: Any) -> None:
    prompt = tokenizer("def main(").input_ids
    stop = llm.generate([prompt], greedy(10))[0].token_ids[2]
    params = greedy(20, min_tokens=8, stop_token_ids=(stop,), ignore_eos=True)
    expected = generate_reference(reference, prompt, max_new_tokens=20, min_new_tokens=8, eos_token_id=stop)
    assert llm.generate([prompt], params)[0].token_ids == expected
    assert stop not in expected[:8]


def test_logprobs_equal_transformers(llm: LLM, reference: Any, tokenizer: Any) -> None:
    output = llm.generate(["def main("], greedy(6, logprobs=3, prompt_logprobs=2))[0]
    tokens = tokenizer("def main(").input_ids + output.token_ids
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([tokens])).logits[0].double(), -1)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None and output.logprobs is not None
    entries = output.prompt_logprobs[1:] + output.logprobs
    assert len(entries) == len(tokens) - 1
    for position, entry in enumerate(entries):
        row = expected[position]
        assert entry is not None and entry.token_id == tokens[position + 1]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.rank == (row > row[entry.token_id]).sum().item() + 1
        values = [value for _, value in entry.top]
        assert values == pytest.approx(row.topk(len(values)).values.tolist(), abs=1e-4)
        assert len(entry.top) == (2 if position < len(output.prompt_logprobs) - 1 else 3)


def test_a_batch_equals_each_prompt_alone(llm: LLM) -> None:
    prompts = random_prompts(24, 100)
    assert ids(llm.generate(prompts, greedy())) == [llm.generate([p], greedy())[0].token_ids for p in prompts]


def test_chunks_preemption_and_prefix_hits_change_nothing(llm: LLM) -> None:
    prompts = random_prompts(12, 100, seed=1)
    expected = ids(llm.generate(prompts, greedy()))
    hits_before = llm.stats().num_prefix_hit_tokens
    assert ids(llm.generate(prompts, greedy())) == expected
    assert llm.stats().num_prefix_hit_tokens > hits_before
    cramped = {"max_num_requests": 8, "max_num_batched_tokens": 13, "max_model_len": 160, "kv_cache_memory": 1_300_000}
    with LLM(CHECKPOINT, **OPTIONS, **cramped, prefix_cache=False) as other:
        assert ids(other.generate(prompts, greedy())) == expected
        assert other.stats().num_preemptions > 0


def test_same_seed_gives_the_same_text_whatever_the_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.95, top_k=50, seed=42)
    alone = llm.generate(["def main("], params)[0].token_ids
    others = [SamplingParams(max_tokens=20, temperature=1.2, seed=i) for i in range(7)]
    together = llm.generate(["def main("] * 8, [*others[:3], params, *others[3:]])
    assert together[3].token_ids == alone
    assert len({tuple(output.token_ids) for output in together}) == 8


def test_n_samples_differ_and_come_in_order(llm: LLM) -> None:
    outputs = llm.generate(["import "], SamplingParams(max_tokens=12, temperature=1.0, seed=1, n=4))
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in outputs}) == 4
    assert sum(output.usage is not None for output in outputs) == 1


def test_logit_bias_forces_and_forbids(llm: LLM) -> None:
    forced = llm.generate(["def "], greedy(3, logit_bias={77: 100.0}, ignore_eos=True))[0].token_ids
    assert forced == [77, 77, 77]
    first = llm.generate(["def "], greedy(1))[0].token_ids[0]
    assert llm.generate(["def "], greedy(1, logit_bias={first: -100.0}))[0].token_ids != [first]


def test_presence_and_frequency_penalties_follow_their_definition(llm: LLM, reference: Any, tokenizer: Any) -> None:
    tokens = tokenizer("def main(").input_ids
    num_prompt = len(tokens)
    for _ in range(20):
        with torch.no_grad():
            logits = reference(torch.tensor([tokens])).logits[0, -1]
        for token, count in Counter(tokens[num_prompt:]).items():
            logits[token] -= 0.9 + 0.4 * count
        tokens.append(logits.argmax().item())
    penalized = llm.generate(["def main("], greedy(20, presence_penalty=0.9, frequency_penalty=0.4))[0].token_ids
    assert penalized == tokens[num_prompt:]
    assert penalized != llm.generate(["def main("], greedy(20))[0].token_ids


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    text = llm.generate(["def main("], greedy(30))[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    output = llm.generate(["def main("], greedy(30, stop=(stop,)))[0]
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_match) == (FinishReason.STOP, stop)


def test_streamed_text_joins_to_the_whole(llm: LLM) -> None:
    events = list(llm.stream("def main(", greedy(30)))
    assert "".join(event.text for event in events) == llm.generate(["def main("], greedy(30))[0].text
    assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]


def test_leaving_a_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("def main(", greedy(400, ignore_eos=True))
    next(stream)
    assert llm.stats().num_running == 1
    stream.close()  # type: ignore[attr-defined]
    llm.generate(["x"], greedy(1))
    assert (llm.stats().num_running, llm.stats().num_used_pages) == (0, 0)


def test_one_bad_prompt_refuses_the_call_before_anything_runs(llm: LLM) -> None:
    before = llm.stats().num_prompt_tokens
    with pytest.raises(RequestError, match="512 tokens; with max_model_len=512 at most 511"):
        llm.generate([[5], [5] * 512], greedy())
    assert llm.stats().num_prompt_tokens == before


def test_parameters_must_be_one_or_one_for_each(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [greedy(), greedy()])


def test_chat_completes_the_rendered_template(tmp_path: Path, llm: LLM) -> None:
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    with LLM(tmp_path, **OPTIONS) as other:
        answer = other.chat([{"role": "user", "content": "sort a list"}], greedy(8))[0]
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode("# user: sort a list\n", add_special_tokens=False)
    assert answer.token_ids == llm.generate([prompt], greedy(8))[0].token_ids
    with pytest.raises(RequestError, match="template"):
        llm.chat([{"role": "user", "content": "sort a list"}])


def test_two_models_live_side_by_side_and_close() -> None:
    with LLM(CHECKPOINT, **OPTIONS) as first, LLM(CHECKPOINT, **OPTIONS) as second:
        assert ids(first.generate(PROMPTS, greedy())) == ids(second.generate(PROMPTS, greedy()))
    with pytest.raises(EngineError, match="closed"):
        first.generate(["x"])


def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("llama"), tmp_path)
    with LLM(tmp_path, **OPTIONS) as llm:
        output = llm.generate([[1, 2, 3]], greedy(4))[0]
        assert len(output.token_ids) == 4 and output.text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.generate(["text"])
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.chat([{"role": "user", "content": "hello"}])


def test_a_cache_that_is_too_small_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError) as error:
        LLM(CHECKPOINT, **OPTIONS, kv_cache_memory=200_000)
    message = str(error.value)
    assert "a request of max_model_len=512 tokens needs 32" in message and "kv_cache_memory to at least" in message


def test_a_cache_beyond_the_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_memory=\d+ bytes .* exceeds"):
        LLM(CHECKPOINT, **OPTIONS, kv_cache_memory=2**50)


def test_a_length_beyond_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len=513 exceeds the model's context of 512"):
        LLM(CHECKPOINT, **OPTIONS, max_model_len=513)


def test_capacity_mode_counts_what_it_drops(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("mixtral"), tmp_path)
    prompts = [[i % 150 for i in range(k, k + 40)] for k in range(4)]
    with LLM(tmp_path, **OPTIONS, moe_mode="capacity", moe_capacity_factor=0.5) as llm:
        llm.generate(prompts, greedy(4))
        assert llm.stats().num_dropped_expert_tokens > 0
    with LLM(tmp_path, **OPTIONS) as llm:
        llm.generate(prompts, greedy(4))
        assert llm.stats().num_dropped_expert_tokens == 0


def test_torchs_threads_sleep_during_a_step_and_are_there_afterwards(llm: LLM, monkeypatch: Any) -> None:
    """The CPU library has threads of its own, and torch's would spin beside them."""
    seen = set()
    forward = Decoder.forward

    def watched(*args: Any) -> Any:
        seen.add(torch.get_num_threads())
        return forward(*args)

    monkeypatch.setattr(Decoder, "forward", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        llm.generate(PROMPTS[0], greedy(2))
        assert torch.get_num_threads() == 3
        assert seen == {1 if open_library() else 3}
    finally:
        torch.set_num_threads(before)
