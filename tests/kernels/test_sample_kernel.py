"""The TPU's sampler in Pallas' TPU interpreter against its definition, and in a compiled graph.

XLA:CPU draws with the reference, in test_xla_runner.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from torchinfer import aot, kernels
from torchinfer.batch import SamplingTensors
from torchinfer.device import resolve_device
from torchinfer.kernels.reference.sample import filter_threshold

jax = pytest.importorskip("jax")
from jax import numpy as jnp  # noqa: E402
from jax._src.pallas.mosaic import interpret  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from torchinfer.kernels.tpu import sample_op  # noqa: E402
from torchinfer.kernels.tpu.sample_kernel import CHUNK, CHUNKS_AT_ONCE, MAX_VOCABULARY, sample_tokens  # noqa: E402

STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
)
ROUNDING = 1e-5  # of the cumulative distribution, in which sums of another order differ


def draw(logits: torch.Tensor, p: SamplingTensors) -> torch.Tensor:
    columns = torch.stack((p.temperature, p.top_k.float(), p.top_p, p.min_p, p.uniform), 1)
    function = jax.jit(sample_tokens, static_argnames="interpret")
    ids = np.asarray(function(jnp.asarray(logits.numpy()), jnp.asarray(columns.numpy()), interpret=STRICT))
    assert interpret.races is not None and not interpret.races.races_found
    return torch.from_numpy(ids.copy())


def mixed(rows: int) -> SamplingTensors:
    """Rows with one filter, with some, with none, and greedy ones."""
    kinds = torch.arange(rows) % 6
    return SamplingTensors(
        temperature=torch.where(kinds == 5, 0.0, torch.rand(rows) + 0.5),
        top_k=torch.where((kinds == 1) | (kinds == 4), torch.randint(1, 40, (rows,)), 0).int(),
        top_p=torch.where((kinds == 2) | (kinds == 4), torch.rand(rows), 1.0),
        min_p=torch.where((kinds == 3) | (kinds == 4), torch.rand(rows) * 0.3, 0.0),
        uniform=torch.rand(rows),
    )


def assert_drawn(ids: torch.Tensor, logits: torch.Tensor, p: SamplingTensors) -> None:
    """Each id is the one whose part of the cumulative distribution, in float64, has the row's number."""
    is_greedy = p.temperature == 0
    assert (ids[is_greedy] == logits.argmax(-1).int()[is_greedy]).all()
    scaled = logits / torch.where(is_greedy, 1.0, p.temperature)[:, None]
    kept = scaled >= filter_threshold(scaled, p)[:, None]
    cumulative = scaled.double().masked_fill(~kept, -torch.inf).softmax(-1).cumsum(-1)
    index = ids.long()[:, None]
    assert kept.gather(1, index)[~is_greedy].all()
    after = cumulative.gather(1, index)[:, 0]
    before = torch.where(index[:, 0] > 0, cumulative.gather(1, (index - 1).clamp(min=0))[:, 0], 0.0)
    inside = (before <= p.uniform + ROUNDING) & (p.uniform <= after + ROUNDING)
    assert inside[~is_greedy].all()


def test_draws_what_the_definition_says() -> None:
    logits, p = torch.randn(13, 2100) * 2, mixed(13)  # rows and columns behind the last whole block
    assert_drawn(draw(logits, p), logits, p)


def test_a_vocabulary_of_several_rounds_of_chunks_and_a_rest() -> None:
    size = 5 * CHUNK + 60
    assert size // CHUNK > CHUNKS_AT_ONCE
    logits, p = torch.randn(8, size) * 2, mixed(8)
    p.uniform[0] = 1 - 2**-12  # behind the last whole chunk
    assert_drawn(draw(logits, p), logits, p)


def test_rows_at_the_edges() -> None:
    logits = torch.randn(7, 300)
    logits[0] = -torch.inf
    logits[0, 299] = 1.0  # one token
    logits[1] = 0.0  # all equal: ties are kept
    logits[2, 40] = torch.inf
    logits[3, 50] = torch.nan
    logits[4, :] = logits[4].abs() + 1e-3
    logits[4, 9] = -0.0
    p = SamplingTensors(
        temperature=torch.ones(7),
        top_k=torch.tensor([0, 1, 0, 5, 300, 2, 0], dtype=torch.int32),
        top_p=torch.tensor([0.9, 1.0, 0.9, 1.0, 1.0, 1e-6, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
        uniform=torch.tensor([1 - 2**-24, 0.5, 0.5, 0.5, 0.0, 0.9, 0.9]),
    )
    ids = draw(logits, p)
    assert ids[:5].tolist() == [299, 150, 40, 50, 0]
    assert ids[5:].tolist() == logits[5:].argmax(-1).tolist()


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"{MAX_VOCABULARY + 1} does not fit .* holds {MAX_VOCABULARY}"):
        sample_tokens(jnp.zeros((1, MAX_VOCABULARY + 1)), jnp.zeros((1, 5)))


@pytest.mark.xla
@pytest.mark.libtpu
def test_a_graph_with_the_kernel_compiles_for_a_tpu_and_reads_the_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_xla")
    import torch_xla.core.xla_builder as xla_builder
    import torch_xla.core.xla_model as xla_model

    from torchinfer.hbm_traffic import hbm_bytes

    resolve_device("xla")
    monkeypatch.setitem(kernels.load_ports("xla"), "sample", sample_op.sample)

    def placeholder(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return xla_builder.create_placeholder_tensor(shape, dtype)

    rows, columns = 16, 128256
    named = [placeholder(rows, dtype=torch.int32 if at == 1 else torch.float32) for at in range(5)]
    ids = kernels.sample(placeholder(rows, columns), SamplingTensors(*named), any_filter=True)
    compiled = aot.compile_hlo(xla_model.get_stablehlo([ids]), "v5p:1x1x1")
    assert compiled.hlo.count('custom_call_target="tpu_custom_call"') == 1
    assert "sort(" not in compiled.hlo
    assert hbm_bytes(compiled.hlo) < 1.01 * rows * columns * 4
