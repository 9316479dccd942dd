"""What is refused before a model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from torchinfer.errors import ConfigError
from torchinfer.evaluation.inputs import prepare
from torchinfer.evaluation.options import EvaluationOptions

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-llama"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def main():\n    return 1\n" * 20, encoding="utf-8")
    return path


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(EvaluationOptions(**{"model": MODEL, "device": "cpu", **options}))
    return str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path):
    message = refusal(
        text=tmp_path / "missing.txt",
        schemes=("none", "int3"),
        kv=("int2",),
        report=tmp_path / "nowhere" / "report.html",
        page_size=12,
        context=100000,
        max_tokens=1,
        load_memory=1,
        dtype="float8",
    )
    for part in ("missing.txt", "'int3'", "'int2'", "nowhere", "page_size=12", "100000", "max_tokens=1", "float8"):
        assert part in message
    assert message.count("\n  - ") == 9


@pytest.mark.parametrize(
    ("content", "text"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "UTF-8"), (b"a", "at least 2")]
)
def test_a_text_that_gives_nothing_to_score_is_refused(content: bytes, text: str, tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert text in refusal(text=path)


def test_a_folder_is_no_text_and_no_report(tmp_path: Path):
    message = refusal(text=tmp_path, report=tmp_path)
    assert f"text={str(tmp_path)!r}" in message and f"report={str(tmp_path)!r} is a folder" in message


def test_windows_that_would_not_overlap_are_refused(text: Path):
    assert "stride=32 must be at most 31" in refusal(text=text, context=32, stride=32)


def test_a_checkpoint_without_tokenizer_is_refused(text: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert "no tokenizer" in refusal(model=folder, text=text)


def test_a_folder_without_checkpoint_is_refused_with_the_rest(text: Path, tmp_path: Path):
    message = refusal(model=tmp_path / "none", text=text, schemes=())
    assert "schemes names nothing" in message and str(tmp_path / "none") in message


def test_the_reference_comes_first_and_pairs_are_not_repeated(text: Path):
    options = EvaluationOptions(model=MODEL, text=text, device="cpu", kv=("bfloat16", "auto"), schemes=("none", "none"))
    assert prepare(options).pairs == {"none": ("bfloat16",)}


def test_max_tokens_cuts_the_text(text: Path):
    inputs = prepare(EvaluationOptions(model=MODEL, text=text, device="cpu", max_tokens=30))
    assert (len(inputs.token_ids), inputs.num_scored) == (30, 29)
    assert inputs.num_text_tokens > 100
