"""The card of conv_transpose2d: conv2d's gradient to the input as an operator of its own, with a bias.

Its derivatives are conv2d (to the input) and conv2d_weight_grad, so derivatives of every order exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvfast.ops.card import Card, call, define_kernel, register
from cvfast.ops.conv2d import empty_result, expanded, fold, unfold


def output_size(size: int, kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> int:
    """Length of one spatial dimension of the output, from that of the input (torch.nn.ConvTranspose2d's formula)."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


# input [N, C, H, W], weight [C, K/groups, R, S], bias [K] -> output [N, K, P, Q]


def fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    spatial = [
        output_size(input.shape[i + 2], weight.shape[i + 2], stride[i], padding[i], output_padding[i], dilation[i])
        for i in range(2)
    ]
    return empty_result((input.shape[0], weight.shape[1] * groups, *spatial), input, weight)


def setup(ctx, inputs, output) -> None:
    input, weight, _, stride, padding, ctx.output_padding, groups, dilation = inputs
    ctx.options = (stride, padding, dilation, groups)
    ctx.save_for_backward(input, weight)


def backward(ops, ctx, needs, grad: Tensor):
    input, weight = ctx.saved_tensors
    needs_input, needs_weight, needs_bias = needs[:3]
    grad_input = grad_weight = None
    # The convolution of the output has these more pixels than the input, where output_padding spans a stride.
    more = [padding // stride for padding, stride in zip(ctx.output_padding, ctx.options[0], strict=True)]
    if needs_input:
        grad_input = call(ops.conv2d.default, grad, weight, None, *ctx.options)
        if any(more):
            grad_input = grad_input[..., : input.shape[2], : input.shape[3]]
    if needs_weight:
        if any(more):
            input = torch.nn.functional.pad(input, (0, more[1], 0, more[0]))
        grad_weight = call(ops.conv2d_weight_grad.default, input, grad, weight.shape, *ctx.options)
    return grad_input, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None, *(None,) * 5


def vmap(ops, info, in_dims, input, weight, bias, stride, padding, output_padding, groups, dilation):
    size, pads = info.batch_size, (stride, padding, output_padding)
    x_dim, w_dim, b_dim = in_dims[:3]
    if b_dim is not None:  # a bias per sample of the vmap cannot enter the fused sum of a folded batch
        dims = (x_dim, w_dim, None)
        output, dim = vmap(ops, info, dims, input, weight, None, *pads, groups, dilation)
        return output.movedim(dim, 0) + bias.movedim(b_dim, 0)[:, None, :, None, None], 0
    if w_dim is None:
        output = ops.conv_transpose2d(fold(input, x_dim, 0), weight, bias, *pads, groups, dilation)
        return unfold(output, 0, size), 0
    input, weight = fold(expanded(input, x_dim, size), 0, 1), fold(weight, w_dim, 0)
    output = unfold(ops.conv_transpose2d(input, weight, None, *pads, groups * size, dilation), 1, size)
    return (output if bias is None else output + bias[:, None, None]), 1  # [N, B, K, P, Q]


_OPTIONS = "SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, SymInt groups, SymInt[2] dilation"

# conv_transpose2d with its epilogue, without derivatives: activation(result + residual), residual as the result;
# `packed`: the weight as conv_transpose2d_pack gave it.
epilogue_kernel = define_kernel(
    "cvfast",
    "conv_transpose2d_epilogue(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str activation, "
    f"float negative_slope, {_OPTIONS}, Tensor? packed=None) -> Tensor",
)
# As conv2d's.
packed_form_kernel, pack_kernel = (
    define_kernel("cvfast", f"conv_transpose2d_{name}(Tensor input, Tensor weight, {_OPTIONS}) -> {result}")
    for name, result in (("packed_form", "int"), ("pack", "Tensor"))
)

register(
    [
        Card(
            f"conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, {_OPTIONS}) -> Tensor",
            fake, setup, backward, vmap,
        )
    ]
)  # fmt: skip
