"""conv_transpose2d by conv2d's Triton kernels: it is the gradient of a convolution to its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvfast.backends.triton.conv2d import implement, launch_input_grad, why_not, why_slower
from cvfast.ops import conv_transpose2d as card

__all__ = ["forward", "run", "why_not", "why_slower"]


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
    return torch.ops.cvfast_triton.conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """torch.ops.cvfast_triton.conv_transpose2d: output [N, K, P, Q]."""
    output = card.fake(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return launch_input_grad(input, weight, bias, output, stride, padding, dilation, groups)


implement("conv_transpose2d", forward)
