import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from torchinfer import LLM, SamplingParams
from torchinfer.cli import build_parser, main
from torchinfer.cli_flags import ENGINE, SAMPLING, SERVER
from torchinfer.errors import CheckpointError
from torchinfer.flags import memory
from torchinfer.loader import Checkpoint

MODEL = Path(__file__).parents[1] / "recipes" / "tiny-llama"
GENERATE = ["generate", "--model", str(MODEL), "--device", "cpu", "--dtype", "float32", "--temperature", "0"]
NORM = "model.layers.0.input_layernorm.weight"
needs_model = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason=f"needs the checkpoint {MODEL}")

ENGINE_FLAGS = {
    "model": ("--model m", "m"),
    "device": ("--device cpu", "cpu"),
    "tensor_parallel_size": ("--tensor-parallel-size 2", 2),
    "hosts_port": ("--hosts-port 9999", 9999),
    "expert_parallel": ("--expert-parallel", True),
    "dtype": ("--dtype float16", "float16"),
    "quantization": ("--quantization *.mlp.*=int4 --quantization int8", {"*.mlp.*": "int4", "*": "int8"}),
    "calibration": ("--calibrate text", "text"),
    "max_model_len": ("--max-model-len 99", 99),
    "max_num_requests": ("--max-concurrent 7", 7),
    "max_num_batched_tokens": ("--max-num-batched-tokens 77", 77),
    "page_size": ("--page-size 32", 32),
    "kv_cache_memory": ("--kv-cache-memory 2GiB", 2**31),
    "kv_cache_dtype": ("--kv-cache-dtype int8", "int8"),
    "prefix_cache": ("--no-prefix-cache", False),
    "seed": ("--engine-seed 4", 4),
    "moe_mode": ("--moe-mode capacity", "capacity"),
    "moe_capacity_factor": ("--moe-capacity-factor 2.5", 2.5),
    "cuda_graphs": ("--no-cuda-graphs", False),
    "compile_cache": ("--compile-cache c", "c"),
    "load_memory": ("--load-memory 3GiB", 3 << 30),
    "load_readers": ("--load-readers 4", 4),
    "load_direct": ("--no-load-direct", False),
    "verify": ("--verify", True),
    "progress": ("--no-progress", False),
}
SAMPLING_FLAGS = {
    "max_tokens": ("--max-tokens 3", 3),
    "min_tokens": ("--min-tokens 1", 1),
    "temperature": ("--temperature 0.5", 0.5),
    "top_k": ("--top-k 4", 4),
    "top_p": ("--top-p 0.9", 0.9),
    "min_p": ("--min-p 0.1", 0.1),
    "repetition_penalty": ("--repetition-penalty 1.1", 1.1),
    "presence_penalty": ("--presence-penalty -1", -1.0),
    "frequency_penalty": ("--frequency-penalty 1", 1.0),
    "logit_bias": ("--logit-bias 5=-2.5 --logit-bias 6=1", {5: -2.5, 6: 1.0}),
    "seed": ("--seed 8", 8),
    "n": ("--n 2", 2),
    "stop": ("--stop a --stop b", ["a", "b"]),
    "stop_token_ids": ("--stop-token-ids 1 --stop-token-ids 2", [1, 2]),
    "ignore_eos": ("--ignore-eos", True),
    "logprobs": ("--logprobs 0", 0),
    "prompt_logprobs": ("--prompt-logprobs 1", 1),
}
SERVER_FLAGS = {
    "host": ("--host ::1", "::1"),
    "port": ("--port 1", 1),
    "max_queue": ("--max-queue 2", 2),
    "drain_seconds": ("--drain-seconds 3", 3.0),
    "stream_interval_ms": ("--stream-interval-ms 4", 4.0),
    "max_message_bytes": ("--max-message-bytes 5", 5),
    "max_connection_age_seconds": ("--max-connection-age-seconds 6", 6.0),
    "tls_cert": ("--tls-cert a", "a"),
    "tls_key": ("--tls-key b", "b"),
    "tls_client_ca": ("--tls-client-ca c", "c"),
}
SETS = [("generate", ENGINE, ENGINE_FLAGS), ("generate", SAMPLING, SAMPLING_FLAGS), ("serve", SERVER, SERVER_FLAGS)]


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("command", "flags", "given"), SETS)
def test_every_option_has_a_flag_that_sets_it(command, flags, given):
    words = [word for line, _ in given.values() for word in line.split()]
    model = [] if "--model" in words else ["--model", "m"]
    arguments = build_parser().parse_args([command, *model, *words])
    assert flags.values(arguments) == {name: value for name, (_, value) in given.items()}
    assert list(given) == [option.name for option in fields(flags.kind)]


def test_a_scheme_without_a_pattern_is_for_the_whole_model():
    arguments = build_parser().parse_args(["generate", "--model", "m", "--quantization", "int8"])
    assert ENGINE.values(arguments)["quantization"] == "int8"


def test_a_scheme_without_a_pattern_comes_last_wherever_it_was_given():
    words = ["--quantization", "int8", "--quantization", "*.mlp.*=int4"]
    found = ENGINE.values(build_parser().parse_args(["generate", "--model", "m", *words]))["quantization"]
    assert list(found.items()) == [("*.mlp.*", "int4"), ("*", "int8")]


@pytest.mark.parametrize(
    ("schemes", "problems"),
    [
        (["int8", "int4"], ["'*' has several schemes, int8 and int4"]),
        (["a=int8", "b=int4", "a=int4"], ["'a' has several schemes, int8 and int4"]),
        (["=int8", "a=", ""], ["'=int8' is not", "'a=' is not", "'' is not"]),
    ],
)
def test_schemes_that_would_be_ignored_are_refused(schemes, problems, capsys):
    words = [word for scheme in schemes for word in ("--quantization", scheme)]
    assert main(["generate", "--model", "m", "--prompt", "x", *words]) == 1
    stderr = capsys.readouterr().err
    assert all(problem in stderr for problem in problems)


def test_flags_that_are_not_given_leave_the_defaults_alone():
    arguments = build_parser().parse_args(["generate", "--model", "m"])
    assert (ENGINE.values(arguments), SAMPLING.values(arguments)) == ({"model": "m"}, {})


@pytest.mark.parametrize(
    ("text", "value"), [("0.8", 0.8), ("1", 1.0), ("8GiB", 2**33), ("1.5gb", 1_500_000_000), ("123456", 123456)]
)
def test_memory_is_a_share_or_a_size(text, value):
    assert memory(text) == value


@pytest.mark.parametrize("command", ["generate", "serve", "client", "inspect", "doctor", "plan", "quantize", "eval"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"examples:\n  torchinfer {command}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "torchinfer 0.1.0\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["generate", "--model", "m"], "there is no prompt; give --prompt TEXT"),
        (["generate", "--prompt", "x"], "the following arguments are required: --model"),
        (["generate", "--model", "m", "--prompt", "x", "--temp", "1"], "unrecognized arguments: --temp"),
        (["generate", "--model", "m", "--device", "abacus"], "invalid choice: 'abacus'"),
        (["generate", "--model", "m", "--kv-cache-dtype", "int4"], "invalid choice: 'int4'"),
        (["generate", "--model", "m", "--kv-cache-memory", "lots"], "invalid memory value: 'lots'"),
        (["plan", "--model", "m", "--accelerator", "v9"], "invalid choice: 'v9'"),
        (["quantize", "m", "out"], "the following arguments are required: --scheme"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_wrong_usage_exits_with_2(argv, text, capsys):
    code, stderr = usage_error(capsys, *argv)
    assert code == 2
    assert text in stderr


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["generate", "--model", "/nowhere", "--prompt", "x"], "torchinfer: error: '/nowhere' does not exist"),
        (["generate", "--model", "m", "--prompt", "x", "--top-p", "7"], "top_p=7.0"),
        (["generate", "--model", "m", "--prompt-file", "/no/file"], "cannot read --prompt-file /no/file"),
        (["inspect", "/nowhere"], "torchinfer: error: '/nowhere' does not exist"),
        (["doctor", "/nowhere"], "torchinfer: error: '/nowhere' does not exist"),
        (["doctor", "/tmp", "--seconds", "0"], "seconds=0 must be more than 0"),
        (["plan", "--model", "/nowhere"], "torchinfer: error: '/nowhere' does not exist"),
        (["plan", "--model", str(MODEL), "--topology", "3x3"], "topology='3x3' does not exist"),
        (["quantize", "/nowhere", "out", "--scheme", "int8"], "torchinfer: error: '/nowhere' does not exist"),
        (["quantize", "m", "out", "--scheme", "int8", "--load-memory", "1MB"], "load_memory=1000000 must be at least"),
        (
            ["quantize", "m", "out", "--scheme", "int8", "--calibrate", "t"],
            "calibration='t' is for quantization int8_w8a8",
        ),
        (["serve", "--model", "m", "--port", "70000"], "port=70000"),
        (["client", "--target", "localhost:1", "--prompt", "x"], "torchinfer: error: "),
    ],
)
def test_an_error_is_a_message_without_traceback_and_exit_code_1(argv, text, capsys):
    assert main(argv) == 1
    stderr = capsys.readouterr().err
    assert text in stderr
    assert "Traceback" not in stderr


def test_debug_shows_the_traceback():
    with pytest.raises(CheckpointError):
        main(["inspect", "/nowhere", "--debug"])


@pytest.mark.parametrize("argv", [["serve", "--model", "m"], ["client", "--target", "t", "--prompt", "x"]])
def test_without_grpc_the_message_says_what_to_install(argv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grpc", None)
    assert main(argv) == 1
    assert "grpc is not installed; pip install torchinfer[serving]" in capsys.readouterr().err


@needs_model
def test_generate_prints_the_text_and_a_summary(capsys):
    assert main([*GENERATE, "--prompt", "def main(", "--max-tokens", "8"]) == 0
    with LLM(MODEL, device="cpu", dtype="float32") as llm:
        (expected,) = llm.generate("def main(", SamplingParams(max_tokens=8, temperature=0))
    printed = capsys.readouterr()
    assert printed.out == expected.text + "\n"
    assert "8 tokens in" in printed.err and "tokens/s, first after" in printed.err


@needs_model
def test_generate_prints_several_prompts_in_order(capsys):
    assert main([*GENERATE, "--prompt", "def main(", "--prompt", "x = ", "--max-tokens", "6"]) == 0
    with LLM(MODEL, device="cpu", dtype="float32") as llm:
        outputs = llm.generate(["def main(", "x = "], SamplingParams(max_tokens=6, temperature=0))
    assert capsys.readouterr().out == "=== prompt 1\n{}\n\n=== prompt 2\n{}\n".format(*(o.text for o in outputs))


@needs_model
def test_generate_json_has_a_line_for_each_sample(capsys):
    argv = [*GENERATE, "--prompt", "x = ", "--n", "2", "--max-tokens", "3", "--logprobs", "1", "--json"]
    assert main(argv) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["index"], line["finish_reason"]) for line in lines] == [
        ("x = ", 0, "length"),
        ("x = ", 1, "length"),
    ]
    assert [len(line["token_ids"]) for line in lines] == [len(line["logprobs"]) for line in lines] == [3, 3]


@needs_model
def test_a_prompt_file_is_one_prompt(tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("x =\ny = ")
    argv = [*GENERATE, "--prompt-file", str(tmp_path / "prompt.txt"), "--max-tokens", "2", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "x =\ny = "


@needs_model
def test_chat_without_a_template_is_an_error(capsys):
    assert main([*GENERATE, "--prompt", "x", "--chat"]) == 1
    assert "no chat template" in capsys.readouterr().err


@needs_model
def test_inspect_json_is_one_object(capsys):
    assert main(["inspect", str(MODEL), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "LlamaForCausalLM"


def test_doctor_prints_a_table_and_settings(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(bytes(2 << 20))
    assert main(["doctor", str(tmp_path), "--seconds", "0.5"]) == 0
    output, stderr = capsys.readouterr()
    assert "16 readers" in output
    assert "loader settings: --load-readers" in output
    assert stderr == ""  # no progress bar without a terminal


def test_doctor_json_is_one_object(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(bytes(2 << 20))
    assert main(["doctor", str(tmp_path), "--seconds", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"facts", "notes", "advice", "settings"}
    assert found["facts"]["address"] == str(tmp_path)


@needs_model
def test_quantize_writes_a_checkpoint_and_one_line(tmp_path, capsys):
    argv = ["quantize", str(MODEL), str(tmp_path / "out"), "--scheme", "*.mlp.*=int8", "--scheme", "none"]
    assert main(argv) == 0
    output, stderr = capsys.readouterr()
    assert output.startswith("quantized 0.010 GB to 0.007 GB in 2 files, ") and output.count("\n") == 1
    assert stderr == ""  # no progress bar without a terminal
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["format"] == "pack-quantized"
    assert "model.layers.0.self_attn.q_proj" in section["ignore"]


@needs_model
def test_quantize_takes_a_text_to_calibrate_with(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("def main():\n    pass\n")
    argv = ["quantize", str(MODEL), str(tmp_path / "out"), "--scheme", "int8_w8a8"]
    assert main([*argv, "--calibrate", str(tmp_path / "text.txt")]) == 0
    before, after = Checkpoint.open(MODEL), Checkpoint.open(tmp_path / "out")
    assert not after.read(NORM).equal(before.read(NORM))
    assert capsys.readouterr().err == ""


@needs_model
def test_quantize_says_how_to_go_on_after_ctrl_c(tmp_path, capsys, monkeypatch):
    def interrupt(descriptor, content, offset):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupt)
    assert main(["quantize", str(MODEL), str(tmp_path / "out"), "--scheme", "int8"]) == 130
    assert f"{tmp_path}/out.partial; give the same command to go on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def endless():
    argv = [*GENERATE, "--prompt", "def main(", "--max-tokens", "450", "--ignore-eos"]
    command = [sys.executable, "-m", "torchinfer.cli", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")


@needs_model
def test_ctrl_c_exits_with_130_and_no_traceback():
    with endless() as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr.decode().strip()) == (130, "torchinfer: interrupted")


@needs_model
def test_a_reader_that_has_enough_causes_no_message():
    with endless() as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1
