"""`torchinfer eval`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from torchinfer.cli import build_parser, main
from torchinfer.evaluation.options import EVALUATION, EvaluationOptions
from torchinfer.evaluation.variants import cache_dtypes

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-llama"
FLAGS = {
    "model": ("--model m", "m"),
    "text": ("--text t", "t"),
    "schemes": ("--schemes none,int8", ("none", "int8")),
    "kv": ("--kv auto,fp8", ("auto", "fp8")),
    "context": ("--context 9", 9),
    "stride": ("--stride 8", 8),
    "max_tokens": ("--max-tokens 7", 7),
    "report": ("--report r", "r"),
    "reference_dtype": ("--reference-dtype float16", "float16"),
    "scratch": ("--scratch s", "s"),
    "device": ("--device cpu", "cpu"),
    "dtype": ("--dtype float16", "float16"),
    "page_size": ("--page-size 32", 32),
    "max_num_batched_tokens": ("--max-num-batched-tokens 6", 6),
    "load_memory": ("--load-memory 3GiB", 3 << 30),
    "progress": ("--no-progress", False),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("class Secret:\n    def method(self):\n        return 1\n" * 40, encoding="utf-8")
    return path


def test_every_option_has_a_flag_that_sets_it():
    words = [word for line, _ in FLAGS.values() for word in line.split()]
    values = EVALUATION.values(build_parser().parse_args(["eval", *words]))
    assert values == {name: value for name, (_, value) in FLAGS.items()}
    assert list(FLAGS) == [option.name for option in fields(EvaluationOptions)]


def test_table_report_and_logs_hold_no_text(text: Path, tmp_path: Path, capsys, caplog):
    report = tmp_path / "report.html"
    common = ["eval", "--model", str(MODEL), "--text", str(text), "--device", "cpu", "--max-tokens", "60"]
    assert main([*common, "--report", str(report), "--log-level", "debug"]) == 0
    output, errors = capsys.readouterr()
    assert "59 of" in output and "reference" in output
    page = report.read_text(encoding="utf-8")
    assert f"<pre>torchinfer {' '.join(common)}" in page
    assert "Secret" not in output + errors + page + caplog.text


def test_json_is_one_object(text: Path, capsys):
    assert main(["eval", "--model", str(MODEL), "--text", str(text), "--max-tokens", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"][0]["overall"]["num_tokens"] == found["num_scored_tokens"] == 39


def test_an_error_is_a_message_and_exit_code_1(text: Path, capsys):
    assert main(["eval", "--model", str(MODEL), "--text", str(text), "--schemes", "int3"]) == 1
    assert "'int3'" in capsys.readouterr().err


def test_ctrl_c_exits_with_130_and_leaves_no_file(text: Path, tmp_path: Path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    known = ",".join(cache_dtypes(torch.bfloat16))
    words = ["--text", str(text), "--stride", "1", "--context", "300", "--kv", known, "--scratch", str(scratch)]
    command = [sys.executable, "-m", "torchinfer.cli", "eval", "--model", str(MODEL), "--device", "cpu", *words]
    with subprocess.Popen([*command, "--log-level", "info"], stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stderr is not None
        while "measuring" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().strip() == "torchinfer: interrupted"
    assert process.returncode == 130
    assert list(scratch.iterdir()) == []
