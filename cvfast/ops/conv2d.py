"""The card of conv2d: three operators, each linear in both operands and differentiated with the other two.

With * for the products, o = conv2d(x, w), gx = conv2d_input_grad(g, w), gw = conv2d_weight_grad(g, x):
the derivative of each with respect to one operand is another of the three, so derivatives of every order exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from cvfast import _library
from cvfast.ops.card import Card, asked_for, call, define_kernel, register, watched

_OPTIONS = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Length of one spatial dimension of the output, from that of the input (torch.nn.Conv2d's formula)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def is_channels_last(tensor: Tensor) -> bool:
    """As torch sees it: where both formats fit (one channel, or one pixel), the strides say which is meant."""
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        return False
    if not tensor.is_contiguous():
        return True
    _, channels, height, width = tensor.shape
    return channels * height * width > 1 and tensor.stride(1) == 1 and tensor.stride(3) == channels


def result_format(first: Tensor, second: Tensor) -> torch.memory_format:
    """Memory format of a result: channels_last if one of the operands is."""
    return torch.channels_last if is_channels_last(first) or is_channels_last(second) else torch.contiguous_format


def empty_result(size: Sequence[int], first: Tensor, second: Tensor) -> Tensor:
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=result_format(first, second))


# conv2d: input [N, C, H, W], weight [K, C/groups, R, S], bias [K] -> output [N, K, P, Q]


def conv2d_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    spatial = [
        output_size(input.shape[i + 2], weight.shape[i + 2], stride[i], padding[i], dilation[i]) for i in range(2)
    ]
    size = (input.shape[0], weight.shape[0], *spatial)
    return empty_result(size, input, weight)


def conv2d_setup(ctx, inputs, output) -> None:
    input, weight, _, *ctx.options = inputs
    ctx.save_for_backward(input, weight)


def conv2d_backward(ops, ctx, needs, grad: Tensor):
    return (*_gradients(ops, grad, *ctx.saved_tensors, ctx.options, needs[:3]), *(None for _ in ctx.options))


def _gradients(ops, grad: Tensor, input: Tensor, weight: Tensor, options, needs) -> tuple[Tensor | None, ...]:
    """Of input, weight and bias, where they are needed, from that of conv2d's result."""
    needs_input, needs_weight, needs_bias = needs
    return (
        call(ops.conv2d_input_grad.default, grad, weight, input.shape, *options) if needs_input else None,
        call(ops.conv2d_weight_grad.default, grad, input, weight.shape, *options) if needs_weight else None,
        grad.sum((0, 2, 3)) if needs_bias else None,
    )


def conv2d_vmap(ops, info, in_dims, input, weight, bias, stride, padding, dilation, groups):
    options, size = (stride, padding, dilation), info.batch_size
    x_dim, w_dim, b_dim = in_dims[:3]
    if b_dim is not None:  # a bias per sample of the vmap cannot enter the fused sum of a folded batch
        output, dim = conv2d_vmap(ops, info, (x_dim, w_dim, None), input, weight, None, *options, groups)
        return output.movedim(dim, 0) + bias.movedim(b_dim, 0)[:, None, :, None, None], 0
    if w_dim is None:
        return unfold(ops.conv2d(fold(input, x_dim, 0), weight, bias, *options, groups), 0, size), 0
    input = expanded(input, x_dim, size)
    output = ops.conv2d(fold(input, 0, 1), fold(weight, w_dim, 0), None, *options, groups * size)
    output = unfold(output, 1, size)  # [N, B, K, P, Q]
    return (output if bias is None else output + bias[:, None, None]), 1


# conv2d_input_grad: grad [N, K, P, Q], weight [K, C/groups, R, S] -> [N, C, H, W] = input_size


def input_grad_fake(grad: Tensor, weight: Tensor, input_size: Sequence[int], *options) -> Tensor:
    return empty_result(input_size, grad, weight)


def input_grad_setup(ctx, inputs, output) -> None:
    grad, weight, _, *ctx.options = inputs
    ctx.save_for_backward(grad, weight)


def input_grad_backward(ops, ctx, needs, second: Tensor):
    grad, weight = ctx.saved_tensors
    needs_grad, needs_weight = needs[:2]
    return (
        call(ops.conv2d.default, second, weight, None, *ctx.options) if needs_grad else None,
        call(ops.conv2d_weight_grad.default, grad, second, weight.shape, *ctx.options) if needs_weight else None,
        None,
        *(None for _ in ctx.options),
    )


def input_grad_vmap(ops, info, in_dims, grad, weight, input_size, stride, padding, dilation, groups):
    options, size = (stride, padding, dilation), info.batch_size
    n, c, *spatial = input_size
    if in_dims[1] is None:
        result = ops.conv2d_input_grad(fold(grad, in_dims[0], 0), weight, [n * size, c, *spatial], *options, groups)
        return unfold(result, 0, size), 0
    grad, weight = fold(expanded(grad, in_dims[0], size), 0, 1), fold(weight, in_dims[1], 0)
    result = ops.conv2d_input_grad(grad, weight, [n, c * size, *spatial], *options, groups * size)
    return unfold(result, 1, size), 1


# conv2d_weight_grad: grad [N, K, P, Q], input [N, C, H, W] -> [K, C/groups, R, S] = weight_size


def weight_grad_fake(grad: Tensor, input: Tensor, weight_size: Sequence[int], *options) -> Tensor:
    return empty_result(weight_size, grad, input)


def weight_grad_setup(ctx, inputs, output) -> None:
    grad, input, _, *ctx.options = inputs
    ctx.save_for_backward(grad, input)


def weight_grad_backward(ops, ctx, needs, second: Tensor):
    grad, input = ctx.saved_tensors
    needs_grad, needs_input = needs[:2]
    return (
        call(ops.conv2d.default, input, second, None, *ctx.options) if needs_grad else None,
        call(ops.conv2d_input_grad.default, grad, second, input.shape, *ctx.options) if needs_input else None,
        None,
        *(None for _ in ctx.options),
    )


def weight_grad_vmap(ops, info, in_dims, grad, input, weight_size, stride, padding, dilation, groups):
    size = info.batch_size
    grad, input = (fold(expanded(t, dim, size), 0, 1) for t, dim in ((grad, in_dims[0]), (input, in_dims[1])))
    k, *rest = weight_size
    result = ops.conv2d_weight_grad(grad, input, [k * size, *rest], stride, padding, dilation, groups * size)
    return unfold(result, 0, size), 0


# vmap's batch dimension B becomes part of the batch (shared weights) or of the groups (a weight for each of B).


def expanded(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[B, ...] with B = size, whether `tensor` has the batch at `dim` or (None) not at all."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def fold(tensor: Tensor, dim: int, into: int) -> Tensor:
    """Merges the batch dimension `dim` into dimension `into` of the rest, as its outer part."""
    return tensor.movedim(dim, into).flatten(into, into + 1)


def unfold(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Splits dimension `dim` into (size, rest)."""
    return tensor.unflatten(dim, (size, -1))


def rows_as_pixels(input: Tensor) -> Tensor:
    """[1, I, rows, 1], channels_last, from rows [*, I]: a linear map of them is a 1x1 convolution."""
    return input.reshape(1, -1, 1, input.shape[-1]).permute(0, 3, 1, 2)


def pixels_as_rows(output: Tensor, input: Tensor) -> Tensor:
    """[*, O], contiguous, from the convolution's result for `input` [*, I]."""
    return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1).contiguous()


ONE_BY_ONE = ((1, 1), (0, 0), (1, 1), 1)  # options of that convolution


def linear(op: torch._ops.OpOverload, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[*, O] from input [*, I], weight [O, I] and bias [O] by conv2d's operator `op`."""
    if input.numel() == 0 or weight.numel() == 0:
        return torch.nn.functional.linear(input, weight, bias)
    return pixels_as_rows(call(op, rows_as_pixels(input), weight[:, :, None, None], bias, *ONE_BY_ONE), input)


# Without derivatives: the form of packed weights that a call of conv2d takes (0: none pays); a weight in that form.
packed_form_kernel, pack_kernel = (
    define_kernel("cvfast", f"{name}(Tensor input, Tensor weight, int how) -> {result}")
    for name, result in (("conv2d_packed_form", "int"), ("conv2d_pack", "Tensor"))
)


# conv2d with its epilogue, without derivatives: activation(conv2d(...) + residual), residual as the result; where there
# is no residual, that pooled. `how`: options, activation and pooling. `packed`: the weight as conv2d_pack gave it.
# `lasting`: the result is kept for a derivative, so it does not lie in the memory that calls use in turn.
epilogue_kernel = define_kernel(
    "cvfast",
    "conv2d_epilogue(Tensor input, Tensor weight, Tensor? bias, int how, Tensor? packed=None, Tensor? residual=None, "
    "float negative_slope=0.0, bool lasting=False) -> Tensor",
)

# The same with no more than these arguments, each of which costs a call 0.2 µs: `plain`, and `lasting`.
plain_kernel, lasting_kernel = (
    define_kernel("cvfast", f"conv2d_epilogue.{name}(Tensor input, Tensor weight, Tensor? bias, int how) -> Tensor")
    for name in ("plain", "lasting")
)


def _nohow(*options) -> None:
    """In place of `conv2d_how`, where no kernel is loaded."""


# (stride, padding, dilation, groups[, activation, pooling]) -> `how`, pooling being "none", "max" or "average". None
# for what is no int, pair of ints or known name, or too large for that number.
conv2d_how: Callable[..., int | None] = _library.C.conv2d_how if _library.ops.loaded else _nohow

# activation(input weight^T + bias + residual) for input [*, I] and weight [O, I], without derivatives; `how` of
# `ONE_BY_ONE`, and `packed` of the rows as pixels; `lasting` as conv2d's.
linear_kernel = define_kernel(
    "cvfast",
    "linear(Tensor input, Tensor weight, Tensor? bias, int how, Tensor? packed=None, float negative_slope=0.0, "
    "Tensor? residual=None, bool lasting=False) -> Tensor",
)


class _TrainedLinear(_SingleLevelFunction):
    """linear for autograd alone, with torch's product for the gradient to the weight: that adds up over all rows, for
    which both operands have to be copied, and torch does it faster without AVX-512."""

    @staticmethod
    def forward(ctx, input, weight, bias, how):
        ctx.how = how
        ctx.save_for_backward(input, weight)
        return linear_kernel(input, weight, bias, how, None, 0.0, None, True)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows, grad_input = grad.reshape(-1, grad.shape[-1]), None
        if needs_input:
            parts = torch.is_grad_enabled() or watched(grad)  # somebody differentiates or looks on
            grad_input = grad @ weight if parts else linear_kernel(grad, weight.t(), None, ctx.how)
        return (
            grad_input,
            rows.t() @ input.reshape(-1, input.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


trained_linear = _TrainedLinear.apply

# Activations whose result tells their derivative: (gradient of the result, result, slope) -> gradient of the argument.
_aten = torch.ops.aten
TOLD_BY_RESULT: dict[str, Callable[[Tensor, Tensor | None, float], Tensor]] = {
    "none": lambda grad, result, slope: grad,
    "relu": lambda grad, result, slope: _aten.threshold_backward(grad, result, 0),
    "relu6": lambda grad, result, slope: _aten.hardtanh_backward(grad, result, 0, 6),
    "leaky_relu": lambda grad, result, slope: _aten.leaky_relu_backward(grad, result, slope, True),  # slope >= 0
    "sigmoid": lambda grad, result, slope: _aten.sigmoid_backward(grad, result),
    "tanh": lambda grad, result, slope: _aten.tanh_backward(grad, result),
}


# Gradients of input, weight and bias, where they are needed, at once: for a backward pass that nobody differentiates.
_gradients_kernel = define_kernel(
    "cvfast",
    "conv2d_gradients(Tensor grad_output, Tensor input, Tensor weight, int how, bool needs_input, bool needs_weight, "
    "bool needs_bias) -> (Tensor?, Tensor?, Tensor?)",
)


_WORTH_ASKING = 1 << 27  # multiply-adds, more than a millisecond's


class _WithEpilogue(_SingleLevelFunction):
    """activation(conv2d(...) + residual) in one pass, for autograd alone: tracers and transforms see the parts.

    how: `conv2d_how` of options, activation and no pooling. options: ints or pairs.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, how, options, activation="none", residual=None, slope=0.0):
        if activation == "none" and residual is None:
            output = lasting_kernel(input, weight, bias, how)
        else:
            output = epilogue_kernel(input, weight, bias, how, None, residual, slope, True)
        ctx.how, ctx.options, ctx.epilogue = how, options, (activation, slope)
        ctx.save_for_backward(input, weight, None if activation == "none" else output)
        return output

    @staticmethod
    def backward(ctx, grad):
        (activation, slope), (input, weight, output) = ctx.epilogue, ctx.saved_tensors
        worth_asking = grad.numel() * weight.numel() >= _WORTH_ASKING * weight.shape[0]
        needs = asked_for(ctx) if worth_asking else ctx.needs_input_grad
        needs_input, needs_weight, needs_bias, _, _, *others = needs
        grad = TOLD_BY_RESULT[activation](grad, output, slope)
        if torch.is_grad_enabled() or watched(grad):
            options = [(o, o) if type(o) is int else o for o in ctx.options[:3]] + [ctx.options[3]]
            gradients = _gradients(
                torch.ops.cvfast, grad, input, weight, options, (needs_input, needs_weight, needs_bias)
            )
        else:
            gradients = _gradients_kernel(grad, input, weight, ctx.how, needs_input, needs_weight, needs_bias)
        if not others:
            return *gradients, None, None
        return *gradients, None, None, None, grad if others[1] else None, None


differentiable_epilogue = _WithEpilogue.apply

register(
    [
        Card(
            f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_OPTIONS}) -> Tensor",
            conv2d_fake, conv2d_setup, conv2d_backward, conv2d_vmap,
        ),
        Card(
            f"conv2d_input_grad(Tensor grad_output, Tensor weight, SymInt[4] input_size, {_OPTIONS}) -> Tensor",
            input_grad_fake, input_grad_setup, input_grad_backward, input_grad_vmap,
        ),
        Card(
            f"conv2d_weight_grad(Tensor grad_output, Tensor input, SymInt[4] weight_size, {_OPTIONS}) -> Tensor",
            weight_grad_fake, weight_grad_setup, weight_grad_backward, weight_grad_vmap,
        ),
    ]
)  # fmt: skip
