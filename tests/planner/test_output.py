"""The command: tables, JSON, the SVG, flags."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import fields

import pytest

from torchinfer.cli import build_parser, main
from torchinfer.planner.options import PLAN, PlanOptions
from torchinfer.planner.table import notes, to_dict, to_text

FLAGS = {
    "model": ("--model m", "m"),
    "quantization": ("--quantization *.mlp.*=int4 --quantization int8", {"*.mlp.*": "int4", "*": "int8"}),
    "kv_cache_dtype": ("--kv-cache int8", "int8"),
    "dtype": ("--dtype bfloat16", "bfloat16"),
    "expert_parallel": ("--expert-parallel", True),
    "context": ("--context 99", 99),
    "accelerator": ("--accelerator v5p", "v5p"),
    "topology": ("--topology 2x2x1", "2x2x1"),
    "price": ("--price 1.5", 1.5),
    "max_num_batched_tokens": ("--max-num-batched-tokens 77", 77),
    "page_size": ("--page-size 128", 128),
    "plot": ("--plot p", "p"),
    "compile": ("--compile", True),
    "batch": ("--batch 7,64", (7, 64)),
    "compile_seconds": ("--compile-seconds 8", 8.0),
}


def rows_of(text, first):
    return [line.split() for line in text.splitlines() if line.startswith(first)]


def test_every_option_has_a_flag_that_sets_it():
    words = [word for line, _ in FLAGS.values() for word in line.split()]
    arguments = build_parser().parse_args(["plan", *words])
    assert PLAN.values(arguments) == {name: value for name, (_, value) in FLAGS.items()}
    assert list(FLAGS) == [option.name for option in fields(PlanOptions)]


@pytest.mark.parametrize("text", ["8,,64", "8,many", "", "8,"])
def test_a_list_of_batches_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["plan", "--model", "m", "--batch", text])
    assert f"--batch: {text!r} must be whole numbers with commas between, as 8,64,256" in capsys.readouterr().err


def test_the_table_of_places(models):
    text = to_text(models.plan("llama-2-7b", quantization="int8", kv_cache_dtype="int8"))
    assert text.startswith("llama-2-7b: LlamaForCausalLM, 6,738,415,616 parameters\n")
    assert "weights int8, activations bfloat16, KV cache int8" in text
    columns = ["v5e", "1x1", "fits", "1", "1", "7.01", "41%", "270,336", "51", "36,224", "8", "12,416", "3"]
    assert rows_of(text, "v5e 1x1  ") == [columns]


def test_the_table_of_steps(models):
    """7.85 GB at 819 GB/s are 9.59 ms; 104 tokens a second at $1.20 an hour are $3.195 a million."""
    text = to_text(models.plan("llama-2-7b", quantization="int8", kv_cache_dtype="int8", accelerator="v5e"))
    assert "v5e 1x1: 1 x $1.2 = $1.20 an hour (list price on demand, us-central1, 2026-11-21" in text
    row = ["decode,", "batch", "1", "memory", "9.59", "104", "3.195", "7.85", "15", "0.000"]
    assert rows_of(text, "decode, batch 1 ") == [row]
    assert len(rows_of(text, "prefill, 4,095 tokens")) == 1


def test_columns_are_aligned(models):
    lines = to_text(models.plan("llama-2-70b", quantization="int8")).splitlines()
    table = lines[4 : lines.index("", 4)]
    ends = {len(line) for line in table}
    assert len(table) > 5
    assert len(ends) == 1


def test_what_does_not_divide_is_in_the_table_with_its_reason(models):
    text = to_text(models.plan("falcon-7b", context=128))
    assert "v5p 2x2x1  does not divide" in text
    assert "v5p 2x2x1: num_heads=71 is not divisible by 4 chips" in text


@pytest.mark.parametrize(
    ("name", "options", "note"),
    [
        ("llama-2-7b", {}, "These are limits of the hardware, not measurements"),
        ("llama-2-7b", {}, "the engine takes 90% of what weights leave"),
        ("gemma-2-9b", {"context": 8192}, "21 of 42 layers see 4096 tokens"),
        ("llama-2-7b", {"dtype": "float32"}, "float32: the peak of bfloat16 is taken"),
        ("llama-2-7b", {"quantization": "fp8"}, "v5e, v5p: no unit for fp8"),
        ("llama-2-7b", {"kv_cache_dtype": "fp8"}, "v5e, v5p: no unit for fp8"),
        ("qwen3-30b-a3b", {"topology": "2x4"}, "v5e 2x4: each of 4 KV heads is held by 2 chips"),
        (
            "falcon-7b",
            {"context": 128, "dtype": "float32", "quantization": "int8"},
            "v5e: heads of 64 numbers take the room of 128",
        ),
        ("llama-2-70b", {"topology": "4x4"}, "v5e 4x4: 4 hosts, one process on each"),
    ],
)
def test_notes(models, name, options, note):
    assert any(note in line for line in notes(models.plan(name, **options)))


def test_notes_are_about_this_plan_only(models):
    text = "\n".join(notes(models.plan("llama-2-7b", quantization="int8")))
    for word in ("fp8", "hosts", "held by", "layers see", "float32", "assumed", "take the room"):
        assert word not in text.replace("latency is an assumption", "")


def test_json_has_bytes_and_seconds(models):
    found = models.plan("llama-2-7b", quantization="int8", accelerator="v5e")
    data = json.loads(json.dumps(to_dict(found)))
    place, speed = data["placements"][0], data["speeds"][0]
    assert (place["topology"], place["weight_bytes"], place["fits"]) == ("1x1", 7_006_265_344, True)
    assert [step["batch"] for step in speed["decode"]] == [1, place["num_requests"]]
    assert speed["decode"][0]["tokens_per_second"] == pytest.approx(1 / speed["decode"][0]["seconds"])
    assert speed["prefill"]["num_tokens"] == 4095


def test_the_command_prints_json_and_writes_a_plot(models, tmp_path, capsys):
    plot = tmp_path / "plan.svg"
    argv = ["plan", "--model", str(models.path("llama-3-8b")), "--quantization", "int8", "--json", "--plot", str(plot)]
    assert main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    root = ElementTree.parse(plot).getroot()
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "llama-3-8b: weights int8, KV cache bfloat16" in texts
    for speed in data["speeds"]:
        name = f"v5e {speed['topology']}, $1.20 an hour"
        assert speed["accelerator"] != "v5e" or name in texts
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    most = data["speeds"][0]["decode"][-1]
    assert f"v5e 1x1, {most['batch']:,}: {most['tokens_per_second']:,.0f} ({most['limit']})" in titles


def test_a_plot_that_cannot_be_written_is_an_error(models, tmp_path, capsys):
    path = tmp_path / "nowhere" / "plan.svg"
    assert main(["plan", "--model", str(models.path("llama-2-7b")), "--plot", str(path)]) == 1
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
