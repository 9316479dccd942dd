"""lm-evaluation-harness over torchinfer, and its own `hf` model as the truth: the same checkpoint, in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytest.importorskip("accelerate", reason="the harness's hf model needs accelerate")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from torchinfer.errors import ConfigError, RequestError
from torchinfer.evaluation.harness import HarnessModel
from torchinfer.evaluation.lm_eval import register

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-llama"
CONTEXT = 96  # short, so that truncation is seen
DOCUMENTS = [
    {"text": "import os\nimport ", "choices": ["sys", "zebra", "the end"], "answer": 0},
    {"text": "def __init__(self", "choices": [", name):", " banana", "):"], "answer": 2},
    {"text": "for i in range(10):\n    print(" * 12, "choices": ["i)", "x", "None"], "answer": 0},
    {"text": "class Queue:\n    def ", "choices": ["__init__(self", "qqq"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = {"tiny_choice": CHOICE, "tiny_rolling": ROLLING, "tiny_generate": GENERATE}


@pytest.fixture(scope="module")
def ours() -> Iterator[HarnessModel]:
    register()
    options = {"dtype": "float32", "device": "cpu", "max_model_len": CONTEXT, "progress": False}
    yield get_model("torchinfer").create_from_arg_obj({"pretrained": str(MODEL), **options}, {"batch_size": 1})


@pytest.fixture(scope="module")
def theirs(ours: HarnessModel) -> Any:
    """With our context: ours keeps two tokens for other things."""
    arguments = {"pretrained": str(MODEL), "dtype": "float32", "device": "cpu", "max_length": ours.max_length}
    return get_model("hf").create_from_arg_obj(arguments, {"batch_size": 4})


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def write_tasks(folder: Path) -> None:
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest, encoding="utf-8")


def evaluated(model: Any, folder: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return found


def test_tasks_of_each_kind_give_what_hf_gives(ours: HarnessModel, theirs: Any, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tasks(tmp_path)
    first, second = evaluated(ours, tmp_path), evaluated(theirs, tmp_path)
    for task in TASKS:
        for name, value in second["results"][task].items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert first["results"][task][name] == expected, (task, name)
    responses = [[s["resps"] for s in found["samples"]["tiny_generate"]] for found in (first, second)]
    assert responses[0] == responses[1]


def test_loglikelihoods_are_those_of_hf_where_the_context_is_cut_too(ours: HarnessModel, theirs: Any):
    pairs = [(d["text"], choice) for d in DOCUMENTS for choice in d["choices"]] + [("", "import os")]
    assert max(len(ours.tok_encode(text)) for text, _ in pairs) > CONTEXT
    found, expected = (model.loglikelihood(requests("loglikelihood", pairs)) for model in (ours, theirs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert len({greedy for _, greedy in found}) == 2


def test_rolling_loglikelihoods_are_those_of_hf_over_several_windows(ours: HarnessModel, theirs: Any):
    texts = [("x = 1\n",), ("def main():\n    return 1\n\n" * 30,)]
    found, expected = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for model in (ours, theirs)
    )
    assert len(ours.tok_encode(texts[1][0])) > 2 * CONTEXT
    assert found == pytest.approx(expected, abs=2e-3)


def test_generation_stops_and_cuts_prompts_as_hf_does(ours: HarnessModel, theirs: Any):
    arguments = [
        ("def main(", {"until": ["):"], "max_gen_toks": 20}),
        ("import os\nimport ", {"until": "\n", "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}),
        ("for i in range(10):\n    print(" * 12, {"max_gen_toks": 30, "temperature": 0.0}),
    ]
    found, expected = (model.generate_until(requests("generate_until", arguments)) for model in (ours, theirs))
    assert found == expected
    assert len(ours.tok_encode(arguments[2][0])) > ours.max_length - 30


def test_sampling_arguments_are_honoured(ours: HarnessModel):
    def text(**arguments: Any) -> str:
        given = {"max_gen_toks": 24, **arguments}
        return ours.generate_until(requests("generate_until", [("def ", given)]))[0]

    greedy = text()
    assert text(do_sample=True, temperature=1.5, seed=1) == text(temperature=1.5, seed=1) != greedy
    assert text(do_sample=True, seed=1) != text(do_sample=True, seed=2)
    assert text(do_sample=True, top_k=1) == greedy


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_beams": 4, "typical_p": 0.9}, "num_beams, typical_p"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_gen_toks": CONTEXT}, f"max_gen_toks={CONTEXT}"),
    ],
)
def test_generation_arguments_that_cannot_be_honoured_are_refused(ours: HarnessModel, arguments, text):
    with pytest.raises(RequestError, match=text):
        ours.generate_until(requests("generate_until", [("x", arguments)]))


def test_a_continuation_longer_than_the_context_is_refused(ours: HarnessModel):
    with pytest.raises(RequestError, match="continuation has"):
        ours.loglikelihood(requests("loglikelihood", [("x", "def f():\n" * 100)]))


@pytest.mark.parametrize(("options", "text"), [({"batch_size": 8}, "batch_size=8"), ({"max_batch_size": 2}, "=2")])
def test_batch_sizes_are_refused_because_the_engine_decides(options, text):
    with pytest.raises(ConfigError, match=text):
        HarnessModel(str(MODEL), **options)


def test_a_text_with_bos_does_not_get_another(ours: HarnessModel):
    assert ours.tok_encode("<s>def")[0] == ours.prefix_token_id == 0
    assert ours.tok_encode("<s>def").count(0) == 1


@pytest.mark.slow  # the harness reads its own thousands of tasks
def test_the_command_of_the_harness_knows_the_model(tmp_path: Path):
    write_tasks(tmp_path)
    model = f"pretrained={MODEL},dtype=float32,max_model_len={CONTEXT},progress=False"
    words = ["run", "--model", "torchinfer", "--model_args", model, "--tasks", "tiny_choice", "--device", "cpu"]
    command = [sys.executable, "-m", "torchinfer.evaluation.lm_eval", *words, "--include_path", str(tmp_path)]
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
