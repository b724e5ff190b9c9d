"""Softmax attention by cvfast's C++ kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from cvfast import _library
from cvfast.backends.ext import linear
from cvfast.backends.ext.encoder import PreparedEncoder as PreparedEncoder
from cvfast.ops.attention import PLAIN_ATTENTION
from cvfast.ops.card import call, derives, watched
from cvfast.ops.encoder import SELF_ATTENTION

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # all that autocast knows


def why_not(query: Tensor, *args) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    if not query.is_cpu:
        return [f"no kernel of attention for device {query.device.type!r} (there is one for the CPU)"]
    if _library.ops.reason is not None:
        return [_library.ops.reason]
    if query.dtype not in DTYPES:
        return [f"no kernel for {query.dtype} on cpu"]
    return []


def why_slower(*args) -> list[str]:
    """Where torch's own operator is taken although the kernels could run: nowhere, as far as measured."""
    return []


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    dropout_p: float,
    scale: float | None,
    left: int,
    right: int,
) -> Tensor:
    """Calls the operator; shapes and meaning as in cvfast/ops/attention.py. Dropout's seed is torch's next number."""
    seed = torch.randint(2**63 - 1, (1,)) if dropout_p > 0 else None
    options = (dropout_p, scale, left, right)
    return call(_operator, query, key, value, bias, mask, key_lengths, seed, *options)[0]


def run_unasked(query: Tensor, key: Tensor, value: Tensor, right: int, scale: float | None) -> Tensor | None:
    """Attention to keys of the queries' shape, 4-D, without mask or dropout; None for what needs another look."""
    on_cpu = query.is_cpu and key.is_cpu and value.is_cpu
    if not on_cpu or query.dim() != 4 or not query.shape == key.shape == value.shape:
        return None
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return None
    if _library.ops.reason is not None or forward_ad._current_level >= 0:
        return None
    tensors = (query, key, value)
    if not all([type(t) in (Tensor, Parameter) for t in tensors]) or watched(query) or derives(tensors):
        return call(_operator, query, key, value, None, None, None, None, 0.0, scale, UNLIMITED, right)[0]
    return PLAIN_ATTENTION(query, key, value, scale, right)


UNLIMITED = 2**62  # of a window's side: no key is that far away

_operator = torch.ops.cvfast.attention.default


def self_attention(
    input: Tensor, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, heads: int
) -> Tensor | None:
    """As cvfast/ops/encoder.py says; None where a derivative or a tracer sees the parts, or they are torch's."""
    tensors = [t for t in (input, in_weight, in_bias, out_weight, out_bias) if t is not None]
    if (
        linear.is_torchs(input, in_weight)
        or not all([t.is_cpu and t.dtype is torch.float32 for t in tensors])
        or not all([type(t) in (Tensor, Parameter) for t in tensors])
        or not input.is_contiguous()
        or watched(input)
        or derives(tensors)
    ):
        return None
    packed = linear.packed_weight(input, in_weight), linear.packed_weight(input, out_weight)
    return SELF_ATTENTION(input, in_weight, in_bias, out_weight, out_bias, heads, *packed)
