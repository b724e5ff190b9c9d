"""conv2d as its definition says: a sum over the kernel's taps of shifted, strided images."""

from __future__ import annotations

import torch
from torch import Tensor


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """output[n, k, p, q] = bias[k] + sum over c, r, s of x[n, c, p*stride - padding + r*dilation, ...] * w[k, c, r, s].

    Arguments as torch.nn.functional.conv2d's; differentiable by torch's autograd to every order, since it is made of
    slices, products and sums.
    """
    if input.dim() == 3:
        return conv2d(input[None], weight, bias, stride, padding, dilation, groups)[0]
    (n, c, _, _), (k, _, kernel_h, kernel_w) = input.shape, weight.shape
    stride, dilation = pair(stride), pair(dilation)
    top, bottom, left, right = _sides(padding, (kernel_h, kernel_w), dilation)
    padded = torch.nn.functional.pad(input, (left, right, top, bottom))
    height = (padded.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (padded.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    padded = padded.unflatten(1, (groups, c // groups))
    weight = weight.unflatten(0, (groups, k // groups))
    output = input.new_zeros(n, groups, k // groups, height, width)
    for r in range(kernel_h):
        for s in range(kernel_w):
            y, x = r * dilation[0], s * dilation[1]
            tap = padded[
                ..., y : y + (height - 1) * stride[0] + 1 : stride[0], x : x + (width - 1) * stride[1] + 1 : stride[1]
            ]
            output = output + torch.einsum("ngchw,gkc->ngkhw", tap, weight[..., r, s])
    output = output.flatten(1, 2)
    return output if bias is None else output + bias[:, None, None]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _sides(padding, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """Zeros above, below, left and right; "same" puts the odd one below and on the right."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    height, width = pair(padding)
    return (height, height, width, width)
