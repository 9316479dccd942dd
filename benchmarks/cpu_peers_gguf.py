"""A checkpoint of a Llama or Qwen2 in bfloat16 as a GGUF file, for benchmarks/cpu_peers.py.

    python benchmarks/cpu_peers_gguf.py CHECKPOINT FILE {BF16,Q8_0,Q4_0}

Needs gguf, numpy and llama-cpp-python, which quantizes. The file has no tokenizer: prompts are ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and values, uint16 that are the bits of bfloat16."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = np.memmap(path, np.uint16, "r", offset=8 + size)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, data[begin // 2 : end // 2].reshape(entry["shape"])


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def interleaved(weight: Any, num_heads: int) -> Any:
    """Rows of halves as Hugging Face rotates them -> rows of pairs, as GGUF's Llama wants them."""
    heads = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def write(folder: Path, path: Path) -> None:
    """The file in BF16."""
    config = json.loads((folder / "config.json").read_text())
    kind, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, values in read_tensors(folder):
        if kind == "llama" and ".q_proj" in name:
            values = interleaved(values, heads)
        if kind == "llama" and ".k_proj" in name:
            values = interleaved(values, kv_heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), (values.astype(np.uint32) << 16).view(np.float32))
            continue
        shape = (values.shape[0], 2 * values.shape[1])
        rows = np.ascontiguousarray(values).view(np.uint8)
        writer.add_tensor(gguf_name(name), rows, raw_shape=shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    folder, path, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kind == "BF16":
        write(folder, path)
        return
    import llama_cpp

    source = path.with_name(f"{path.name}.bf16")
    write(folder, source)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    source.unlink()
    assert status == 0, f"llama.cpp cannot quantize: {status}"


if __name__ == "__main__":
    main()
