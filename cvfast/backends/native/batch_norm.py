"""Batch normalisation in training by torch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast.ops.batch_norm import composed


def why_not(*args) -> list[str]:
    """Never refuses."""
    return []


def why_slower(*args) -> list[str]:
    """Nothing is left to be taken instead."""
    return []


def run(input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, *options):
    """Output and statistics as in cvfast/ops/batch_norm.py."""
    with torch.no_grad():
        variance, mean = torch.var_mean(input, (0, 2, 3), correction=0)
        count = input.numel() // input.shape[1]
        statistics = torch.stack((mean, (variance + eps).rsqrt(), variance * (count / (count - 1))))
    return composed(input, residual, weight, bias, eps, *options), statistics
