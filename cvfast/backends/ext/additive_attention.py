"""Additive attention by cvfast's C++ kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cvfast import _library
from cvfast.backends.ext import linear
from cvfast.ops.attention_lstm import STEP, attention_lstm
from cvfast.ops.card import call, derives, watched

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
    k = keys if w_key is None else linear.run(keys, w_key, None)
    q = _linear_of_few(query, w_query) if query.shape[1] == 1 else linear.run(query, w_query, None)
    weights = call(torch.ops.cvfast.additive_weights.default, q, k, v, mask).to(values.dtype)
    if mask is not None:
        values = values.masked_fill(~mask.any(1).unsqueeze(-1), 0)
    return _product(weights, values, False), weights


def lstm_step(*operands: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """As cvfast/ops/attention_lstm.py says; None where a derivative, a tracer or a narrow dtype asks for more."""
    input = operands[0]
    if input.dtype not in (torch.float32, torch.float64) or watched(input) or derives(operands):
        return None
    return STEP(*operands)


def lstm_steps(*operands: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """As `lstm_step` for a sequence, derivatives included where scores are additive."""
    input, v = operands[0], operands[7]
    if input.dtype not in (torch.float32, torch.float64) or watched(input):
        return None
    if derives(operands) and (v is None or forward_ad._current_level >= 0):
        return None
    return attention_lstm(*operands)


# torch's own products would not give the same bits for any number of threads and samples.


def _linear_of_few(x: Tensor, weight: Tensor) -> Tensor:
    """[B, 1, A] from x [B, 1, Q]: linear.run would pack the weight, which costs more than so small a product."""
    return _product(x.transpose(0, 1), weight.unsqueeze(0), True).transpose(0, 1)


def _product(left: Tensor, right: Tensor, transposed: bool) -> Tensor:
    """left [B, M, K] times right [B, K, N], or times the transpose of right [B, N, K]."""
    narrow = left.dtype in (torch.bfloat16, torch.float16)
    operands = (left.float(), right.float()) if narrow else (left, right)
    return call(torch.ops.cvfast.batched_product.default, *operands, transposed).to(left.dtype)
