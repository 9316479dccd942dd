"""Bytes on a chip, against arithmetic by hand."""

import pytest
import torch

from torchinfer.errors import ConfigError
from torchinfer.kv_cache.tensors import allocate, kernel_pages
from torchinfer.loader import load_model
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.models.config import ModelConfig
from torchinfer.parallel import local_config, partition_problems
from torchinfer.planner.footprint import footprint
from torchinfer.planner.source import HOST, read_source
from torchinfer.testing import save_random_checkpoint, tiny_config

# As published: sums of the tensors of the checkpoints.
PARAMETERS = {
    "falcon-7b": 6_921_720_704,
    "gemma-2-9b": 9_241_705_984,
    "gemma-7b": 8_537_680_896,
    "gpt-j-6b": 6_050_882_784,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


def part_of(models, name, num_chips, quantization=None, cache=torch.bfloat16):
    source = read_source(models.path(name), "bfloat16", quantization)
    return footprint(source, num_chips, cache, page_size=16)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(models, name):
    assert models.plan(name).num_parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_without_quantization_each_parameter_takes_two_bytes(models, name):
    assert part_of(models, name, 1).weight_bytes == 2 * PARAMETERS[name]


def test_llama_2_7b_int8(models):
    """A byte a weight, a scale an output. Head and embeddings stay as they are; norms: two a layer, one at the end."""
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    scales = 32 * 4 * (3 * 4096 + 4096 + 2 * 11008 + 4096)
    tables, norms = 2 * 32000 * 4096 * 2, 65 * 4096 * 2
    assert part_of(models, "llama-2-7b", 1, "int8").weight_bytes == matrices + scales + tables + norms == 7_006_265_344


def test_llama_3_8b_int8_on_four_chips(models):
    """Matrices, tables, and scales of outputs that are divided; whole: norms, and scales of the 4,096 outputs of each
    row-parallel matrix."""
    matrices = 32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) // 4
    scales = 32 * 4 * ((4096 + 2 * 1024) // 4 + 4096 + 2 * 14336 // 4 + 4096)
    tables, norms = 2 * 128256 * 4096 * 2 // 4, 65 * 4096 * 2
    assert part_of(models, "llama-3-8b", 4, "int8").weight_bytes == matrices + scales + tables + norms


def test_mixtral_int8_on_four_chips(models):
    """Each chip has a quarter of every expert; the router, in bfloat16, is whole."""
    experts = 32 * 8 * 3 * 4096 * 14336 // 4
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024) // 4
    scales = 32 * 4 * ((4096 + 2048) // 4 + 4096 + 8 * (2 * 14336 // 4 + 4096))
    router, norms = 32 * 8 * 4096 * 2, 65 * 4096 * 2
    tables = 2 * 32000 * 4096 * 2 // 4
    expected = experts + attention + scales + router + norms + tables
    assert part_of(models, "mixtral-8x7b", 4, "int8").weight_bytes == expected


def test_a_tied_head_is_held_once(models):
    """Gemma 7B: 28 layers of attention with 16 heads of 256, and three matrices of 3,072 x 24,576."""
    matrices = 28 * (4 * 3072 * 4096 + 3 * 3072 * 24576)
    scales = 28 * 4 * (3 * 4096 + 3072 + 2 * 24576 + 3072)
    assert part_of(models, "gemma-7b", 1, "int8").weight_bytes == matrices + scales + 2 * (256000 * 3072 + 57 * 3072)


def test_a_head_that_is_a_copy_of_the_table_is_held_beside_it(models):
    request = {"lm_head": "int8", "*": "int8"}
    copy = 256000 * 3072 + 4 * 256000
    plain, found = part_of(models, "gemma-7b", 1, "int8"), part_of(models, "gemma-7b", 1, request)
    assert found.weight_bytes == plain.weight_bytes + copy
    assert [product.num_bytes for product in found.products if product.kind == "head"] == [copy]
    with pytest.raises(ConfigError, match=r"lm_head=int8 .* is for one chip"):
        part_of(models, "gemma-7b", 4, request)


def test_int4_has_two_weights_a_byte_and_a_scale_for_128(models):
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    tables, norms = 2 * 32000 * 4096 * 2, 65 * 4096 * 2
    expected = matrices // 2 + 4 * matrices // 128 + tables + norms
    assert part_of(models, "llama-2-7b", 1, "int4").weight_bytes == expected


def test_a_pattern_quantizes_what_it_fits(models):
    whole = part_of(models, "llama-2-7b", 1).weight_bytes
    down = 32 * 4096 * 11008
    found = part_of(models, "llama-2-7b", 1, {"*.mlp.down_proj": "int8"}).weight_bytes
    assert whole - found == down - 32 * 4 * 4096


@pytest.mark.parametrize(
    ("dtype", "bytes_per_head"), [(torch.bfloat16, 256), (torch.int8, 132), (torch.float8_e4m3fn, 132)]
)
def test_the_cache_of_a_token(models, dtype, bytes_per_head):
    """Keys and values of 8 heads of 128 in 32 layers; one byte formats have a float32 scale for each."""
    found = part_of(models, "llama-3-8b", 1, cache=dtype).kv_bytes_per_token
    assert found == 2 * 32 * 8 * bytes_per_head


@pytest.mark.parametrize(("num_chips", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1), (64, 1)])
def test_kv_heads_are_divided_and_then_repeated(models, num_chips, heads):
    found = part_of(models, "llama-2-70b", num_chips, cache=torch.int8)
    assert found.kv_bytes_per_token == 2 * 80 * heads * 132
    assert found.config.num_kv_heads == heads


def test_layers_with_windows_hold_all_tokens(models):
    assert part_of(models, "gemma-2-9b", 1, cache=torch.bfloat16).kv_bytes_per_token == 2 * 42 * 8 * 256 * 2


def test_a_request_takes_whole_pages(models):
    part = part_of(models, "llama-3-8b", 1)
    assert [part.request_bytes(length) // part.page_bytes for length in (1, 16, 17)] == [1, 1, 2]


def test_rows_of_the_vocabulary_are_padded(models):
    source = read_source(models.path("llama-2-7b", vocab_size=32001), "bfloat16", None)
    assert local_config(source.config, 8).vocab_size == 4001


@pytest.mark.parametrize(
    ("name", "num_chips", "problem"),
    [
        ("falcon-7b", 4, "num_heads=71 is not divisible by 4 chips"),
        ("llama-2-7b", 3, "intermediate_size=11008 is not divisible by 3 chips"),
        ("llama-2-70b", 128, "num_heads=64 is not divisible by 128 chips"),
        ("mixtral-8x7b", 3, "the experts' intermediate_size=14336 is not divisible by 3 chips"),
    ],
)
def test_sizes_that_do_not_divide_are_named(models, name, num_chips, problem):
    config = read_source(models.path(name), "bfloat16", None).config
    assert problem in partition_problems(config, num_chips)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_experts_among_chips_take_what_they_take_divided_within_but_for_scales(models, name):
    """Each chip has scales for the outputs of its experts only."""
    within, among = (read_source(models.path(name), "bfloat16", "int8", flag) for flag in (False, True))
    divided, whole = (footprint(source, 4, torch.int8).weight_bytes for source in (within, among))
    moe, layers = among.config.moe, among.config.num_layers
    assert divided - whole == layers * (moe.num_experts - moe.num_experts // 4) * among.config.hidden_size * 4
    assert partition_problems(among.config, 3)[-1] == f"num_experts={moe.num_experts} is not divisible by 3 chips"


def test_kv_heads_that_neither_divide_nor_are_divided_are_refused(models):
    path = models.path("llama-3-8b", num_attention_heads=24, num_key_value_heads=6, head_dim=128, hidden_size=3072)
    config = read_source(path, "bfloat16", None).config
    assert partition_problems(config, 4) == ["num_kv_heads=6 neither divides 4 chips nor is divisible by them"]
    assert partition_problems(config, 3) == ["intermediate_size=14336 is not divisible by 3 chips"]


FAMILIES = """llama llama-tied llama-biases qwen3 gemma2 gemma3 gptj falcon-7b falcon-new mixtral qwen2-moe
qwen3-moe-mixed""".split()
HELD = [*((name, "int8") for name in FAMILIES), ("llama", None), ("llama", "int4_g32")]


@pytest.mark.parametrize(("name", "quantization"), HELD)
def test_the_engine_holds_as_many_bytes(tmp_path, name, quantization):
    save_random_checkpoint(tiny_config(name), tmp_path, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path)
    config = ModelConfig.from_dict(checkpoint.config)
    model = load_model(checkpoint, config, torch.bfloat16, HOST, quantization=quantization)
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    source = read_source(tmp_path, "bfloat16", quantization)
    part = footprint(source, 1, torch.int8, page_size=16)
    assert part.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    cache = [tensor for layer in allocate(config, 3, 16, torch.int8, HOST) for tensor in layer.tensors]
    assert 3 * part.page_bytes == sum(tensor.numel() * tensor.element_size() for tensor in cache)
    part, pages = footprint(source, 1, torch.int8, num_cores=1), kernel_pages(config, torch.int8, 1)
    assert part.page_size == 128
    cache = [tensor for layer in allocate(config, 3, 128, torch.int8, HOST, pages) for tensor in layer.tensors]
    assert 3 * part.page_bytes == sum(tensor.numel() * tensor.element_size() for tensor in cache)


def test_each_chip_has_the_logits_of_its_rows_while_tokens_are_sampled(models):
    """Four float32 copies; of 258 requests one of four chips has 65 at most."""
    one, four = (part_of(models, "llama-3-8b", num_chips) for num_chips in (1, 4))
    assert one.activation_bytes(258, 258) == 4 * 258 * 128256 * 4
    assert four.activation_bytes(258, 258) == 4 * 65 * 128256 * 4
