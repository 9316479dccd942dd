import pytest
import torch

from torchinfer.kernels.reference.grouped_matmul import grouped_matmul as reference
from torchinfer.kernels.tpu.grouped_matmul import grouped_matmul as static
from torchinfer.testing import assert_close

SIZES = [[3, 0, 5, 1], [0, 0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 9], [1, 1, 1, 1], [2, 3, 0, 0]]


@pytest.mark.parametrize("port", [reference, static])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_float64_row_by_row(sizes, dtype, port):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 63, generator=generator).to(dtype)
    weight = (torch.randn(4, 17, 63, generator=generator) / 8).to(dtype)
    expected = torch.zeros(9, 17, dtype=torch.float64)
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    for row, group in enumerate(groups):
        expected[row] = weight[group].double() @ x[row].double()
    actual = port(x, weight, torch.tensor(sizes, dtype=torch.int32))
    assert actual.dtype == dtype
    assert_close(actual, expected)


def test_static_formulation_traces_without_graph_breaks():
    compiled = torch.compile(static, fullgraph=True, backend="eager")
    x, weight = torch.ones(4, 3), torch.ones(2, 5, 3)
    assert_close(compiled(x, weight, torch.tensor([1, 2], dtype=torch.int32))[:3], torch.full((3, 5), 3.0))
