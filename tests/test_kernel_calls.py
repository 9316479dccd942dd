"""Which Pallas kernels a compiled program calls, read from HLO; and their bundles, by the TPU's compiler."""

from __future__ import annotations

import pytest

from torchinfer import aot
from torchinfer.kernel_calls import KernelGrid, as_program, compile_kernels, kernel_calls, kernel_grid

HLO = """HloModule graph, is_scheduled=true

ENTRY %main (a: bf16[64,4096]) -> f32[64,128] {
  %a = bf16[64,4096]{1,0:T(8,128)(2,1)} parameter(0)
  CALLS
  %other = f32[8]{0:T(256)} custom-call(%a), custom_call_target="ConcatBitcast", operand_layout_constraints={}
}
"""
COST = '"cost_estimate":{"flops":"20","transcendentals":"0","bytes_accessed":"777"},'


def call(name: str, operand: str = "bf16[64,4096]", cost: str = COST, offset: int = 0, used: int = 1) -> str:
    return (
        f"%{name} = (s8[1,2,64,4096]{{3,2,1,0:T(8,128)(4,1)S(1)}}, s32[9,8,128]{{2,1,0:T(8,128)}}) custom-call(%a, "
        f'/*index=1*/%p), custom_call_target="tpu_custom_call", operand_layout_constraints={{{operand}{{1,0}}, '
        "s32[9,8,128]{2,1,0}}, output_to_operand_aliasing={{1}: (1, {})}, metadata={source_line=405}, backend_config="
        f'{{"flag_configs":[],"scoped_memory_configs":[{{"memory_space":"1","offset":"{offset}","size":"64"}}],'
        f'"custom_call_config":{{"body":"TUzv",{cost}"needs_layout_passes":true}},'
        f'"used_scoped_memory_configs":[{{"size":"{used}"}}]}}'
    )


def test_calls_with_the_same_kernel_and_types_are_one():
    """Wherever the compiler puts their memory; other types or another kernel are another."""
    lines = [call("k.1"), call("k.2", "bf16[8,4096]"), call("k.3", offset=65536, used=2), call("k.4", cost="")]
    first, narrow, plain = kernel_calls(HLO.replace("CALLS", "\n  ".join(lines)))
    assert [first.count, narrow.count, plain.count] == [2, 1, 1]
    assert first.operands == ("bf16[64,4096]", "s32[9,8,128]")
    assert first.results == ("s8[1,2,64,4096]", "s32[9,8,128]")
    assert first.aliases == ((1, 1),)
    assert first.stated == {"flops": 20, "transcendentals": 0, "bytes_accessed": 777}
    assert narrow.operands[0] == "bf16[8,4096]"
    assert plain.stated == {}


def test_a_program_without_kernels_has_no_calls():
    assert kernel_calls(HLO.replace("CALLS", "")) == []


def test_a_program_of_kernels_has_the_arguments_of_one_behind_those_of_the_other():
    calls = kernel_calls(HLO.replace("CALLS", f"{call('k.1')}\n  {call('k.2', 'f8e4m3fn[8,4096]')}"))
    text = as_program(calls)
    assert "%arg1: tensor<9x8x128xi32>, %arg2: tensor<8x4096xf8E4M3FN>, %arg3: tensor<9x8x128xi32>)" in text
    assert "%1:2 = stablehlo.custom_call @tpu_custom_call(%arg2, %arg3) {backend_config = " in text
    assert text.count("output_tuple_indices = [1], operand_index = 1") == 2
    assert "return %0#0, %0#1, %1#0, %1#1 : tensor<1x2x64x4096xi8>, tensor<9x8x128xi32>" in text


@pytest.mark.parametrize(
    ("sizes", "is_parallel", "steps"),
    [
        ((4, 3), (True, False), [12, 6]),
        ((1, 3), (True, False), [3, 3]),  # one core has it all
        ((5, 2), (False, True), [10, 5]),
        ((5, 2), (True, True), [10, 6]),  # the first is shared
        ((3,), (False,), [3, 3]),
        ((), (), [1, 1]),
    ],
)
def test_cores_share_a_parallel_dimension_of_the_grid(sizes, is_parallel, steps):
    assert [KernelGrid("k", sizes, is_parallel).num_steps(cores) for cores in (1, 2)] == steps


@pytest.mark.libtpu
def test_kernels_of_a_program_have_the_bundles_that_they_have_in_it():
    jax = pytest.importorskip("jax")
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    @jax.jit  # traced once for a shape: where it is called from would be in the kernel
    def double(x):
        def kernel(x, out):
            out[...] = x[...] + x[...]

        return pl.pallas_call(
            kernel,
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(x.shape[0] // 64,),
            in_specs=[pl.BlockSpec((64, 128), lambda step: (step, 0))],
            out_specs=pl.BlockSpec((64, 128), lambda step: (step, 0)),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=1234, transcendentals=0),
            name="double",
        )(x)

    def program(x, y):
        return double(double(x)), double(y)

    shapes = [jax.ShapeDtypeStruct((rows, 128), "float32") for rows in (256, 512)]
    compiled = aot.compile_jax(program, shapes, "v5e:1x1", dump_bundles=True)
    calls = kernel_calls(compiled.hlo)
    assert sorted((call.operands, call.count) for call in calls) == [(("f32[256,128]",), 2), (("f32[512,128]",), 1)]
    assert {kernel_grid(call).name for call in calls} == {"double"}
    assert {kernel_grid(call).num_steps(1) for call in calls} == {4, 8}
    assert all(call.stated["bytes_accessed"] == 1234 for call in calls)
    whole = {kernel.num_bundles for name, kernel in compiled.kernels.items() if name.startswith("double")}
    alone = compile_kernels(calls, "v5e:1x1")
    assert all(kernel.grid_loop is not None for kernel in alone)
    assert {kernel.num_bundles for kernel in alone} <= whole
