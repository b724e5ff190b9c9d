"""conv2d by cvfast's C++ kernels (CPU) and CUDA C++ kernels (NVIDIA GPUs)."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast import _library
from cvfast.ops.card import autocast_dtype, call

DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.float64),
}


def why_not(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    device = input.device.type
    if device not in DTYPES:
        return [f"no kernel for device {device!r} (there are kernels for {', '.join(DTYPES)})"]
    library = _library.cuda if device == "cuda" else _library.ops
    if library.reason is not None:
        return [library.reason]
    dtype = autocast_dtype(input, device)
    if dtype not in DTYPES[device]:
        return [f"no kernel for {dtype} on {device}"]
    if input.layout is not torch.strided or weight.layout is not torch.strided:
        return ["sparse and other unusual layouts are torch's"]
    return []


def why_slower(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    if input.device.type == "cuda":
        return ["the CUDA kernel is a first, simple one and unmeasured against cuDNN"]
    return []


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Calls the operator; shapes and meaning as in cvfast.functional.conv2d."""
    return call(torch.ops.cvfast.conv2d.default, input, weight, bias, stride, padding, dilation, groups)
