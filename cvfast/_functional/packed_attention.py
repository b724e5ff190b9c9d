"""packed_attention: sequences of different lengths, one after the other without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvfast import backend as _backend
from cvfast._functional.attention import normalised


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor | Sequence[int],
    key_offsets: Tensor | Sequence[int] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """scaled_dot_product_attention within each of N sequences that are packed along the first dimension.

    Sequence n has the queries query_offsets[n] to query_offsets[n + 1] - 1, and the keys likewise; it may be empty.

    Args:
        query: [T, H, D]; key: [S, H, D] (with enable_gqa fewer heads), value: [S, H, Dv], all sequences' tokens.
        query_offsets: N + 1 ascending whole numbers from 0 to T; key_offsets: from 0 to S; None: query_offsets.
        dropout_p, is_causal, scale, enable_gqa, window, backend: as scaled_dot_product_attention's, per sequence.

    Returns:
        [T, H, Dv].

    Raises:
        RuntimeError: tensors that are not 3-dimensional, offsets that do not fit them, or as
        scaled_dot_product_attention's.
    """
    if not query.dim() == key.dim() == value.dim() == 3:
        raise RuntimeError(
            "packed_attention: query, key and value must be [tokens, heads, size], but got sizes "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    q_bounds = _bounds("query_offsets", query_offsets, query.shape[0])
    k_bounds = q_bounds if key_offsets is None else _bounds("key_offsets", key_offsets, key.shape[0])
    if len(q_bounds) != len(k_bounds) or k_bounds[-1] != key.shape[0]:
        raise RuntimeError(
            f"packed_attention: {len(q_bounds) - 1} sequences of queries, {len(k_bounds) - 1} of keys up to "
            f"{k_bounds[-1]}, but there are {key.shape[0]} keys"
        )
    dropout_p = 0.0 if dropout_p == 0 else dropout_p  # a constant, as in scaled_dot_product_attention
    heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    *args, _ = normalised(*heads_first, None, dropout_p, is_causal, scale, enable_gqa, None, window)
    run = _backend.select("attention", backend, *args).run
    tokens, options = args[:3], args[3:]  # nothing in the options is a sequence's own
    sequences = (
        tensor.split([end - start for start, end in zip(bounds, bounds[1:], strict=False)], 2)
        for tensor, bounds in zip(tokens, (q_bounds, k_bounds, k_bounds), strict=True)
    )
    results = [run(*sequence, *options) for sequence in zip(*sequences, strict=True)]
    return torch.cat(results, 2).squeeze(0).transpose(0, 1)


def _bounds(name: str, offsets: Tensor | Sequence[int], end: int) -> list[int]:
    """offsets as a list, from 0 to `end`."""
    bounds = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != end or sorted(bounds) != bounds:
        raise RuntimeError(f"packed_attention: {name} must ascend from 0 to {end}, but got {bounds}")
    return bounds
