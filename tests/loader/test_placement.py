"""Tables of names: expansion, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import nn

from torchinfer.loader.header import TensorEntry
from torchinfer.loader.placement import place
from torchinfer.weight_map import Target


class Merged(nn.Module):
    """q and k in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = {"q": slice(0, 4), "k": slice(4, 6)}
        self.weight = nn.Parameter(torch.empty(6, 3))


class Experts(nn.Module):
    """Five experts' gate and up in one parameter, down in another."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = {"gate": slice(0, 2), "up": slice(2, 4)}
        self.gate_up = nn.Parameter(torch.empty(5, 4, 3))
        self.down = nn.Parameter(torch.empty(5, 3, 2))


class Block(nn.Module):
    """The even layers of a model have experts."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.merged = Merged()
        self.experts = Experts() if layer % 2 == 0 else None


class Model(nn.Module):
    """Three layers, and a head that may be tied."""

    CHECKPOINT: ClassVar = {
        "embed": Target("embedding.weight"),
        "head": Target("head.weight"),
        "l.{layer}.q": Target("layers.{layer}.merged.weight", "q"),
        "l.{layer}.k": Target("layers.{layer}.merged.weight", "k"),
        "l.{layer}.bias": Target("layers.{layer}.merged.bias"),
        "l.{layer}.e.{expert}.gate": Target("layers.{layer}.experts.gate_up", "gate"),
        "l.{layer}.e.{expert}.up": Target("layers.{layer}.experts.gate_up", "up"),
        "l.{layer}.e.{expert}.down": Target("layers.{layer}.experts.down"),
    }
    IGNORED = ("l.{layer}.rotary",)

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.layers = nn.ModuleList(Block(layer) for layer in range(3))


def build(tied: bool = False) -> Model:
    with torch.device("meta"):
        return Model(tied)


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"embed": (7, 3), "head": (7, 3)}
    for layer in range(3):
        found |= {f"l.{layer}.q": (4, 3), f"l.{layer}.k": (2, 3)}
        for expert in range(5 if layer % 2 == 0 else 0):
            prefix = f"l.{layer}.e.{expert}."
            found |= {prefix + "gate": (2, 3), prefix + "up": (2, 3), prefix + "down": (3, 2)}
    return found


def entries(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(name, (dtypes or {}).get(name, torch.float32), shape, "file", 0, 0)
        for name, shape in shapes.items()
    }


def test_a_complete_checkpoint_has_a_place_for_each_tensor() -> None:
    placements, problems = place(build(), entries(shapes()))
    assert problems == []
    assert set(placements) == set(shapes())


def test_slots_and_experts_pick_rows_and_the_first_index() -> None:
    placements, _ = place(build(), entries(shapes()))
    parameter = torch.arange(5 * 4 * 3).view(5, 4, 3)
    assert torch.equal(placements["l.2.e.3.up"].part(parameter), parameter[3, 2:4])
    assert placements["l.2.e.3.up"].parameter == "layers.2.experts.gate_up"
    assert torch.equal(placements["l.0.k"].part(parameter[0]), parameter[0, 4:6])


def test_ignored_tensors_have_no_place_and_are_no_problem() -> None:
    placements, problems = place(build(), entries(shapes() | {"l.11.rotary": (3,)}))
    assert problems == [] and "l.11.rotary" not in placements


def test_all_missing_tensors_are_listed() -> None:
    present = {name: shape for name, shape in shapes().items() if name not in ("embed", "l.1.q", "l.2.e.4.down")}
    _, problems = place(build(), entries(present))
    assert problems == ["3 tensors missing: 'embed'; 'l.1.q'; 'l.2.e.4.down'"]


@pytest.mark.parametrize(
    "name", ["other", "l.3.q", "l.0.bias", "l.1.e.0.gate", "l.0.e.5.up", "l.00.q", "l.x.rotary", "xembed", "embedx"]
)
def test_unexpected_tensors_are_listed(name: str) -> None:
    _, problems = place(build(), entries(shapes() | {name: (3,)}))
    assert problems == [f"1 tensor unexpected: '{name}'"]


def test_wrong_shapes_are_listed_with_both() -> None:
    _, problems = place(build(), entries(shapes() | {"embed": (8, 3), "l.0.k": (3, 2)}))
    assert problems == [
        "2 tensors of the wrong shape: 'embed' has [8, 3], the model needs [7, 3]; "
        "'l.0.k' has [3, 2], the model needs [2, 3]"
    ]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_wrong_dtypes_are_listed(dtype: torch.dtype) -> None:
    _, problems = place(build(), entries(shapes(), {"l.0.q": dtype}))
    name = str(dtype).removeprefix("torch.")
    assert problems == [
        f"1 tensor of the wrong dtype: 'l.0.q' has {name}, float16, bfloat16, float32 or float64 is needed"
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_fine(dtype: torch.dtype) -> None:
    assert place(build(), entries(shapes(), {"l.0.q": dtype}))[1] == []


def test_all_kinds_of_problems_come_together_and_long_lists_are_cut() -> None:
    found = {name: shape for name, shape in shapes().items() if ".e." not in name} | {"x": (1,), "embed": (1,)}
    _, problems = place(build(), entries(found))
    assert [problem.split(":")[0] for problem in problems] == [
        "30 tensors missing",
        "1 tensor unexpected",
        "1 tensor of the wrong shape",
    ]
    assert problems[0].endswith("; ... and 10 more")


@pytest.mark.parametrize("present", ["embed", "head"])
def test_a_tied_parameter_needs_one_of_its_tensors(present: str) -> None:
    found = {name: shape for name, shape in shapes().items() if name not in ("embed", "head")} | {present: (7, 3)}
    placements, problems = place(build(tied=True), entries(found))
    assert problems == [] and present in placements


def test_of_both_tensors_of_a_tied_parameter_one_is_read() -> None:
    placements, problems = place(build(tied=True), entries(shapes()))
    assert problems == [] and "embed" in placements and "head" not in placements


def test_a_parameter_without_a_name_in_the_checkpoint_is_reported() -> None:
    model = build()
    model.extra = nn.Parameter(torch.empty(1, device="meta"))
    _, problems = place(model, entries(shapes()))
    assert problems == ["1 tensor missing: a tensor for parameter 'extra', which Model.CHECKPOINT does not name"]


def test_slots_that_leave_rows_out_are_our_bug() -> None:
    model = build()
    model.layers[0].merged.slots = {"q": slice(0, 4), "k": slice(4, 5)}
    with pytest.raises(AssertionError, match=r"layers\.0\.merged\.weight fill 15 of 18"):
        place(model, entries(shapes()))


def test_the_shape_of_a_part_is_that_of_its_view() -> None:
    model = build()
    state, tensors = model.state_dict(keep_vars=True), entries(shapes())
    placements, problems = place(model, tensors)
    assert not problems
    for placement in placements.values():
        parameter = state[placement.parameter]
        assert placement.part_shape(parameter.shape) == placement.part(parameter).shape
