"""The HTML report, the terminal's table and the JSON of a made-up evaluation."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from torchinfer.evaluation.evaluate import Evaluation, Result
from torchinfer.evaluation.metrics import TokenScores, summarize, summarize_by_context
from torchinfer.evaluation.report import to_html, write_report
from torchinfer.evaluation.table import to_text

VOID = ("meta", "br")
FACTS = {
    "model": "models/a<b>&c",
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "device": "cpu",
    "text": "</p><script>alert(1)</script>.txt",
    "num_text_tokens": 1000,
    "num_scored_tokens": 99,
    "context": 128,
    "stride": 127,
    "num_windows": 1,
    "reference_dtype": "float32",
    "versions": {"torchinfer": "0.1.0"},
}


def made_up(scheme: str, kv: str, kl: float) -> Result:
    random = np.random.default_rng(0)
    reference = TokenScores(random.random(99), np.zeros(99), np.ones(99), np.arange(1, 100))
    scores = TokenScores(reference.nll + kl, np.full(99, kl), np.ones(99), reference.context)
    overall, parts = summarize(scores, reference), summarize_by_context(scores, reference)
    size = {"none": 2, "int8": 1}[scheme]
    return Result(scheme, kv, kl == 0 and scheme == "none", size * 10**9, 10**6, 100.0, 10.0, overall, parts)


@pytest.fixture
def evaluation() -> Evaluation:
    pairs = [("none", "bfloat16", 0.0), ("none", "fp8", 0.01), ("int8", "bfloat16", 0.002), ("int8", "fp8", 0.011)]
    return Evaluation(FACTS, tuple(made_up(*pair) for pair in pairs))


class Checker(HTMLParser):
    """Collects tags and attributes; every tag that is opened must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    return checker


def test_the_report_is_well_formed_and_has_its_parts(evaluation: Evaluation):
    checker = checked(to_html(evaluation, "torchinfer eval"))
    assert checker.open == []
    assert [checker.tags.count(tag) for tag in ("table", "h2")] == [2, 4]
    assert ("class", "plot") in checker.attributes


def test_the_report_asks_for_nothing_from_elsewhere(evaluation: Evaluation):
    html = to_html(evaluation, "torchinfer eval")
    checker = checked(html)
    assert {name for name, _ in checker.attributes} & {"src", "href", "xlink:href", "srcset", "onload"} == set()
    assert not set(checker.tags) & {"script", "link", "img", "iframe", "object"}
    assert re.search(r"https?:|url\(|@import", html) is None


def test_the_report_escapes_what_comes_from_outside(evaluation: Evaluation):
    html = to_html(evaluation, "torchinfer eval --text '<i>'")
    assert "&lt;script&gt;" in html and "a&lt;b&gt;&amp;c" in html and "&lt;i&gt;" in html
    assert "<i>" not in html


def test_every_coordinate_in_the_plots_is_a_number(evaluation: Evaluation):
    html = to_html(evaluation, "torchinfer eval")
    assert "nan" not in html and "inf" not in html.replace("infer", "")


def test_a_divergence_of_0_lies_on_the_lowest_line_and_all_of_0_are_said_in_words(evaluation: Evaluation):
    same = made_up("int8", "bfloat16", 0.0)
    assert checked(to_html(Evaluation(FACTS, (*evaluation.results, same)), "x")).open == []
    assert "Every divergence is 0." in to_html(Evaluation(FACTS, (evaluation.results[0], same)), "x")


def test_a_report_of_the_reference_alone_has_no_plots(evaluation: Evaluation):
    html = to_html(Evaluation(FACTS, evaluation.results[:1]), "x")
    assert "there is nothing to plot" in html and 'class="plot"' not in html


def test_an_old_report_stays_when_the_new_one_fails(evaluation: Evaluation, tmp_path):
    path = tmp_path / "report.html"
    write_report(evaluation, "first", path)
    with pytest.raises(KeyError):
        write_report(Evaluation({}, evaluation.results), "second", path)
    assert "first" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_shows_the_reference_and_what_each_pair_costs(evaluation: Evaluation):
    lines = to_text(evaluation).splitlines()
    assert next(line for line in lines if "reference" in line).split()[:2] == ["none", "bfloat16"]
    assert next(line.split() for line in lines if line.startswith("int8") and "fp8" in line)[4:6] == [
        f"{math.expm1(0.011):+.3%}",
        "0.011",
    ]


def test_the_json_holds_every_number_of_every_pair(evaluation: Evaluation):
    found = json.loads(json.dumps(evaluation.to_dict()))
    assert found["schema"] == 1 and len(found["results"]) == 4
    assert found["results"][3]["overall"]["kl"]["mean"] == pytest.approx(0.011)
    assert [bucket["last"] for bucket in found["results"][0]["by_context"]] == [15, 31, 63, 99]
