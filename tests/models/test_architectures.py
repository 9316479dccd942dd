"""Every architecture against transformers' own model with the same random weights, in float32."""

import json

import pytest
import torch

from torchinfer import models
from torchinfer.models.config import ModelConfig
from torchinfer.testing import TINY, Row, assert_close, make_batch


def random_prompt(length: int) -> list[int]:
    ids: list[int] = torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return ids


def test_logits_equal_transformers(case, prompt):
    assert_close(case.driver().step({"a": prompt})["a"], case.logits(prompt))


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.int8, 0.03), (torch.float8_e4m3fn, 0.12), (torch.bfloat16, 0.01)]
)
def test_logits_over_a_cache_of_another_dtype_are_near(case, prompt, dtype, allowed):
    expected = case.logits(prompt)
    driver = case.driver(dtype)
    logits = torch.cat([driver.step({"a": prompt[i:j]}, {"a": 45})["a"] for i, j in ((0, 30), (30, 44), (44, 45))])
    errors = (logits - expected).square().mean(1).sqrt() / expected.std()
    # Of the tokens the median: one whose expert is another one is far off.
    assert errors.median() < allowed * (5 if case.ours.config.moe else 1)


def test_greedy_ids_equal_transformers(case, prompt):
    assert case.driver().greedy({"a": prompt}, 20)["a"] == case.greedy(prompt, 20)


def test_greedy_ids_equal_transformers_across_the_original_rope_length(case):
    prompt = random_prompt(25)
    assert case.driver().greedy({"a": prompt}, 20)["a"] == case.greedy(prompt, 20)


def test_chunked_prompt_equals_whole(case, prompt):
    driver = case.driver()
    parts = [driver.step({"a": prompt[start:end]}, {"a": 45})["a"] for start, end in ((0, 13), (13, 14), (14, 45))]
    assert_close(torch.cat(parts), case.driver().step({"a": prompt})["a"])


def test_batch_equals_each_prompt_alone(case):
    prompts = {str(length): random_prompt(length) for length in (1, 7, 8, 9, 33)}
    together = case.driver().greedy(prompts, 12)
    assert together == {name: case.greedy(prompt, 12) for name, prompt in prompts.items()}


@torch.inference_mode()
def test_tokens_that_are_wanted_have_the_states_of_all(case, prompt):
    batch = make_batch([Row(prompt[:1], 0, [3], 1), Row(prompt, 0, list(range(4, 12)), len(prompt))], 8)
    whole, driver = case.driver(), case.driver()
    wanted = torch.tensor([0, len(prompt)], dtype=torch.int32)
    expected = whole.model(batch, whole.kv_caches)[wanted]
    assert_close(driver.model(batch, driver.kv_caches, wanted), expected)
    for ours, theirs in zip(driver.kv_caches, whole.kv_caches, strict=True):
        assert torch.equal(ours.data.nan_to_num(), theirs.data.nan_to_num())


def test_chunks_join_rows_that_decode(case, prompt):
    driver = case.driver()
    driver.step({"old": prompt[:30]}, {"old": 31})
    mixed = driver.step({"new": prompt[:9], "old": prompt[30:31]}, {"new": 45})
    assert_close(mixed["old"][0], case.logits(prompt[:31])[-1])


def test_left_padded_batch_of_transformers_gives_the_same_logits(case):
    if case.ours.config.rope_depends_on_length:
        return  # transformers takes one length for the whole batch
    short, long = random_prompt(5), random_prompt(20)
    padded = torch.tensor([[0] * 15 + short, long])
    mask = torch.tensor([[0] * 15 + [1] * 5, [1] * 20])
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = case.theirs(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    logits = case.driver().step({"short": short, "long": long})
    assert_close(torch.stack((logits["short"][-1], logits["long"][-1])), expected)


def test_every_architecture_has_a_case():
    families = {kind.removesuffix("Config").removesuffix("Text") for kind, _ in TINY.values()}
    assert {f"{family}ForCausalLM" for family in families} == set(models.ARCHITECTURES)


def test_every_key_that_transformers_writes_is_read(case, caplog):
    ModelConfig.from_dict(json.loads((case.folder / "config.json").read_text()))
    assert not caplog.records
