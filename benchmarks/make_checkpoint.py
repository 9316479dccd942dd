"""Write a synthetic Hugging Face checkpoint of about a given size: small random values, the shapes of a real model.

    python benchmarks/make_checkpoint.py --out /tmp/dense --gigabytes 8 --kind dense --shards 8
    python benchmarks/make_checkpoint.py --out /tmp/moe --gigabytes 8 --kind moe --shards 1
    python benchmarks/make_checkpoint.py --out /tmp/8b --kind llama3-8b --shards 4

Dense is a Llama, moe a Qwen3 with experts, falcon a Falcon, whose q, k and v are turned while it is loaded; llama3-8b
has that model's shapes and takes 16 GB, mixtral-4-layers those of Mixtral 8x7B with 4 layers of 32, 12 GB. torchinfer
and transformers load all of them. The files are written from one
random block, each tensor from another place of it: as fast as the disk takes them, and the memory stays small.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
BLOCK_VALUES = 8 << 20
STRIDE = 1_000_003  # a prime: tensors begin at different places of the block
FREE_BYTES = 1 << 30  # of the disk, to be left
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """One size of a model; the number of layers comes from the bytes asked for."""

    hidden: int
    head_dim: int
    min_layers: int
    num_experts: int = 0
    vocab_size: int = 0
    is_mixtral: bool = False
    is_falcon: bool = False

    @property
    def num_heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // 4

    @property
    def vocab(self) -> int:
        return self.vocab_size or 8 * self.hidden

    @property
    def intermediate(self) -> int:
        """As wide as Llama 3's and Mixtral's, or Falcon's; a Qwen3's expert as narrow as Qwen3-30B-A3B's."""
        if self.is_falcon:
            return 4 * self.hidden
        return 3 * self.hidden // 8 if self.num_experts and not self.is_mixtral else 7 * self.hidden // 2


DENSE = [
    Sizes(256, 32, 2),
    *(Sizes(hidden, 128, hidden // 128) for hidden in (512, 1024, 2048, 3072, 4096, 5120, 8192)),
]
FALCON = [replace(sizes, is_falcon=True) for sizes in DENSE]
NAMED = {  # with their layers, whatever is asked for
    "llama3-8b": (Sizes(4096, 128, 32, vocab_size=128256), 32),
    "mixtral-4-layers": (Sizes(4096, 128, 4, 8, 32000, is_mixtral=True), 4),
    "mixtral-tiny": (Sizes(256, 32, 2, 4, is_mixtral=True), 2),
}
MOE = [Sizes(256, 32, 4, 16), Sizes(512, 128, 4, 32), Sizes(1024, 128, 4, 64), Sizes(2048, 128, 4, 128)]


def make_checkpoint(
    out: Path, gigabytes: float, *, kind: str = "dense", shards: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Write config.json, the shards and their index into the new folder `out`; returns the bytes of all tensors."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: remove it, or name another folder")
    sizes, num_layers = choose(kind, gigabytes * 1e9 / dtype.itemsize)
    shapes = all_shapes(sizes, num_layers)
    total = sum(map(math.prod, shapes.values())) * dtype.itemsize
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if total + FREE_BYTES > free:
        raise SystemExit(
            f"{out} has {free / 1e9:.1f} GB free; {total / 1e9:.1f} GB for it and {FREE_BYTES / 1e9:.1f} GB "
            "to spare are needed: name another folder, or ask for less"
        )
    files = cut(shapes, shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(out)) as bar:
        for seed, (name, tensors) in enumerate(files.items()):
            write_shard(out / name, tensors, dtype, seed, bar)
    if shards > 1:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(out / "config.json", make_config(sizes, num_layers, dtype))
    return total


def choose(kind: str, num_values: float) -> tuple[Sizes, int]:
    """The widest model of the kind that gets enough layers, and its number of layers."""
    if kind in NAMED:
        return NAMED[kind]
    candidates = {"moe": MOE, "falcon": FALCON, "dense": DENSE}[kind]
    found = candidates[0], 1
    for sizes in candidates:
        skeleton = count(all_shapes(sizes, 0))
        num_layers = round((num_values - skeleton) / (count(all_shapes(sizes, 1)) - skeleton))
        if num_layers >= sizes.min_layers:
            found = sizes, num_layers
    return found


def count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def all_shapes(sizes: Sizes, num_layers: int) -> Shapes:
    """Name -> shape of all tensors, in the order of the layers."""
    if sizes.is_falcon:
        return falcon_shapes(sizes, num_layers)
    shapes: Shapes = {"model.embed_tokens.weight": (sizes.vocab, sizes.hidden)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in layer_shapes(sizes).items()}
    return shapes | {"model.norm.weight": (sizes.hidden,), "lm_head.weight": (sizes.vocab, sizes.hidden)}


def falcon_shapes(sizes: Sizes, num_layers: int) -> Shapes:
    """The newer architecture with one norm a layer, without biases."""
    hidden, heads = sizes.hidden, sizes.num_heads + 2 * sizes.num_kv_heads
    shapes: Shapes = {"transformer.word_embeddings.weight": (sizes.vocab, hidden)}
    for layer in range(num_layers):
        prefix = f"transformer.h.{layer}."
        shapes |= {f"{prefix}input_layernorm.{kind}": (hidden,) for kind in ("weight", "bias")}
        shapes[f"{prefix}self_attention.query_key_value.weight"] = (heads * sizes.head_dim, hidden)
        shapes[f"{prefix}self_attention.dense.weight"] = (hidden, hidden)
        shapes[f"{prefix}mlp.dense_h_to_4h.weight"] = (sizes.intermediate, hidden)
        shapes[f"{prefix}mlp.dense_4h_to_h.weight"] = (hidden, sizes.intermediate)
    shapes |= {f"transformer.ln_f.{kind}": (hidden,) for kind in ("weight", "bias")}
    return shapes | {"lm_head.weight": (sizes.vocab, hidden)}


def layer_shapes(sizes: Sizes) -> Shapes:
    hidden, kv = sizes.hidden, sizes.num_kv_heads * sizes.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
    }
    if not sizes.num_experts:
        return shapes | mlp_shapes("mlp.", sizes)
    if sizes.is_mixtral:
        return shapes | mixtral_shapes(sizes)
    shapes |= {"self_attn.q_norm.weight": (sizes.head_dim,), "self_attn.k_norm.weight": (sizes.head_dim,)}
    shapes["mlp.gate.weight"] = (sizes.num_experts, hidden)
    for expert in range(sizes.num_experts):
        shapes |= mlp_shapes(f"mlp.experts.{expert}.", sizes)
    return shapes


def mlp_shapes(prefix: str, sizes: Sizes) -> Shapes:
    up, down = (sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)
    return {f"{prefix}gate_proj.weight": up, f"{prefix}up_proj.weight": up, f"{prefix}down_proj.weight": down}


def mixtral_shapes(sizes: Sizes) -> Shapes:
    up, down = (sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)
    shapes: Shapes = {"block_sparse_moe.gate.weight": (sizes.num_experts, sizes.hidden)}
    for expert in range(sizes.num_experts):
        prefix = f"block_sparse_moe.experts.{expert}."
        shapes |= {f"{prefix}w1.weight": up, f"{prefix}w2.weight": down, f"{prefix}w3.weight": up}
    return shapes


def make_config(sizes: Sizes, num_layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as transformers reads it."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if sizes.is_mixtral:
        moe = {"num_local_experts": sizes.num_experts, "num_experts_per_tok": 2, "sliding_window": None}
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **moe}
    elif sizes.num_experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": sizes.intermediate,
            "num_experts": sizes.num_experts,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if sizes.is_falcon:
        config |= {
            "architectures": ["FalconForCausalLM"],
            "model_type": "falcon",
            "num_kv_heads": sizes.num_kv_heads,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
        }
        for name in ("num_key_value_heads", "intermediate_size", "head_dim", "rms_norm_eps", "hidden_act"):
            del config[name]
    return config


def cut(shapes: Shapes, num_shards: int) -> dict[str, Shapes]:
    """File name -> its tensors: shards of about the same size, in the order of the layers."""
    if num_shards == 1:
        return {"model.safetensors": shapes}
    total, done = count(shapes), 0
    files: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        number = min(done * num_shards // total, num_shards - 1) + 1
        files.setdefault(f"model-{number:05d}-of-{num_shards:05d}.safetensors", {})[name] = shape
        done += math.prod(shape)
    return files


def write_shard(path: Path, shapes: Shapes, dtype: torch.dtype, seed: int, bar: tqdm[Any]) -> None:
    """One safetensors file; its tensors are sorted by name, as Hugging Face's writer does."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    values = torch.randn(BLOCK_VALUES, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)
    block = values.view(torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (_, shape) in enumerate(sorted(shapes.items())):
            start = (index * STRIDE % BLOCK_VALUES) * dtype.itemsize
            write_values(file, block, start, math.prod(shape) * dtype.itemsize, bar)


def write_values(file: BinaryIO, block: memoryview, start: int, num_bytes: int, bar: tqdm[Any]) -> None:
    """`num_bytes` of the block from `start`, going round."""
    for piece in pieces(block, start, num_bytes):
        bar.update(file.write(piece))


def pieces(block: memoryview, start: int, num_bytes: int) -> Iterator[memoryview]:
    while num_bytes:
        piece = block[start : start + num_bytes]
        yield piece
        num_bytes -= len(piece)
        start = 0


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--kind", choices=["dense", "moe", "falcon", *NAMED], default="dense")
    parser.add_argument("--shards", type=int, default=1, help="1: one file without an index")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    args = parser.parse_args()
    total = make_checkpoint(args.out, args.gigabytes, kind=args.kind, shards=args.shards, dtype=DTYPES[args.dtype])
    print(json.dumps({"made": str(args.out), "bytes": total, "kind": args.kind, "shards": args.shards}))


if __name__ == "__main__":
    main()
