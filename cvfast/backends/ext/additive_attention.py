"""Additive attention by cvfast's C++ kernels (CPU): products with matrices are 1x1 convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast import _library
from cvfast.ops.card import call

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # all that autocast knows


def why_not(query: Tensor, *args) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    if not query.is_cpu:
        return [f"no kernel of additive attention for device {query.device.type!r} (there is one for the CPU)"]
    if _library.ops.reason is not None:
        return [_library.ops.reason]
    if query.dtype not in DTYPES:
        return [f"no kernel for {query.dtype} on cpu"]
    return []


def why_slower(*args) -> list[str]:
    """Where torch's own operators are taken although the kernels could run: nowhere."""
    return []


def run(
    query: Tensor, keys: Tensor, values: Tensor, w_query: Tensor, w_key: Tensor | None, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Context [B, T, E] and weights [B, T, S]; query [B, T, Q], mask [B, 1 or T, S], else as in cvfast.functional."""
    k = keys if w_key is None else _linear(keys, w_key)
    weights = call(torch.ops.cvfast.additive_weights.default, _linear(query, w_query), k, v, mask).to(values.dtype)
    if mask is not None:
        values = values.masked_fill(~mask.any(1).unsqueeze(-1), 0)
    return _product(weights, values), weights


# Products as 1x1 convolutions: the same bits for any number of threads and samples, unlike torch's.


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T: the rows of x are pixels."""
    if x.numel() == 0:
        return torch.nn.functional.linear(x, weight)
    pixels = x.flatten(0, -2).t()[None, :, :, None]
    return _convolve(pixels, weight, 1).squeeze((0, 3)).t().reshape(*x.shape[:-1], -1)


def _product(weights: Tensor, values: Tensor) -> Tensor:
    """[B, T, E] from weights [B, T, S] and values [B, S, E]: the samples are groups of channels, the queries pixels."""
    batch, queries, _ = weights.shape
    if weights.numel() == 0 or values.numel() == 0:
        return weights @ values
    pixels = weights.transpose(1, 2).flatten(0, 1)[None, :, :, None]
    result = _convolve(pixels, values.transpose(1, 2).flatten(0, 1), batch)
    return result.reshape(batch, -1, queries).transpose(1, 2).contiguous()


def _convolve(pixels: Tensor, weight: Tensor, groups: int) -> Tensor:
    op = torch.ops.cvfast.conv2d.default
    return call(op, pixels, weight[:, :, None, None], None, (1, 1), (0, 0), (1, 1), groups)
