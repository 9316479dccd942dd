"""The CPU library's norm on every level, and how the library is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.rms_norm import rms_norm
from torchinfer.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(shape, dtype, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def by_hand(x, weight, epsilon, offset):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 63), (5, 3, 24), (0, 8), (500, 1), (33, 500), (300, 128)])
def test_equals_float64_by_hand(level, shape, offset, dtype):
    x, weight = random(shape, dtype), random(shape[-1:], dtype, 1)
    actual = rms_norm(x, weight, 1e-6, offset)
    assert actual.dtype == dtype and actual.shape == x.shape
    assert_close(actual, by_hand(x, weight, 1e-6, offset))


def test_what_lies_around_the_rows_is_not_read(level):
    wide = torch.full((7, 90), torch.nan)
    wide[:, 10:73] = random((7, 63), torch.float32)
    weight = random((63,), torch.float32, 1)
    assert_close(rms_norm(wide[:, 10:73], weight, 1e-6, 0.0), by_hand(wide[:, 10:73], weight, 1e-6, 0.0))


def test_columns_that_are_apart_are_brought_together(level):
    x, weight = random((48, 5), torch.bfloat16).T, random((96,), torch.bfloat16, 1)[::2]
    assert_close(rms_norm(x, weight, 1e-6, 0.0), by_hand(x, weight, 1e-6, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others_or_the_threads(level, num_threads, dtype):
    x, weight = random((200, 500), dtype), random((500,), dtype, 1)
    together = rms_norm(x, weight, 1e-6, 0.0)
    assert torch.equal(together, torch.cat([rms_norm(row[None], weight, 1e-6, 0.0) for row in x]))


def test_not_a_number_stays_in_its_row(level):
    x, weight = random((3, 63), torch.bfloat16), random((63,), torch.bfloat16, 1)
    x[1, 62] = torch.nan
    assert rms_norm(x, weight, 1e-6, 0.0).isnan().any(1).tolist() == [False, True, False]


def test_a_weight_of_another_length_is_refused(level):
    with pytest.raises(ValueError, match=r"\[3, 8\].*\[7\]"):
        rms_norm(torch.ones(3, 8), torch.ones(7), 1e-6, 0.0)


def test_misaligned_memory_is_refused(level):
    odd = torch.zeros(41, dtype=torch.uint8)[1:].numpy().view("float32")
    with pytest.raises(ValueError, match="not aligned"):
        rms_norm(torch.from_numpy(odd).view(1, 10), torch.ones(10), 1e-6, 0.0)


def test_several_python_threads_may_call_at_once(num_threads):
    x, weight = random((64, 2048), torch.float32), random((2048,), torch.float32, 1)
    expected, results = rms_norm(x, weight, 1e-6, 0.0), {}

    def call(index):
        for _ in range(50):
            results[index] = torch.equal(rms_norm(x, weight, 1e-6, 0.0), expected)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def run(code, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


NORM = "import torch; from torchinfer import kernels; kernels.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)"


def test_the_environment_names_the_level():
    code = f"import logging; logging.basicConfig(level='INFO'); {NORM}"
    assert "CPU kernels: portable" in run(code, TORCHINFER_CPU_ISA="portable").stderr


def test_a_level_that_is_not_there_is_refused_with_those_that_are():
    result = run(NORM, TORCHINFER_CPU_ISA="avx1024")
    assert result.returncode == 1
    assert "ConfigError: TORCHINFER_CPU_ISA='avx1024', but this machine has" in result.stderr


def test_without_the_library_the_reference_computes_and_one_line_says_so():
    code = f"""
import logging; logging.basicConfig(level="WARNING")
from pathlib import Path
from torchinfer.kernels.cpu import library
library.PATH = Path("/nowhere/libtorchinfer_cpu.so")
{NORM}
{NORM}"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("PyTorch computes instead") == 1


def test_a_forked_process_has_threads_of_its_own():
    code = f"""
import os
{NORM}
child = os.fork()
{NORM}
x = torch.ones(4096, 64)
assert torch.allclose(kernels.rms_norm(x, torch.ones(64), 1e-6), x)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_as_many_threads_as_cpus(level):
    assert library.loaded().torchinfer_cpu_num_threads() <= len(os.sched_getaffinity(0))
