"""attention_statistics: what the weights of attention say, without keeping them."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from cvfast._functional.attention import normalised

TILE_ELEMENTS = 2**20


class AttentionStatistics(NamedTuple):
    """What attention_statistics returns; None for what was not asked for."""

    entropy: Tensor | None
    top_weights: Tensor | None
    top_keys: Tensor | None
    key_sums: Tensor | None
    mean_weights: Tensor | None


@torch.no_grad()
def attention_statistics(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    entropy: bool = False,
    top_k: int = 0,
    key_sums: bool = False,
    mean_weights: bool = False,
) -> AttentionStatistics:
    """Statistics of the weights softmax(scale * query key^T + bias) that scaled_dot_product_attention would use.

    A tile of queries at a time: beside the results, memory for a few tensors of 2^20 elements (or of one query of each
    head, where that is more), on any device. Not differentiable. A query that sees no key has weights 0.

    Args:
        query, key, attn_mask, is_causal, scale, enable_gqa, key_lengths, window: scaled_dot_product_attention's.
        entropy: [..., H, L], -sum of w log(w) over the keys, in nats.
        top_k: how many of the largest weights, from 0 to S: [..., H, L, top_k], descending, and their keys (int64).
        key_sums: [..., H, S], each key's weights summed over the queries: how much it was attended.
        mean_weights: [..., L, S], averaged over the heads, as torch.nn.MultiheadAttention returns them.

    Returns:
        AttentionStatistics(entropy, top_weights, top_keys, key_sums, mean_weights): in float32 (float64 of float64),
        leading dimensions as query's result has them; None for what was not asked for.

    Raises:
        RuntimeError, TypeError: as scaled_dot_product_attention's; RuntimeError for top_k out of range.
    """
    q, k, _, bias, mask, key_lengths, _, scale, left, right, leading = normalised(
        query, key, key, attn_mask, 0.0, is_causal, scale, enable_gqa, key_lengths, window
    )
    batch, heads, queries, size = q.shape
    key_heads, keys = k.shape[1:3]
    if not 0 <= top_k <= keys:
        raise RuntimeError(f"attention_statistics: top_k must be from 0 to the number of keys, {keys}, got {top_k}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = max(size, 1) ** -0.5 if scale is None else scale
    columns = k.to(dtype).transpose(-1, -2).unsqueeze(2)  # [B, Hk, 1, D, S]
    rows = {name: [] for name in ("entropy", "top_weights", "top_keys", "mean_weights")}
    sums = q.new_zeros(batch, heads, keys, dtype=dtype) if key_sums else None
    step = max(1, TILE_ELEMENTS // max(1, batch * heads * keys))
    for first in range(0, max(1, queries), step):
        tile = slice(first, min(first + step, queries))
        scores = (scale * q[:, :, tile].to(dtype)).unflatten(1, (key_heads, -1)) @ columns
        visible, bias_rows = _visible(tile, k, bias, mask, key_lengths, left, right)
        weights = _softmax(scores.flatten(1, 2), visible, bias_rows)
        if entropy:
            rows["entropy"].append(torch.special.entr(weights).sum(-1))
        if top_k:
            top = weights.topk(top_k)
            rows["top_weights"].append(top.values)
            rows["top_keys"].append(top.indices)
        if mean_weights:
            rows["mean_weights"].append(weights.mean(1))
        if sums is not None:
            sums += weights.sum(2)
    found = {
        name: torch.cat(tiles, 1 if name == "mean_weights" else 2) if tiles else None for name, tiles in rows.items()
    }
    by_head = lambda t: None if t is None else t.reshape(*leading, *t.shape[2:])  # noqa: E731
    mean = found["mean_weights"]
    samples = leading[:-1] if query.dim() > 3 or enable_gqa else leading  # [N, L, D] has no dimension of heads
    return AttentionStatistics(
        by_head(found["entropy"]),
        by_head(found["top_weights"]),
        by_head(found["top_keys"]),
        by_head(sums),
        None if mean is None else mean.reshape(*samples, *mean.shape[1:]),
    )


def _visible(
    tile: slice, k: Tensor, bias: Tensor | None, mask: Tensor | None, lengths: Tensor | None, left: int, right: int
) -> tuple[Tensor | None, Tensor | None]:
    """Which keys the tile's queries see, broadcastable to [B, H, l, S] (None: all), and their bias."""
    i = torch.arange(tile.start, tile.stop, device=k.device)[:, None]
    j = torch.arange(k.shape[2], device=k.device)
    mask, bias = (t if t is None or t.shape[2] == 1 else t[:, :, tile] for t in (mask, bias))
    rules = []
    if left < tile.stop - 1:
        rules.append(j >= i - left)
    if right < k.shape[2] - 1 - tile.start:
        rules.append(j <= i + right)
    if lengths is not None:
        rules.append(j < lengths[:, None, None, None])
    if mask is not None:
        rules.append(mask)
    if bias is not None:
        rules.append(bias != -torch.inf)
    return reduce(torch.logical_and, rules) if rules else None, bias


def _softmax(scores: Tensor, visible: Tensor | None, bias: Tensor | None) -> Tensor:
    """Weights [B, H, l, S] over the visible keys; 0 for a query that sees none."""
    if bias is not None:
        scores = scores + bias
    if visible is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill_(~visible.any(-1, keepdim=True), 0)
