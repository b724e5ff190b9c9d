"""linear by Triton kernels: a 1x1 convolution of one image whose pixels are the rows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cvfast.backends.triton import conv2d
from cvfast.ops.conv2d import ONE_BY_ONE, linear, rows_as_pixels


def why_not(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Reasons why Triton's kernels cannot run this call."""
    if input.dim() == 0 or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        return ["a weight without rows, or a bias for all outputs, is torch's"]
    if input.is_nested:
        return ["nested tensors are torch's"]
    if input.numel() == 0 or weight.numel() == 0:
        return []
    return conv2d.why_not(rows_as_pixels(input), weight[:, :, None, None], bias, *ONE_BY_ONE)


def why_slower(*args) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    return ["torch's product is cuBLAS's"]


run = partial(linear, torch.ops.cvfast_triton.conv2d.default)
