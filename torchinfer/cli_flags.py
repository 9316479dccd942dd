"""The flags that commands share: those of the engine, of sampling, and of the server."""

from __future__ import annotations

from torchinfer.config import DEVICES, DTYPES, KV_CACHE_DTYPES, MOE_MODES, SCHEMES, EngineConfig
from torchinfer.flags import FlagSet
from torchinfer.request import SamplingParams
from torchinfer.serving.options import ServerOptions

SCHEME_HELP = (
    f"{', '.join(SCHEMES)}, none; with a pattern such as 'model.layers.*.mlp.*=int4' for the layers that it fits; "
    "repeatable: the first pattern that fits counts, a scheme without one is for all others"
)

ENGINE = FlagSet(
    EngineConfig,
    "engine options",
    {
        "model": "folder of a Hugging Face checkpoint",
        "device": "where to compute; auto: the first of xla, cuda, cpu that is there",
        "tensor_parallel_size": "TPU chips, all of the slice, or GPUs that divide the model; XLA's CPU has as many "
        "chips as are asked for, the CPU as many processes",
        "hosts_port": "TPU slices of several hosts: TCP port of the first one, to which the others connect",
        "expert_parallel": "these chips have some of the experts each, whole, not a part of each",
        "dtype": "of weights and activations; auto: the checkpoint's, on TPU bfloat16 in place of float16",
        "quantization": f"weights, while they are loaded: {SCHEME_HELP} (default: as they are)",
        "calibration": "text file, for int8_w8a8: the unquantized model is run over its beginning, and what is found "
        "evens out the channels that are rounded to int8",
        "max_model_len": "tokens of prompt and output together (default: the model's context)",
        "max_num_requests": "requests running at once, samples counted",
        "max_num_batched_tokens": "tokens a step: decoding first, chunks of prompts fill the rest",
        "page_size": "tokens in a page of the KV cache, a power of two (default: 128 for a TPU's kernel, else 16)",
        "kv_cache_memory": "of the KV cache: share of the free memory such as 0.8, or a size such as 8GiB; on CUDA "
        "what the largest step takes is not free (default: by device)",
        "kv_cache_dtype": "of the KV cache; auto: the model's; int8 and fp8 hold about twice the tokens of bfloat16",
        "prefix_cache": "keep the KV cache of prompts for later ones that begin alike",
        "seed": "for requests that have no seed of their own",
        "moe_mode": "experts: dropless, or capacity: what exceeds the capacity factor is dropped and counted",
        "moe_capacity_factor": "room of each expert with --moe-mode capacity, 1 is an equal share",
        "cuda_graphs": "CUDA: capture steps in which all requests decode, at the start",
        "compile_cache": "XLA: folder that keeps compiled programs between starts",
        "load_memory": "host memory for what is on its way from the checkpoint to its place (default: 2GiB, or more "
        "where the largest tensors need it)",
        "load_readers": "parts of files read at once, at most (default: as many as bring more)",
        "load_direct": "read around the page cache, O_DIRECT (default: where the first reads show a gain)",
        "verify": "compare whole files with their CRC32C: Cloud Storage's, or that of a file CRC32C beside them",
        "progress": "progress bars on standard error, if it is a terminal",
    },
    choices={"device": DEVICES, "dtype": DTYPES, "kv_cache_dtype": KV_CACHE_DTYPES, "moe_mode": MOE_MODES},
    names={
        "calibration": ("--calibrate",),
        "seed": ("--engine-seed",),
        "max_num_requests": ("--max-num-requests", "--max-concurrent"),
    },
)

SAMPLING = FlagSet(
    SamplingParams,
    "sampling options",
    {
        "max_tokens": "end after so many tokens",
        "min_tokens": "no end of text before so many tokens",
        "temperature": "0: greedy",
        "top_k": "keep the K most probable tokens; 0 keeps all",
        "top_p": "keep the most probable tokens that sum to this probability",
        "min_p": "keep tokens at least this probable, relative to the most probable one",
        "repetition_penalty": "on tokens seen in prompt and output",
        "presence_penalty": "on tokens seen in the output",
        "frequency_penalty": "on tokens seen in the output, times their number",
        "logit_bias": "add BIAS to the logit of token ID; repeatable",
        "seed": "same seed, same prompt: same text",
        "n": "independent samples of each prompt",
        "stop": "end before this text; repeatable",
        "stop_token_ids": "end after this token; repeatable",
        "ignore_eos": "go on after an end-of-text token",
        "logprobs": "log-probabilities of each token and of the N most probable ones, with --json",
        "prompt_logprobs": "the same for the tokens of the prompt, with --json",
    },
)

SERVER = FlagSet(
    ServerOptions,
    "server options",
    {
        "host": "address to listen on; 127.0.0.1: this machine only",
        "port": "0: any that is free",
        "max_queue": "requests that may wait; more are refused with RESOURCE_EXHAUSTED",
        "drain_seconds": "after SIGTERM, time for open requests to end by themselves",
        "stream_interval_ms": "tokens within it share a message, the first goes at once; up to 100 with many open "
        "streams; 0: each token by itself",
        "max_message_bytes": "size limit of a request",
        "max_connection_age_seconds": "then clients reconnect, and are balanced anew (default: never)",
        "tls_cert": "PEM file with the server's certificate chain (default: no TLS)",
        "tls_key": "PEM file with its key",
        "tls_client_ca": "PEM file; clients must show a certificate that it signed",
    },
)
