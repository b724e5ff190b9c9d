"""gelu of contiguous float32 tensors: two operators of the compiled libraries alone, and a derivative for autograd.

Tracers and transforms see torch's operator.
"""

from __future__ import annotations

import torch
from torch.autograd.function import _SingleLevelFunction

from cvfast.ops.card import define_kernel

_forward = define_kernel("cvfast", "gelu(Tensor input) -> Tensor")
_backward = define_kernel("cvfast", "gelu_backward(Tensor grad_output, Tensor input) -> Tensor")


class _Gelu(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return _forward(input)

    @staticmethod
    def backward(ctx, grad):
        (input,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiable itself
            return torch.ops.aten.gelu_backward(grad, input)
        return _backward(grad.contiguous(), input)


gelu = _Gelu.apply
