"""Additive attention by torch's own operators, with a tensor [B, T, S, A]."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(*args) -> list[str]:
    """Never refuses."""
    return []


def why_slower(*args) -> list[str]:
    """Nothing is left to be taken instead."""
    return []


def run(
    query: Tensor, keys: Tensor, values: Tensor, w_query: Tensor, w_key: Tensor | None, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Context [B, T, E] and weights [B, T, S]; query [B, T, Q], mask [B, 1 or T, S], else as in cvfast.functional."""
    linear = torch.nn.functional.linear
    k = keys if w_key is None else linear(keys, w_key)
    scores = torch.tanh(linear(query, w_query)[:, :, None] + k[:, None]) @ v
    if mask is None:
        weights = scores.softmax(-1)
    else:
        sees = mask.any(-1, keepdim=True)
        weights = scores.masked_fill(~mask & sees, -torch.inf).softmax(-1).masked_fill(~mask, 0)
        values = values.masked_fill(~mask.any(1).unsqueeze(-1), 0)
    return weights @ values, weights
