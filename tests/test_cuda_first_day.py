"""benchmarks/cuda_first_day.py: what fails, hangs or finds no time costs no other step; and its plan is one."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("cuda_first_day")


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_steps_run_whatever_became_of_others(script: Any, tmp_path: Path) -> None:
    made, step = tmp_path / "made", script.Step
    steps = [
        step("maker", program(f"import time; time.sleep(1); open({str(made)!r}, 'w')"), 20, is_background=True),
        step("bad", program("print('broken'); raise SystemExit(3)"), 20),
        step("late", program("import time; print('begun', flush=True); time.sleep(60)"), 0.5),
        step("user", program(f"import os; assert os.path.exists({str(made)!r})"), 20, "maker"),
    ]
    start = time.monotonic()
    found = script.run_steps(steps, tmp_path / "out", 60)
    assert time.monotonic() - start < 20
    assert {name: each["ended"] for name, each in found.items()} == {
        "bad": "with code 3",
        "late": "past its limit of 0 s",
        "maker": "well",
        "user": "well",
    }
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
    assert (tmp_path / "out" / "bad.log").read_text() == "broken\n"


def test_a_budget_that_is_used_up_ends_what_runs_and_names_the_rest(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "LEAST_SECONDS", 0.2)
    steps = [script.Step(name, program("import time; time.sleep(60)"), 100) for name in ("first", "second")]
    found = script.run_steps(steps, tmp_path, 1.0)
    assert found["first"]["ended"] == "past its limit of 1 s" and found["second"] == {"ended": "no time left"}


def test_the_plan_names_what_is_there_and_leaves_room_for_the_start_of_a_machine(script: Any, tmp_path: Path) -> None:
    steps = script.plan(tmp_path, tmp_path)
    names = [step.name for step in steps]
    for step in steps:
        files = [word for word in step.command if word.endswith(".py")]
        assert all((ROOT / file).is_file() for file in files), step
        assert step.waits_for is None or names.index(step.waits_for) < names.index(step.name)
    engine = import_module("cuda_engine").parts()
    parts = [step.command[step.command.index("--parts") + 1].split(",") for step in steps if "--parts" in step.command]
    assert {name for each in parts for name in each} == set(engine)
    tested = {path.name for path in (ROOT / "tests" / "kernels").glob("test_cuda_*.py")}
    planned = {Path(word).name for step in steps for word in step.command if "test_cuda_" in word}
    # Others need no GPU, or are not about the kernels.
    others = {"offline", "probe", "steps", "interpreter"}
    assert tested - planned == {f"test_cuda_{name}.py" for name in others}
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.cuda\n" in path.read_text()}
    names = {str(path.relative_to(ROOT)) for path in marked}
    assert {name for name in names if not name.startswith("tests/kernels/")} == set(script.GPU_TESTS)
    assert {Path(name).name for name in names} <= planned | {Path(name).name for name in script.GPU_TESTS}
