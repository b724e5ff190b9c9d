"""conv_transpose2d by conv2d's C++ and CUDA C++ kernels: it is the gradient of a convolution to its input."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast.backends.ext.conv2d import why_not, why_slower
from cvfast.ops.card import call

__all__ = ["run", "why_not", "why_slower"]


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    groups: int,
    dilation: tuple[int, int],
) -> Tensor:
    """Calls the operator; shapes and meaning as in cvfast.functional.conv_transpose2d."""
    return call(
        torch.ops.cvfast.conv_transpose2d.default,
        input, weight, bias, stride, padding, output_padding, groups, dilation,
    )  # fmt: skip
