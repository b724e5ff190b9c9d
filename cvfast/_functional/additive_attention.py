"""additive_attention: checks, and the normal form of its arguments that backends take."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cvfast import backend as _backend


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    w_query: Tensor,
    w_key: Tensor | None,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Additive attention: softmax over s of v . tanh(w_query query[t] + w_key keys[s]), and the values' mean under it.

    Bahdanau, Cho and Bengio: Neural machine translation by jointly learning to align and translate (2015). No tensor
    [B, T, S, A] is made. Keys and values that the mask hides from all queries take no part, NaN or not; a query that
    sees nothing gets context and weights 0.

    Args:
        query: [B, T, Q], or [B, Q] for one step.
        keys: [B, S, K]; or, with w_key None, already projected, [B, S, A] (for many steps over the same keys).
        values: [B, S, E].
        w_query: [A, Q]. w_key: [A, K] or None. v: [A].
        mask: bool, [B, S] or [B, T, S]; True where the key is seen.
        backend: "auto", "ext", "triton" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        (context [B, T, E], weights [B, T, S]), without T for a query without T.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; or the named backend cannot run.
        ValueError: an unknown backend.
    """
    device = query.device.type
    if _backend.autocasts(device):
        cast = partial(_cast, dtype=torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):  # so that the scores stay in the type they are computed in
            operands = map(cast, (query, keys, values, w_query, w_key, v))
            return additive_attention(*operands, mask, backend=backend)
    _check(query, keys, values, w_query, w_key, v, mask)
    one_step = query.dim() == 2
    if one_step:
        query = query.unsqueeze(1)
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(1)
    args = (query, keys, values, w_query, w_key, v, mask)
    context, weights = _backend.select("additive_attention", backend, *args).run(*args)
    return (context.squeeze(1), weights.squeeze(1)) if one_step else (context, weights)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As autocast does: all but float64."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def _check(
    query: Tensor, keys: Tensor, values: Tensor, w_query: Tensor, w_key: Tensor | None, v: Tensor, mask: Tensor | None
) -> None:
    fits = (
        query.dim() in (2, 3)
        and keys.dim() == values.dim() == 3
        and w_query.dim() == 2
        and v.dim() == 1
        and (w_key is None or (w_key.dim() == 2 and w_key.shape == (v.shape[0], keys.shape[2])))
        and w_query.shape == (v.shape[0], query.shape[-1])
        and (w_key is not None or keys.shape[2] == v.shape[0])
        and query.shape[0] == keys.shape[0] == values.shape[0]
        and keys.shape[1] == values.shape[1]
    )
    tensors = {"query": query, "keys": keys, "values": values, "w_query": w_query, "w_key": w_key, "v": v}
    there = {name: t for name, t in tensors.items() if t is not None}
    if not fits:
        raise RuntimeError(
            "additive_attention: expected query [B, T, Q] or [B, Q], keys [B, S, K], values [B, S, E], w_query [A, Q], "
            "w_key [A, K] (or None with K = A) and v [A], but got "
            + ", ".join(f"{name} {list(t.shape)}" for name, t in there.items())
        )
    if len({(t.device, t.dtype) for t in there.values()}) > 1:
        raise RuntimeError(
            "additive_attention: expected one dtype and device, but got "
            + ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in there.items())
        )
    if mask is None:
        return
    queries = () if query.dim() == 2 else (query.shape[1],)
    allowed = ((query.shape[0], keys.shape[1]), (query.shape[0], *queries, keys.shape[1]))
    if mask.dtype != torch.bool or mask.shape not in allowed:
        sizes = " or ".join(str(list(size)) for size in dict.fromkeys(allowed))
        raise RuntimeError(
            f"additive_attention: expected a bool mask of size {sizes}, but got {mask.dtype} of size {list(mask.shape)}"
        )
