"""The kernels compile for every supported GPU, without one: no spills, within budgets, the intended instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Registers of a thread, of 65,536 for at most 2,048 threads, and bytes of shared memory of a program (128 threads).
# The variant with 64-bit offsets serves tensors beyond 4 GiB only; on other GPUs than 8.0 it may spill a few bytes.
REGISTERS = {"float32": 128, "float64": 128, "float32-wide": 168}
SHARED = {"float32": 4096, "float64": 8192, "float32-wide": 4096}

# float32 is multiplied by ordinary instructions (GPUs of 10.0 have one for two at once), not by TF32 tensor cores;
# float64 by tensor cores where there are any.
FLOAT32, FLOAT64 = {"FFMA", "FFMA2"}, {"DMMA"}
MULTIPLY = {
    80: {"float32": FLOAT32, "float32-wide": FLOAT32, "float64": FLOAT64},
    90: {"float32": FLOAT32},
    100: {"float32": FLOAT32},
    120: {"float32": FLOAT32, "float64": {"DFMA"}},
}


@pytest.mark.parametrize("capability", MULTIPLY)
def test_kernels_compile_within_budget(capability, tmp_path):
    command = [sys.executable, "-m", "tests.triton.compile_ahead", str(capability), *MULTIPLY[capability]]
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reports = json.loads(run.stdout)
    for variant, intended in MULTIPLY[capability].items():
        names = ["conv2d", "conv2d_input_grad", "conv2d_weight_grad", "conv2d_input_grad"]  # the last one with a bias
        assert [k["kernel"] for k in reports[variant]] == names
        for kernel in reports[variant]:
            assert kernel["stack"] == 0, f"{variant}: registers are spilled: {kernel}"
            assert kernel["registers"] <= REGISTERS[variant], f"{variant}: {kernel}"
            assert kernel["shared"] <= SHARED[variant], f"{variant}: {kernel}"
            used = set(kernel["opcodes"])
            assert used and used <= intended, f"{variant}: other tensor cores, atomics or precision: {kernel}"
