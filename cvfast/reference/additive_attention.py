"""Additive attention as its definition says."""

from __future__ import annotations

import torch
from torch import Tensor


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    w_query: Tensor,
    w_key: Tensor | None,
    v: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(context, weights); arguments as cvfast.functional.additive_attention's. Bahdanau et al. 2015, section 3.1."""
    if query.dim() == 2:
        mask = mask[:, None] if mask is not None and mask.dim() == 2 else mask
        context, weights = additive_attention(query[:, None], keys, values, w_query, w_key, v, mask)
        return context[:, 0], weights[:, 0]
    q = query @ w_query.t()
    k = keys if w_key is None else keys @ w_key.t()
    scores = torch.tanh(q[:, :, None] + k[:, None]) @ v
    if mask is None:
        weights = scores.softmax(-1)
    else:
        mask = mask[:, None] if mask.dim() == 2 else mask
        sees = mask.any(-1, keepdim=True)
        weights = scores.masked_fill(~mask & sees, -torch.inf).softmax(-1).masked_fill(~mask, 0)
    return weights @ values, weights
