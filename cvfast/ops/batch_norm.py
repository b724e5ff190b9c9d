"""batch_norm: normalisation by the batch's own statistics and what follows it, in one pass over the images.

pooling(activation(norm(input) + residual)), the activation being y > 0 ? y : slope * y with a slope from 0 (relu) to 1
(none), pooling the maximum of 2x2 pixels. Images float32 [N, C, H, W], all dense and in one memory format; pooled with
even sizes and no residual. Two operators of the compiled libraries alone, and a derivative for autograd: tracers and
transforms see torch's operators.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional as F

from cvfast.ops.card import define_kernel

# statistics [3, C]: mean, 1 / sqrt(variance + eps), variance of a sample (over N H W - 1)
_forward = define_kernel(
    "cvfast",
    "batch_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float negative_slope, "
    "bool pooled) -> (Tensor output, Tensor statistics)",
)
# output: where there was a residual before an activation. Gradients of input, residual ([0] where there was none),
# weight and bias.
_backward = define_kernel(
    "cvfast",
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? output, "
    "Tensor statistics, float negative_slope, bool pooled) -> (Tensor, Tensor, Tensor, Tensor)",
)


def composed(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float,
    pooled: bool,
) -> Tensor:  # fmt: skip
    """The operator's output by torch's operators."""
    output = F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
    output = output if residual is None else output + residual
    if slope != 1:
        output = F.leaky_relu(output, slope) if slope else F.relu(output)
    return F.max_pool2d(output, 2) if pooled else output


class _BatchNorm(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, input, residual, weight, bias, eps, slope, pooled):
        output, statistics = _forward(input, residual, weight, bias, eps, slope, pooled)
        ctx.options = eps, slope, pooled
        kept = None if residual is None or slope == 1 else output
        ctx.save_for_backward(input, weight, bias, kept, statistics)
        ctx.mark_non_differentiable(statistics)
        return output, statistics

    @staticmethod
    def backward(ctx, grad, _):
        input, weight, bias, output, statistics = ctx.saved_tensors
        gradients = _composed_gradients if torch.is_grad_enabled() else _gradients
        found = gradients(grad, input, weight, bias, output, statistics, *ctx.options)
        return *(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False)), None, None, None


def _gradients(grad, input, weight, bias, output, statistics, eps, slope, pooled) -> tuple[Tensor, ...]:
    dense = input.is_contiguous()
    grad = grad.contiguous(memory_format=torch.contiguous_format if dense else torch.channels_last)
    of_input, of_residual, *of_others = _backward(grad, input, weight, bias, output, statistics, slope, pooled)
    return of_input, grad if output is None else of_residual, *of_others


def _composed_gradients(grad, input, weight, bias, output, _, eps, slope, pooled) -> list[Tensor | None]:
    """Gradients that are differentiable themselves."""
    if output is not None:  # its sign tells the activation's derivative
        grad, slope = torch.ops.aten.leaky_relu_backward(grad, output, slope, True), 1.0
    operands = [input, weight, bias]
    wanted = [t for t in operands if t is not None and t.requires_grad]
    result = composed(input, None, weight, bias, eps, slope, pooled)
    found = iter(torch.autograd.grad(result, wanted, grad, create_graph=True) if wanted else ())
    of_input, *of_others = [next(found) if t is not None and t.requires_grad else None for t in operands]
    return [of_input, grad, *of_others]


batch_norm = _BatchNorm.apply
