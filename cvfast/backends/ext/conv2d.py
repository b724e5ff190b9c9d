"""conv2d by cvfast's C++ kernels (CPU) and CUDA C++ kernels (NVIDIA GPUs)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from cvfast import _library
from cvfast.ops.card import autocast_dtype, call, derives, watched
from cvfast.ops.conv2d import epilogue_kernel, result_format

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # all that autocast knows
CUDA_DTYPES = (torch.float32, torch.float64)


def why_not(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    if input.is_cpu:
        library, dtype, dtypes = _library.ops, input.dtype, CPU_DTYPES
    elif input.is_cuda:
        library, dtype, dtypes = _library.cuda, autocast_dtype(input, "cuda"), CUDA_DTYPES
    else:
        return [f"no kernel for device {input.device.type!r} (there are kernels for cpu, cuda)"]
    if library.reason is not None:
        return [library.reason]
    if dtype not in dtypes:
        return [f"no kernel for {dtype} on {input.device.type}"]
    if input.layout is not torch.strided or weight.layout is not torch.strided:
        return ["sparse and other unusual layouts are torch's"]
    return []


def why_slower(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    if input.is_cuda:
        return ["the CUDA kernel is a first, simple one: on an H100 cuDNN is up to 90 times as fast"]
    return []


IN_KERNEL = ("none", "relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh")  # activations


def run_with_epilogue(
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    pooling: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *options,
) -> Tensor | None:
    """activation(conv2d(...) + residual) in one pass; None where derivatives or tracers have to see the parts.

    `pooling` must be "none" where a residual is given.

    bfloat16 and float16 would be rounded twice, so those are left to separate calls, too.
    """
    tensors = [t for t in (input, weight, bias, residual) if t is not None]
    if (
        activation not in IN_KERNEL
        or not all(t.is_cpu and t.dtype is input.dtype for t in tensors)
        or input.dtype not in (torch.float32, torch.float64)
        or watched(input)
        or derives(tensors)
    ):
        return None
    if residual is not None:
        residual = residual.contiguous(memory_format=result_format(input, weight))
    return epilogue_kernel(input, weight, bias, residual, activation, negative_slope, pooling, *options)


def prepare(
    activation: str, negative_slope: float, pooling: str, weight: Tensor, bias: Tensor | None, *options
) -> Callable[[Tensor, Tensor | None], Tensor | None] | None:
    """`run_with_epilogue` for one weight and many inputs, its checks made once; None where it may not be taken.

    The call (input, residual) returns None for what has to go through the checks of every call.
    """
    tensors = [t for t in (weight, bias) if t is not None]
    if (
        activation not in IN_KERNEL
        or weight.dtype not in (torch.float32, torch.float64)
        or not all(type(t) in (Tensor, Parameter) and t.is_cpu and t.dtype is weight.dtype for t in tensors)
        or why_not(weight, weight, bias, *options)
    ):
        return None
    kernel, dtype = epilogue_kernel, weight.dtype

    def prepared(input: Tensor, residual: Tensor | None) -> Tensor | None:
        if type(input) is not Tensor or input.dtype is not dtype or torch.is_grad_enabled() or watched(input):
            return None
        if forward_ad._current_level >= 0 or not (residual is None or type(residual) is Tensor):
            return None
        try:
            return kernel(input, weight, bias, residual, activation, negative_slope, pooling, *options)
        except RuntimeError:  # what does not fit: other calls convert it, or find better words
            return None

    return prepared


def run(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> Tensor:
    """Shapes and meaning as in cvfast.functional.conv2d."""
    # A small result lies in malloc's memory either way, and the plain operator is called faster.
    brief = input.numel() > 4096 and type(input) is Tensor and type(weight) in (Tensor, Parameter) and input.is_cpu
    if brief and not watched(input) and not derives((input, weight, bias)):
        return epilogue_kernel(input, weight, bias, None, "none", 0.0, "none", *options)
    return call(torch.ops.cvfast.conv2d.default, input, weight, bias, *options)
