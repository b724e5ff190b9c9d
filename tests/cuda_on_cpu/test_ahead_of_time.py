"""csrc/cuda compiled for every supported architecture: no spilled registers, resources within the budget, and the
multiply-adds that the design counts on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_on_cpu.ahead_of_time import compile_kernels
from tests.cuda_on_cpu.simulator import CSRC

ARCHS = (75, 80, 90, 100, 120)
# Per thread and per block of 256 threads: at least one block of float64 and two of float32 fit a multiprocessor.
REGISTERS = {"f": 128, "d": 255}
SHARED_BYTES = {"f": 8 << 10, "d": 16 << 10}
PADDING_BYTES = 16 * 8  # one element a row of the left tile
MULTIPLY_ADD = {"f": {"FFMA", "FFMA2"}, "d": {"DFMA"}}


@pytest.mark.parametrize("arch", ARCHS)
def test_conv2d(arch: int, build_folder: Path):
    kernels = compile_kernels(CSRC / "cuda" / "conv2d.cu", arch, build_folder)
    assert len(kernels) == 6  # three products in float32 and float64
    for name, kernel in kernels.items():
        dtype = "d" if "IdE" in name else "f"
        assert kernel.registers <= REGISTERS[dtype], f"{name}: {kernel.registers} registers"
        assert 0 < kernel.shared_bytes <= SHARED_BYTES[dtype] + PADDING_BYTES, f"{name}: {kernel.shared_bytes} bytes"
        assert sum(kernel.opcodes[opcode] for opcode in MULTIPLY_ADD[dtype]) >= 16, f"{name}: no fused multiply-add"
        assert kernel.opcodes["BAR"] == 2, f"{name}: {kernel.opcodes['BAR']} barriers"
        assert not kernel.opcodes.keys() & {"LDL", "STL", "ATOM", "RED"}, f"{name}: local memory or atomics"


def test_a_kernel_that_spills_is_refused(tmp_path: Path, build_folder: Path):
    """Proof that the check above can fail: 300 live values in 32 registers."""
    source = tmp_path / "spills.cu"
    source.write_text("""
        extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* values) {
          float live[300];
          #pragma unroll
          for (int i = 0; i < 300; ++i) live[i] = values[i * 1024 + threadIdx.x];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 300; ++i) values[i * 1024 + threadIdx.x] = live[299 - i] * live[i];
        }""")
    with pytest.raises(RuntimeError, match="spill"):
        compile_kernels(source, 80, build_folder)
