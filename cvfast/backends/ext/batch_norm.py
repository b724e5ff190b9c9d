"""Batch normalisation in training by cvfast's C++ kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from cvfast import _library
from cvfast.ops.batch_norm import batch_norm
from cvfast.ops.card import watched


def why_not(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float,
    pooled: bool,
) -> list[str]:  # fmt: skip
    """Reasons why the compiled kernels cannot run this call."""
    if not input.is_cpu:
        return [f"no kernel of batch_norm for device {input.device.type!r} (there is one for the CPU)"]
    if _library.ops.reason is not None:
        return [_library.ops.reason]
    tensors = [t for t in (input, residual, weight, bias) if t is not None]
    if not all([type(t) in (Tensor, Parameter) and t.dtype is torch.float32 for t in tensors]) or watched(input):
        return ["tracers, transforms, other classes of tensors and dtypes other than float32 are torch's"]
    if input.dim() != 4 or input.numel() == 0 or not 0 <= slope <= 1:
        return ["only images [N, C, H, W] that are not empty, and an activation with a slope from 0 to 1"]
    if pooled and (residual is not None or input.shape[2] % 2 or input.shape[3] % 2):
        return ["only images of even sizes, without a residual, are pooled"]
    if residual is not None and residual.shape != input.shape:
        return ["a residual that is broadcast is torch's"]
    return []


def why_slower(*args) -> list[str]:
    """Where torch's own operators are taken although the kernels could run: nowhere."""
    return []


def run(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float,
    pooled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and statistics as in cvfast/ops/batch_norm.py."""
    last = torch.channels_last
    if not input.is_contiguous() and not input.is_contiguous(memory_format=last):
        input = input.contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.contiguous_format if input.is_contiguous() else last)
    return batch_norm(input, residual, weight, bias, eps, slope, pooled)
