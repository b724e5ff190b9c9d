"""conv_transpose2d by conv2d's C++ and CUDA C++ kernels: it is the gradient of a convolution to its input."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast._packed import packed
from cvfast.backends.ext.conv2d import LEAST_TO_PACK, SLOW_ON_CUDA, runs_with_epilogue, why_not
from cvfast.ops.card import call
from cvfast.ops.conv2d import result_format
from cvfast.ops.conv_transpose2d import epilogue_kernel, pack_kernel, packed_form_kernel

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
    kept = packed_weight(input, weight, *options)
    return epilogue_kernel(input, weight, bias, residual, activation, negative_slope, *options, kept)


def packed_weight(input: Tensor, weight: Tensor, *options) -> Tensor | None:
    """The weight in the form in which the kernels read it, where that is kept."""
    if weight.numel() < LEAST_TO_PACK:
        return None
    return packed(
        (input.shape, input.stride(), options),
        lambda: packed_form_kernel(input, weight, *options),
        lambda: pack_kernel(input, weight, *options),
        weight,
    )


def why_slower(input: Tensor, *args) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    return [SLOW_ON_CUDA] if input.is_cuda else []


_operator = torch.ops.cvfast.conv_transpose2d.default


def run(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> Tensor:
    """Shapes and meaning as in cvfast.functional.conv_transpose2d."""
    output = run_with_epilogue(None, "none", 0.0, "none", input, weight, bias, *options)
    return call(_operator, input, weight, bias, *options) if output is None else output
