"""conv_transpose2d by conv2d's C++ and CUDA C++ kernels: it is the gradient of a convolution to its input."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cvfast.backends.ext.conv2d import SLOW_ON_CUDA, runs_with_epilogue, why_not
from cvfast.ops.card import call
from cvfast.ops.conv2d import result_format
from cvfast.ops.conv_transpose2d import epilogue_kernel

__all__ = ["run", "run_with_epilogue", "why_not", "why_slower"]


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
    """activation(conv_transpose2d(...) + residual) in one pass, as conv2d's; `pooling` is "none"."""
    if not runs_with_epilogue(input, weight, bias, residual):
        return None
    if residual is not None:
        residual = residual.contiguous(memory_format=result_format(input, weight))
    return epilogue_kernel(input, weight, bias, residual, activation, negative_slope, *options)


def why_slower(input: Tensor, *args) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    return [SLOW_ON_CUDA] if input.is_cuda else []


run = partial(call, torch.ops.cvfast.conv_transpose2d.default)  # arguments as in cvfast.functional.conv_transpose2d
