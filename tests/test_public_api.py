"""`import torchinfer` gives the listed names, and needs nothing but torch."""

import subprocess
import sys

import pytest

import torchinfer
from torchinfer import errors

OPTIONAL = ("gcsfs", "google", "grpc", "grpc_health", "jax", "torch_xla", "torchax", "transformers", "triton")
IMPORT_WITHOUT = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import torchinfer
import torchinfer.startup, torchinfer.cli, torchinfer.kernels
for device in {devices}:
    torchinfer.kernels.load_ports(device)
print("imported")
"""
IMPORTED = """
import sys
import torch
before = set(sys.modules)
import torchinfer
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def run(program: str) -> str:
    """What a fresh interpreter prints, from outside the repository."""
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd="/").stdout


def test_all_is_sorted_as_ruff_sorts_it_and_holds_no_name_twice():
    names = torchinfer.__all__
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda name: (not name.isupper(), name.startswith("_"), name))


@pytest.mark.parametrize("name", torchinfer.__all__)
def test_every_listed_name_is_there(name: str):
    assert hasattr(torchinfer, name)


def test_every_error_is_public():
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert kinds <= set(torchinfer.__all__)


def test_the_library_is_imported_where_only_torch_is_installed():
    program = IMPORT_WITHOUT.format(blocked=set(OPTIONAL), devices=("cpu", "cuda"))
    assert run(program) == "imported\n"


def test_the_blocker_of_the_test_above_blocks():
    program = IMPORT_WITHOUT.format(blocked={"torch"}, devices=())
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(program)
    assert "torch is blocked" in error.value.stderr


def test_import_does_not_pull_in_what_it_can_do_without():
    assert not set(run(IMPORTED).split()) & set(OPTIONAL)


def test_top_level_folders_are_not_importable():
    program = "from importlib.util import find_spec\nprint(find_spec('kernels'), find_spec('serving'))"
    assert run(program) == "None None\n"
