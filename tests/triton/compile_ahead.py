"""Compiles conv2d's Triton kernels for a GPU that need not be there and prints what came out, as JSON.

    python -m tests.triton.compile_ahead CAPABILITY VARIANT...

CAPABILITY: 80 for compute capability 8.0. VARIANT: a dtype, with "-wide" behind it for 64-bit offsets.

The launchers run as they are, on CPU tensors; only the step from Triton's launch to the driver is cut off. So the
kernels are compiled for the very signature, specialisation and options that a launch has.
This is a process of its own because Triton decides when it is imported whether it compiles or interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cvfast.backends.triton import conv2d, conv_transpose2d


class Target:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_launches(capability: int, function, *args) -> list:
    """The kernels that `function(*args)` would launch on a GPU of that compute capability."""
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernels.append(run(self, *args, warmup=True, **kwargs))

    driver.set_active(Target(capability))
    with patch.object(JITFunction, "run", compile_only):
        function(*args)
    return kernels


def report(kernel) -> dict:
    """Resources and opcodes of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "kernel": kernel.name,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "opcodes": Counter(re.findall(r"\b(DMMA|HMMA|QGMMA|HGMMA|FFMA2?|DFMA|ATOMG?|REDG?)\b", kernel.asm["sass"])),
    }


def variant_report(capability: int, variant: str) -> list[dict]:
    """What forward, input gradient, weight gradient and transposed convolution compile to."""
    dtype, _, wide = variant.partition("-")
    dtype = getattr(torch, dtype)
    stride, padding, dilation, groups = options = ((2, 2), (3, 2), (2, 2), 2)
    input, weight = torch.empty(3, 10, 18, 21, dtype=dtype), torch.empty(14, 5, 3, 5, dtype=dtype)
    bias = torch.empty(10, dtype=dtype)
    output = torch.nn.functional.conv2d(input, weight, None, *options)
    calls = (
        (conv2d.forward, input, weight, torch.empty(14, dtype=dtype), *options),
        (conv2d.input_grad, output, weight, input.shape, *options),
        (conv2d.weight_grad, output, input, weight.shape, *options),
        (conv_transpose2d.forward, output, weight, bias, stride, padding, (1, 0), groups, dilation),
    )
    with patch.object(conv2d, "OFFSETS_32", 0 if wide else conv2d.OFFSETS_32):
        return [report(kernel) for call in calls for kernel in compiled_launches(capability, *call)]


if __name__ == "__main__":
    print(json.dumps({variant: variant_report(int(sys.argv[1]), variant) for variant in sys.argv[2:]}))
