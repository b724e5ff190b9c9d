"""conv_transpose2d as its definition says: every input pixel adds its kernel to the output."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast.reference.conv2d import pair


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """output[n, k, p*stride - padding + r*dilation, ...] += x[n, c, p, q] * w[c, k, r, s]; and bias[k].

    Arguments as torch.nn.functional.conv_transpose2d's; differentiable by torch's autograd.
    """
    if input.dim() == 3:
        return conv_transpose2d(input[None], weight, bias, stride, padding, output_padding, groups, dilation)[0]
    (n, c, height, width), (_, k, kernel_h, kernel_w) = input.shape, weight.shape
    stride, padding, output_padding, dilation = map(pair, (stride, padding, output_padding, dilation))
    input = input.unflatten(1, (groups, c // groups))
    weight = weight.unflatten(0, (groups, c // groups))
    reach = [(size - 1) * step + 1 for size, step in zip((height, width), stride, strict=True)]
    full = [reach[i] + dilation[i] * (kernel - 1) + output_padding[i] for i, kernel in enumerate((kernel_h, kernel_w))]
    output = input.new_zeros(n, groups, k, *full)
    for r in range(kernel_h):
        for s in range(kernel_w):
            y, x = r * dilation[0], s * dilation[1]
            tap = torch.einsum("ngchw,gck->ngkhw", input, weight[..., r, s])
            output[..., y : y + reach[0] : stride[0], x : x + reach[1] : stride[1]] += tap
    output = output[..., padding[0] : full[0] - padding[0], padding[1] : full[1] - padding[1]].flatten(1, 2)
    return output if bias is None else output + bias[:, None, None]
