"""What fits where, the smallest topology, and what cannot be planned."""

import pytest
import torch

from torchinfer.errors import CheckpointError, ConfigError, UnsupportedModelError
from torchinfer.planner.accelerators import ACCELERATORS
from torchinfer.planner.options import ALL, KINDS, PlanOptions
from torchinfer.planner.planner import plan
from torchinfer.planner.prices import list_prices, price_of

GIB = 2**30
# Figure 4: what is expected to fit.
FITTING = [
    ("llama-2-7b", "int8", "v5e", "1x1"),
    ("gemma-7b", "int8", "v5e", "1x1"),
    ("gpt-j-6b", None, "v5e", "2x2"),
    ("gpt-j-6b", "int8", "v5e", "2x2"),
    ("llama-2-13b", "int8", "v5e", "2x2"),
    ("llama-2-70b", "int8", "v5e", "2x4"),
    ("llama-2-70b", "int8", "v5p", "2x2x1"),
    ("llama-2-70b", None, "v5p", "2x2x1"),
    ("mixtral-8x7b", "int8", "v5e", "2x2"),
    ("mixtral-8x7b", "int8", "v5p", "2x2x1"),
]


def error_of(models, name="llama-2-7b", **options):
    with pytest.raises(ConfigError) as caught:
        models.plan(name, **options)
    return str(caught.value)


@pytest.mark.parametrize(("name", "quantization", "accelerator", "topology"), FITTING)
def test_what_fits(models, name, quantization, accelerator, topology):
    place = models.placement(name, accelerator, topology, quantization=quantization, context=1024)
    assert place.is_roomy


def test_llama_3_8b_int8_on_v5e_2x2_holds_256_requests_of_1024_tokens(models):
    place = models.placement("llama-3-8b", "v5e", "2x2", quantization="int8", kv_cache_dtype="int8", context=1024)
    # A page of 128 tokens takes 32 layers * (2 * 2 heads * 128 * 128 bytes, and 8 rows of 128 scales, 4 of them empty).
    assert place.capacity.request_bytes == 8 * 32 * (65536 + 8 * 512) == 1024 * 17408
    assert place.capacity.rule_requests == int(0.2 * 15.75 * GIB) // (1024 * 17408) == 189
    assert place.capacity.num_requests > 256


def test_a_model_in_float16_is_planned_in_bfloat16_for_tpu(models):
    dtypes = {kind: models.plan("llama-2-7b", accelerator=kind, dtype="auto").source.dtype for kind in ("v5e", "h100")}
    assert dtypes == {"v5e": torch.bfloat16, "h100": torch.float16}
    assert "dtype='float16': a TPU has bfloat16" in error_of(models, accelerator="v5e", dtype="float16", compile=True)


def test_the_exact_number_of_requests_is_the_largest_that_fits(models):
    place = models.placement("llama-2-7b", "v5e", "1x1", quantization="int8", kv_cache_dtype="int8")
    found, part = place.capacity, place.footprint

    def total(requests):
        activations = part.activation_bytes(max(512, requests), requests)
        return part.weight_bytes + activations + part.page_bytes + requests * part.request_bytes(4096)

    assert total(found.num_requests) <= 15.75 * GIB < total(found.num_requests + 1)
    assert found.num_requests == 8
    # 9.9 GB are left, at 270,336 bytes a token.
    assert found.num_tokens == (found.cache_bytes - part.page_bytes) // 270336
    assert found.rule_tokens == int(0.2 * 15.75 * GIB) // part.page_bytes * part.page_size


def test_the_smallest_topology_keeps_the_rule(models):
    """Llama 2 13B in bfloat16: 26 GB are too much for a chip of v5e; on two L4 they are 59 % of the memory."""
    found = models.plan("llama-2-13b")
    names = {speed.placement.accelerator.name: speed.placement.topology.name for speed in found.speeds}
    assert names == {"v5e": "2x2", "v5p": "2x2x1", "h200": "1", "h100": "1", "l4": "2"}
    assert [each.fits for each in found.placements if each.accelerator.name == "v5e"] == [False, True]


def test_what_fits_but_breaks_the_rule_is_said_to_be_tight(models):
    """GPT-J in bfloat16 is 12.1 GB, 72 % of a v5e; with 7B models it is 80 %."""
    found = models.plan("llama-2-7b", accelerator="v5e")
    one = found.placements[0]
    assert (one.topology.name, one.fits, one.is_roomy) == ("1x1", True, True)
    tight = models.placement("llama-3-8b", "v5e", "1x1", context=128)
    assert (tight.fits, tight.is_roomy) == (True, False)


def test_a_topology_that_divides_nothing_is_passed_over(models):
    found = models.plan("falcon-7b", accelerator="v5e", context=128)
    assert [each.name for each in found.placements] == ["v5e 1x1"]
    assert "num_heads=71 is not divisible by 4 chips: use 1x1" in error_of(models, "falcon-7b", topology="2x2")


def test_a_scheme_that_does_not_fit_the_parts_is_told_of_the_topology(models):
    """11,008 / 4 = 2,752 inputs are no multiple of 128."""
    found = models.plan("llama-2-7b", quantization="int4", topology="1x1")
    assert found.placements[0].fits
    with pytest.raises(ConfigError, match=r"divided by 4 chips, .*2752 inputs are not a multiple .*int4_g64"):
        models.plan("llama-2-7b", quantization="int4", topology="2x2x1")


def test_decode_is_planned_for_some_batches_and_the_largest(models):
    found = models.plan("llama-3-8b", accelerator="v5e", quantization="int8", kv_cache_dtype="int8", context=1024)
    most = found.placements[-1].capacity.num_requests
    assert [step.num_requests for step in found.speeds[0].decode] == [1, 8, 64, most]
    assert sum(step.num_tokens for step in found.speeds[0].prefill) == 1023


def test_a_model_that_is_too_big_is_refused_with_the_smallest_that_fit(models):
    message = error_of(models, "llama-2-70b", accelerator="v5e", topology="2x2")
    assert "llama-2-70b (bfloat16) does not fit" in message
    assert "v5e 2x2: a chip has 16.91 GB, and weights take 34.49 GB" in message
    assert "the smallest that fit: v5e 4x4, v5p 2x2x1, 2 x h200, 4 x h100, 8 x l4" in message
    assert "--quantization int8 or int4, --kv-cache int8, a shorter --context" in message


def test_what_is_done_already_is_not_proposed(models):
    message = error_of(models, "llama-2-70b", topology="1x1", quantization="int4", kv_cache_dtype="int8")
    assert "make it smaller: a shorter --context" in message


@pytest.mark.parametrize("accelerator", ["v5e", ALL])
def test_a_topology_that_does_not_exist_is_refused_with_those_that_do(models, accelerator):
    message = error_of(models, topology="3x3", accelerator=accelerator)
    assert "topology='3x3' does not exist; use one of v5e: 1x1, 2x2, 2x4, 4x4" in message
    assert ("v5p: 2x2x1" in message) == (accelerator == ALL)


def test_all_problems_come_at_once(models):
    message = error_of(
        models, context=10**6, topology="9", price=-1.0, page_size=24, max_num_batched_tokens=0, batch=(0,)
    )
    for problem in (
        "context=1000000 must be from 2 to the model's 4096 tokens",
        "topology='9' does not exist",
        "price=-1.0 must be a positive number",
        "page_size=24 must be a power of two",
        "max_num_batched_tokens=0 must be at least 1",
        "batch=0 must be at least 1",
    ):
        assert problem in message


def test_pages_that_the_tpus_kernel_cannot_take_are_refused_where_there_is_a_tpu(models):
    message = error_of(models, page_size=16, kv_cache_dtype="int8")
    assert "page_size=16: the TPU's attention kernel takes pages of 128 tokens; use 128, or leave it out" in message
    assert models.placement("llama-2-7b", "h100", "1", page_size=32).footprint.page_size == 32
    # In float32 the kernel does not take the cache, so that any page will do.
    assert models.placement("llama-2-7b", "v5p", "2x2x1", page_size=32, dtype="float32").footprint.pages is None


@pytest.mark.parametrize("price", [0.0, float("inf"), float("nan")])
def test_absurd_prices_are_refused(models, price):
    assert f"price={price}" in error_of(models, price=price)


def test_an_unknown_scheme_is_refused(models):
    assert "scheme 'int3' of '*' is unknown" in error_of(models, quantization="int3")


def test_an_unknown_architecture_is_refused(models):
    with pytest.raises(UnsupportedModelError, match=r"\['MambaForCausalLM'\] is not supported; use one of: Falcon"):
        plan(PlanOptions(model=models.path("llama-2-7b", architectures=["MambaForCausalLM"])))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no config.json in .*pass a folder that has one"):
        plan(PlanOptions(model=tmp_path))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.json"):
        plan(PlanOptions(model=tmp_path / "nothing.json"))


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        plan(PlanOptions(model=tmp_path))


def test_a_folder_with_nothing_but_a_config_is_enough(models, tmp_path):
    models.path("llama-2-7b").rename(tmp_path / "config.json")
    assert plan(PlanOptions(model=tmp_path)).num_parameters == 6_738_415_616


def test_a_checkpoint_that_comes_quantized_is_held_as_it_is(models):
    """AWQ without its tensors: 4 bits, a float32 scale and a uint8 zero for 128 inputs; the head stays."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    path = models.path("llama-2-7b", quantization_config=awq)
    found = plan(PlanOptions(model=path, dtype="bfloat16", topology="1x1"))
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    tables, norms = 2 * 32000 * 4096 * 2, 65 * 4096 * 2
    assert found.placements[0].capacity.weight_bytes == matrices // 2 + 5 * matrices // 128 + tables + norms
    with pytest.raises(ConfigError, match="comes quantized already"):
        plan(PlanOptions(model=path, quantization="int8"))


def test_a_given_price_counts(models):
    found = models.plan("llama-2-7b", accelerator="v5p", price=2.5)
    assert (found.speeds[0].usd_per_hour, found.speeds[0].price.source) == (10.0, "--price")


def test_every_accelerator_has_a_price_with_date_and_source():
    assert set(list_prices()) == set(ACCELERATORS) == set(KINDS) - {ALL}
    for name in ACCELERATORS:
        found = price_of(name, None)
        assert found.usd > 0
        assert "2026-" in found.source


def test_topologies_grow():
    for kind in ACCELERATORS.values():
        sizes = [topology.num_chips for topology in kind.topologies]
        assert sizes == sorted(sizes)
        assert all(topology.num_chips % topology.num_hosts == 0 for topology in kind.topologies)
