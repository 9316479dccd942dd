"""The TPU compiler without a TPU: what it says of small programs, and what bad input gets."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from torchinfer import ConfigError, DeviceError, aot

pytestmark = pytest.mark.libtpu

MODULE = """
module @graph attributes {mhlo.cross_program_prefetches = [], mhlo.is_dynamic = false} {
  func.func @main(%arg0: tensor<32x512xbf16>, %arg1: tensor<512x256xi8>) -> tensor<32x256xbf16> {
    %0 = stablehlo.convert %arg1 : (tensor<512x256xi8>) -> tensor<512x256xbf16>
    %1 = stablehlo.dot_general %arg0, %0, contracting_dims = [1] x [0]
        : (tensor<32x512xbf16>, tensor<512x256xbf16>) -> tensor<32x256xbf16>
    return %1 : tensor<32x256xbf16>
  }
}
"""
IN_PLACE = """
module @graph {
  func.func @main(%arg0: tensor<1024xf32>, %arg1: tensor<1024xf32>) -> tensor<1024xf32> {
    %0 = stablehlo.add %arg0, %arg1 : tensor<1024xf32>
    return %0 : tensor<1024xf32>
  }
}
"""
SHARDED = """
module @graph {
  func.func @main(%arg0: tensor<32x512xf32> {mhlo.sharding = "{devices=[1,4]<=[4]}"},
      %arg1: tensor<512x256xf32> {mhlo.sharding = "{devices=[4,1]<=[4]}"}) -> tensor<32x256xf32> {
    %0 = stablehlo.dot_general %arg0, %arg1, contracting_dims = [1] x [0]
        : (tensor<32x512xf32>, tensor<512x256xf32>) -> tensor<32x256xf32>
    return %0 : tensor<32x256xf32>
  }
}
"""
# What a kernel's dump looks like, cut: two loops in one, then one alone; empty bundles have no sign.
BUNDLES = """
LB: loop body

     0   :  { %s0 = smov 0 }
   0x1 LB: > { %s1 = smov 0 }
   0x2   : > { %s2 = smov 0 }
   0x3 LB: >> { %s3 = smov 0 /* text: with a colon
hlo: f.1 */ }
   0x4   : > { %s3 = smov 0 }
   0x5   : >> { %s4 = smov 0 }
   0x6 LB: >> { %s5 = smov 0 }
   0x7   : > { %s6 = smov 0 }
   0x8   :  { %s6 = smov 0 }
   0x9 LB: > { %s6 = smov 0 }
   0xa PF: > { %s6 = smov 0 }
   0xb   :  {}
"""


def test_hlo_has_the_bytes_and_flops_of_the_arithmetic():
    compiled = aot.compile_hlo(MODULE, "v5e:1x1")
    assert compiled.argument_bytes == 2 * 32 * 512 + 512 * 256
    assert compiled.output_bytes == 2 * 32 * 256
    assert compiled.flops == pytest.approx(2 * 32 * 512 * 256, rel=0.02)
    parts = compiled.argument_bytes + compiled.output_bytes
    assert compiled.temporary_bytes == 0 and compiled.live_bytes >= parts
    assert compiled.peak_bytes == parts + compiled.code_bytes
    assert compiled.bytes_accessed >= compiled.argument_bytes + compiled.output_bytes
    assert compiled.kernels == {} and "HloModule graph" in compiled.hlo


def test_an_argument_that_is_donated_shares_its_memory_with_the_output():
    assert aot.compile_hlo(IN_PLACE, "v5e:1x1").alias_bytes == 0
    assert aot.compile_hlo(IN_PLACE, "v5e:1x1", donate=(1,)).alias_bytes == 4096


def test_shardings_split_the_arguments_and_add_a_collective():
    compiled = aot.compile_hlo(SHARDED, "v5p:2x2x1", num_devices=4)
    assert compiled.argument_bytes == 4 * (32 * 512 + 512 * 256) // 4
    assert "all-reduce" in compiled.hlo or "reduce-scatter" in compiled.hlo


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_a_pallas_kernel_has_bundles_and_its_loop(topology):
    jax = pytest.importorskip("jax")
    from jax.experimental import pallas as pl

    def kernel(x, output):
        def add(index, total):
            return total + x[pl.ds(index * 8, 8)]

        output[...] = jax.lax.fori_loop(0, 100, add, x[pl.ds(0, 8)])

    def add_rows(x):
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct((8, 128), "float32"), name="add_rows")(x)

    compiled = aot.compile_jax(add_rows, (jax.ShapeDtypeStruct((800, 128), "float32"),), topology, dump_bundles=True)
    (loops,) = (found.innermost for name, found in compiled.kernels.items() if name.startswith("add_rows"))
    assert [2 <= loop.num_bundles <= 12 for loop in loops] == [True]


def test_loops_are_read_from_a_dump(tmp_path: Path):
    (tmp_path / "17-f.1-70-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "17-f.1-69-schedule-analysis_final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "17-TLP-70-final_bundles.txt").write_text(BUNDLES)
    loops = (aot.Loop(1, 7), aot.Loop(3, 3), aot.Loop(6, 1), aot.Loop(9, 2))
    assert aot.kernel_bundles(tmp_path) == {"f.1": aot.Kernel(12, loops)}
    assert aot.Kernel(12, loops).innermost == loops[1:]
    assert aot.Kernel(12, loops).inside(None) == (loops[0], loops[3])
    assert aot.Kernel(12, loops).inside(loops[0]) == loops[1:3]
    assert aot.Kernel(12, loops).grid_loop == loops[0]
    assert [aot.Kernel(12, loops).run(steps) for steps in (1, 3)] == [12, 12 + 2 * 7]
    assert aot.Kernel(12).run(3) == 12
    with_inner = (aot.Loop(2, 7), aot.Loop(4, 3))
    assert aot.Kernel(12, with_inner).run(5, 2) == 12 + 4 * (7 - 3) + 3


def test_a_core_has_its_share_of_the_chips_bandwidth():
    assert aot.CHIPS["v5e"].hbm_cycles(819e6) == pytest.approx(1.5e6)
    assert aot.CHIPS["v5p"].hbm_cycles(2765e6) == pytest.approx(3.5e6)


def test_an_unknown_topology_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'v5e:9x9'; known are v5e:1x1, v5e:2x2.*v5p:2x2x1"):
        aot.compile_hlo(MODULE, "v5e:9x9")


@pytest.mark.parametrize("num_devices", [0, 5])
def test_more_devices_than_chips_are_refused(num_devices):
    with pytest.raises(ConfigError, match=f"^{num_devices} devices .* v5e:2x2 has 1 to 4"):
        aot.compile_hlo(MODULE, "v5e:2x2", num_devices=num_devices)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ConfigError, match="Unable to parse"):
        aot.compile_hlo("module @graph {", "v5e:1x1")


def test_a_program_that_does_not_fit_says_so():
    text = MODULE.replace("32x512", "32x65536").replace("512x256", "65536x262144").replace("32x256", "32x262144")
    with pytest.raises(ConfigError, match="Ran out of memory"):
        aot.compile_hlo(text, "v5e:1x1")


def test_a_compiler_that_does_not_end_is_stopped():
    with pytest.raises(DeviceError, match=r"did not end in 0\.01 s; allow more$"):
        aot.compile_hlo(MODULE, "v5e:1x1", timeout_seconds=0.01)


def test_libtpu_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.99")
    with pytest.raises(DeviceError, match=r"libtpu is 0\.0\.99.*pip install libtpu==0\.0\.21"):
        aot.compile_hlo(MODULE, "v5e:1x1")


def test_a_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"libtpu.* is not installed; pip install"):
        aot.compile_hlo(MODULE, "v5e:1x1")
