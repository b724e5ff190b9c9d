"""Softmax attention as its definition says."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
) -> Tensor:
    """softmax(scale * query key^T + bias) value over the keys that a query sees; 0 where it sees none.

    Arguments as cvfast.functional.scaled_dot_product_attention's; dropout_p must be 0. Differentiable by torch's
    autograd to every order.
    """
    if dropout_p != 0:
        raise ValueError(f"the reference has no dropout, got dropout_p={dropout_p}")
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    i, j = torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])
    visible = torch.ones(scores.shape, dtype=torch.bool)
    if is_causal:
        visible = visible & (j <= i)
    left, right = window or (None, None)
    if left is not None:
        visible = visible & (j >= i - left)
    if right is not None:
        visible = visible & (j <= i + right)
    if key_lengths is not None:
        lengths = key_lengths.reshape(*key_lengths.shape, *(1 for _ in scores.shape[key_lengths.dim() :]))
        visible = visible & (j < lengths)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        visible = visible & (attn_mask != -torch.inf)
        scores = scores + attn_mask.masked_fill(attn_mask == -torch.inf, 0)
    scores = scores.masked_fill(~visible, -torch.inf)
    sees = visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~sees, 0).softmax(-1).masked_fill(~visible, 0)
    return weights @ value
