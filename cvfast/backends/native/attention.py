"""Softmax attention by torch's own operator."""

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
    """torch's operator; a window, key lengths or a mask beside a bias become one mask [B, H, L, S] for it."""
    queries, keys = query.shape[2], key.shape[2]
    only_causal = left >= queries and right == 0 and bias is None and mask is None and key_lengths is None
    rules = []
    if not only_causal and (left < queries or right < keys):
        i, j = torch.arange(queries, device=query.device)[:, None], torch.arange(keys, device=query.device)
        rules.append((j >= i - left) & (j <= i + right))
    if key_lengths is not None:
        rules.append(torch.arange(keys, device=query.device) < key_lengths[:, None, None, None])
    for rule in rules:
        mask = rule if mask is None else mask & rule
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, only_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
