"""A process of several reads its part: the right values, and no more bytes than it must."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.loader import Checkpoint, load_model, load_weights
from torchinfer.loader.placement import place
from torchinfer.loader.plan import plan_extents
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import Shard
from torchinfer.testing import TINY, save_random_checkpoint

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD, INTERMEDIATE, VOCAB = 8, 2, 8, 96, 160


def save(folder: Path, name: str) -> tuple[Checkpoint, ModelConfig]:
    kind, options = TINY[name]
    heads: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
    save_random_checkpoint(getattr(transformers, kind)(**{**options, **heads}), folder)
    return Checkpoint.open(folder), ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))


def local(config: ModelConfig, world: int) -> Decoder:
    """The model of one process on meta: heads, MLP columns and the vocabulary are divided."""
    moe = config.moe and replace(config.moe, intermediate_size=config.moe.intermediate_size // world)
    with torch.device("meta"):
        return build_model(
            replace(
                config,
                num_heads=config.num_heads // world,
                num_kv_heads=max(1, config.num_kv_heads // world),
                intermediate_size=config.intermediate_size // world,
                vocab_size=config.vocab_size // world,
                moe=moe,
            )
        )


def rows(tensor: Tensor, rank: int, num_parts: int, dim: int = 0) -> Tensor:
    return tensor.chunk(num_parts, dim)[rank]


@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_has_its_part_of_a_llama(tmp_path: Path, world: int) -> None:
    checkpoint, config = save(tmp_path, "llama")
    name = "model.layers.1.{}.weight"
    for rank in range(world):
        model = local(config, world)
        load_weights(model, checkpoint, torch.float32, CPU, False, shard=Shard(rank, world))
        found = model.state_dict()
        kv_parts = min(KV_HEADS, world)  # of four ranks, two share a key-value head
        parts = [(checkpoint.read(name.format(f"self_attn.{p}_proj")), p) for p in "qkv"]
        qkv = [rows(t, rank, world) if p == "q" else rows(t, rank * kv_parts // world, kv_parts) for t, p in parts]
        assert torch.equal(found["layers.1.attention.qkv.weight"], torch.cat(qkv))
        gate_up = [rows(checkpoint.read(name.format(f"mlp.{p}_proj")), rank, world) for p in ("gate", "up")]
        assert torch.equal(found["layers.1.mlp.gate_up.weight"], torch.cat(gate_up))
        for ours, theirs in (("attention.output", "self_attn.o_proj"), ("mlp.down", "mlp.down_proj")):
            expected = rows(checkpoint.read(name.format(theirs)), rank, world, dim=1)
            assert torch.equal(found[f"layers.1.{ours}.weight"], expected)
        assert torch.equal(found["layers.1.mlp_norm.weight"], checkpoint.read(name.format("post_attention_layernorm")))
        assert torch.equal(found["embedding.weight"], rows(checkpoint.read("model.embed_tokens.weight"), rank, world))


def test_each_rank_has_its_part_of_every_expert(tmp_path: Path) -> None:
    checkpoint, config = save(tmp_path, "mixtral")
    for rank in range(2):
        model = local(config, 2)
        load_weights(model, checkpoint, torch.bfloat16, CPU, False, shard=Shard(rank, 2))
        down = model.state_dict()["layers.0.mlp.experts.down"]
        for expert in range(len(down)):
            whole = checkpoint.read(f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight")
            assert torch.equal(down[expert], rows(whole, rank, 2, dim=1).bfloat16())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_rank_reads_its_rows_and_all_rows_of_what_is_cut_in_columns(tmp_path: Path, name: str) -> None:
    checkpoint, config = save(tmp_path, name)
    placements, problems = place(local(config, 2), checkpoint.tensors, Shard(1, 2))
    assert not problems
    wanted = {True: 0, False: 0}
    share = {True: 0, False: 0}
    for extent in plan_extents(placements, checkpoint.tensors, 1 << 20):
        for piece in extent.pieces:
            cut = placements[piece.entry.name].cut
            is_column_cut = cut is not None and cut.dim != 0
            wanted[is_column_cut] += piece.num_bytes
    for tensor, placement in placements.items():
        is_column_cut = placement.cut is not None and placement.cut.dim != 0
        divided = 1 if placement.cut is None or is_column_cut else 2
        share[is_column_cut] += checkpoint.tensors[tensor].num_bytes // divided
    assert wanted == share


def test_two_ranks_together_are_the_model(tmp_path: Path) -> None:
    checkpoint, config = save(tmp_path, "llama")
    whole = load_model(checkpoint, config, torch.float32, CPU).state_dict()["layers.0.mlp.down.weight"]
    parts = []
    for rank in range(2):
        model = local(config, 2)
        load_weights(model, checkpoint, torch.float32, CPU, False, shard=Shard(rank, 2))
        parts.append(model.state_dict()["layers.0.mlp.down.weight"])
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_what_does_not_divide_is_of_the_wrong_shape(tmp_path: Path) -> None:
    checkpoint, config = save(tmp_path, "llama")
    with pytest.raises(
        CheckpointError, match=r"'model.embed_tokens.weight' has \[160, 64\], the model needs \[53, 64\]"
    ):
        load_weights(local(config, 3), checkpoint, torch.float32, CPU, False, shard=Shard(0, 3))


def test_a_rank_outside_of_its_world_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank=2 of world=2 must be in \[0, 2\)"):
        Shard(2, 2)
