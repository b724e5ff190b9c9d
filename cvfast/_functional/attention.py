"""scaled_dot_product_attention: checks, and the normal form of its arguments that backends take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvfast import backend as _backend

_EXT = _backend.BACKENDS["attention"]["ext"]
UNLIMITED = _EXT.UNLIMITED


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
    backend: str | None = None,
) -> Tensor:
    """Softmax attention, with torch.nn.functional.scaled_dot_product_attention's meaning and arguments, and more.

    softmax(scale * query key^T + bias) value, over the keys that a query sees. Memory grows with L + S, not with L * S,
    in the backward pass as well. A key that no query sees is never read, nor is its value, and what a value holds
    reaches only queries that see its key, NaN included. A query that sees no key gets 0, with gradients 0.

    Args:
        query: [..., H, L, D] (or [N, L, D], [L, D]); read in place whatever its strides, as key and value are.
        key: [..., H, S, D], value: [..., H, S, Dv], of query's dtype; leading dimensions broadcast.
        attn_mask: broadcastable to [..., H, L, S]: bool (True: the query sees the key), or numbers added to the scores
            (query's dtype or float32; differentiable; -inf hides the key).
        dropout_p: share of the weights that are dropped, at random by torch's default generator; from 0 to 1.
        is_causal: query i sees keys 0 to i.
        scale: default 1 / sqrt(D).
        enable_gqa: key and value have fewer heads, each of which serves H / (its heads) heads of the query.
        key_lengths: int64, one per sample (of the leading dimensions before H; [N] for [N, L, D]): how many of the
            first keys are seen. 0 is allowed, S or more means all.
        window: (left, right): query i sees keys i - left to i + right; None: no limit on that side.
        backend: "auto", "ext", "triton" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        [..., H, L, Dv] in query's dtype; it lies in memory as a 4-D query of its shape does. dtypes: float32, float64,
        bfloat16, float16 on the CPU.

    Raises:
        RuntimeError: as torch's, for shapes, dtypes or options that do not fit; or where the named backend cannot run.
        TypeError, ValueError: arguments of another type, an unknown backend.
    """
    dropout_p = 0.0 if dropout_p == 0 else dropout_p  # a constant: torch.compile would trace it as an unknown float
    plain = dropout_p == 0 and attn_mask is None and key_lengths is None and window is None and not enable_gqa
    if plain and _backend.is_certain("ext", backend):
        output = _EXT.run_unasked(query, key, value, 0 if is_causal else UNLIMITED, scale)
        if output is not None:
            return output
    *args, leading = normalised(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths, window
    )
    output = _backend.select("attention", backend, *args).run(*args)
    return output if query.dim() == 4 else output.reshape(*leading, *output.shape[2:])


def normalised(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, key_lengths: Tensor | None, window: tuple[int | None, int | None] | None,
) -> tuple:  # fmt: skip
    """What backends take, (q, k, v, bias, mask, key_lengths, dropout_p, scale, left, right), and then the leading
    dimensions of the result. Raises what the user got wrong."""
    _check(query, key, value, attn_mask, dropout_p, is_causal)
    q, k, v = _four_dimensional(query, key, value, enable_gqa)
    mask = None if attn_mask is None else _four_dimensional_mask(attn_mask, query, q, k, enable_gqa)
    bias = None
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = mask, None
    left, right = _window(window, is_causal)
    if key_lengths is not None:
        key_lengths = _lengths(key_lengths, query, q)
    leading = q.shape[:2] if query.dim() == 4 else _leading(query, key, value, enable_gqa)
    return q, k, v, bias, mask, key_lengths, dropout_p, scale, left, right, leading


def _check(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> None:
    """Raises RuntimeError, in torch's words where torch has some, for what does not fit together."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            "scaled_dot_product_attention: Expected query, key, and value to all be at least 2 dimensional, but got "
            f"query.dim: {query.dim()}, key.dim: {key.dim()} and value.dim: {value.dim()} instead"
        )
    device = query.device.type
    casts = _backend.autocasts(device)
    if not casts and not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            "scaled_dot_product_attention: Expected query, key, and value to have the same dtype, but got "
            f"query.dtype: {query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead"
        )
    if not query.device == key.device == value.device:
        raise RuntimeError(
            "scaled_dot_product_attention: Expected query, key, and value to have the same device type, but got "
            f"query.device: {query.device} key.device: {key.device} and value.device: {value.device} instead"
        )
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            "scaled_dot_product_attention: query and key must have the same last dimension, key and value the same "
            f"number of keys, but got sizes {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(
            f"scaled_dot_product_attention: dropout probability has to be between 0 and 1, but got {dropout_p}"
        )
    if attn_mask is None:
        return
    if is_causal:
        raise RuntimeError(
            "scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True "
            "(key_lengths and window can be)"
        )
    if not casts and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            "scaled_dot_product_attention: Expected attn_mask dtype to be bool or float or to match query dtype, but "
            f"got attn_mask.dtype: {attn_mask.dtype} and query.dtype: {query.dtype} instead"
        )
    if attn_mask.device != query.device:
        raise RuntimeError(f"scaled_dot_product_attention: attn_mask is on {attn_mask.device}, query on {query.device}")


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> torch.Size:
    """The result's dimensions before [L, Dv]."""
    shapes = [query.shape[:-2], key.shape[:-2], value.shape[:-2]]
    if not enable_gqa:
        return torch.broadcast_shapes(*shapes)
    return torch.broadcast_shapes(*(s[:-1] for s in shapes)) + query.shape[-3:-2]


def _four_dimensional(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, H, L, D], key [B, Hk, S, D] and value [B, Hk, S, Dv]: views where strides allow."""
    tensors = (query, key, value)
    if enable_gqa:
        heads = {t.shape[-3] if t.dim() > 2 else 0 for t in (key, value)}
        if query.dim() < 3 or not all(heads) or any(query.shape[-3] % h for h in heads):
            raise RuntimeError(
                "scaled_dot_product_attention: Number of heads in key and value must divide the number of heads in "
                f"query, but got sizes {', '.join(str(list(t.shape)) for t in tensors)}"
            )
        if len(heads) == 2:
            key, value = (t.repeat_interleave(max(heads) // t.shape[-3], -3) for t in (key, value))
            tensors = (query, key, value)
    if (
        all(t.dim() == 4 for t in tensors)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and (enable_gqa or query.shape[1] == key.shape[1] == value.shape[1])
    ):
        return tensors
    leading = _leading(*tensors, enable_gqa)
    if not enable_gqa:
        tensors = [t.expand(*leading, *t.shape[-2:]) for t in tensors]
        if len(leading) < 2:  # [N, L, D] is N samples of one head
            leading = (*leading, 1)
            tensors = [t.unsqueeze(-3) for t in tensors]
    else:
        tensors = [t.expand(*leading[:-1], *t.shape[-3:]) for t in tensors]
    if len(leading) == 1:
        return tuple(t.unsqueeze(0) for t in tensors)
    return tuple(t.flatten(0, -4) for t in tensors)


def _four_dimensional_mask(mask: Tensor, query: Tensor, q: Tensor, k: Tensor, enable_gqa: bool) -> Tensor:
    """The mask as [B or 1, H or 1, L or 1, S or 1], where q and k are the four-dimensional query and key."""
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.dim() < 2:
        mask = mask.reshape(*(1 for _ in range(2 - mask.dim())), *mask.shape)
    rows, leading = mask.shape[-2:], mask.shape[:-2]
    if query.dim() < 4 and not enable_gqa:
        leading = (*leading, 1)  # the head
    if len(leading) > 2:
        wanted = query.shape[:-2] if query.dim() >= 4 else leading
        folded = (1, leading[-1])
        if any(size != 1 for size in leading[:-1]):
            mask = mask.expand(*wanted[:-1], *mask.shape[-3:])
            folded = (q.shape[0], leading[-1])
        leading = folded
    leading = (*(1 for _ in range(2 - len(leading))), *leading)
    for size, allowed in zip((*leading, *rows), full, strict=True):
        if size not in (1, allowed):
            raise RuntimeError(
                f"scaled_dot_product_attention: attn_mask of size {list(mask.shape)} cannot be broadcast to "
                f"{list(full)}"
            )
    return mask.reshape(*leading, *rows)


def _window(window: tuple[int | None, int | None] | None, is_causal: bool) -> tuple[int, int]:
    """Keys to the left and to the right of a query that it sees."""
    if window is None:
        left = right = None
    elif isinstance(window, Sequence) and len(window) == 2:
        left, right = window
    else:
        raise TypeError(f"scaled_dot_product_attention: window must be a pair (left, right), got {window!r}")
    for side in (left, right):
        if side is not None and (not isinstance(side, int) or isinstance(side, bool)):
            raise TypeError(f"scaled_dot_product_attention: window's sides must be whole numbers or None, got {side!r}")
        if side is not None and side < 0:
            raise RuntimeError(f"scaled_dot_product_attention: window must not be negative, got {window}")
    left, right = (UNLIMITED if side is None else side for side in (left, right))
    return left, 0 if is_causal else right


def _lengths(key_lengths: Tensor, query: Tensor, q: Tensor) -> Tensor:
    """key_lengths as [B]."""
    if not isinstance(key_lengths, Tensor) or key_lengths.dtype != torch.int64:
        raise TypeError(f"scaled_dot_product_attention: key_lengths must be an int64 tensor, got {key_lengths!r}")
    if key_lengths.numel() != q.shape[0] or key_lengths.device != query.device:
        raise RuntimeError(
            f"scaled_dot_product_attention: key_lengths must be one number for each of {q.shape[0]} samples, on "
            f"{query.device}, but got size {list(key_lengths.shape)} on {key_lengths.device}"
        )
    return key_lengths.reshape(-1)
