"""The card of additive attention's weights: the operator, its derivative, and that one's as tensor operations.

weights P = softmax over s of score[b, t, s] = sum_a weight[a] h,  h = tanh(query[b, t, a] + key[b, s, a]).
With c = 1 - h^2, g the weights' gradient and the scores' gradient d = P (g - sum_s P g):
grad_query[t] = sum_s d weight c,  grad_key[s] = sum_t d weight c,  grad_weight = sum d h.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cvfast.ops.card import Card, call, looped, register

TILE_ELEMENTS = 2**20


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """bfloat16 and float16 are computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# additive_weights: query [B, T, A], key [B, S, A], weight [A], mask bool [B or 1, T or 1, S or 1] -> [B, T, S] in the
# compute dtype, 0 where the mask is False.


def weights_fake(query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], key.shape[1], dtype=compute_dtype(query))


def weights_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output, *inputs)


def weights_backward(ops, ctx, needs, grad: Tensor):
    weights, query, key, weight, mask = ctx.saved_tensors
    op = ops.additive_weights_backward.default
    grad_query, grad_key, grad_weight = call(op, grad, weights, query, key, weight, mask)
    return grad_query, grad_key, grad_weight.sum(0).to(weight.dtype), None


def _batched(size: int, tensor: Tensor, dim: int | None) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _fold(size: int, tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """vmap's dimension as part of B."""
    tensor = _batched(size, tensor, dim)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def weights_vmap(ops, info, in_dims, *args):
    return _vmap(ops.additive_weights, info, in_dims, *args), 0


def _vmap(op, info, in_dims, *args):
    """The operator's results for tensors of [B, ...], a weight and a mask, vmap's dimension first."""
    (*tensors, weight, mask), size = args, info.batch_size
    if in_dims[-2] is not None:
        return looped(op, info, in_dims, args)[0]
    batch = _batched(size, tensors[0], in_dims[0]).shape[1]
    folded = [_fold(size, t, d, batch) for t, d in zip(tensors, in_dims, strict=False)]
    results = op(*folded, weight, None if mask is None else _fold(size, mask, in_dims[-1], batch))
    return tree_map(lambda r: r.unflatten(0, (size, -1)), results)


# additive_weights_backward: grad_weights and weights [B, T, S] -> grad_query, grad_key, grad_weight [B, A], in the
# compute dtype


def backward_fake(grad: Tensor, weights: Tensor, query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None):
    empty = [t.new_empty(t.shape) for t in (query, key)]
    return (*empty, query.new_empty(query.shape[0], query.shape[2], dtype=compute_dtype(query)))


def backward_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def backward_backward(ops, ctx, needs, u_query: Tensor, u_key: Tensor, u_weight: Tensor):
    """Exact, of any order, by tensor operations on [B, tile, S, A] of about TILE_ELEMENTS elements."""
    grad, weights, query, key, weight, mask = ctx.saved_tensors
    wide = grad.dtype
    k, w, u_k, u_w = key.to(wide)[:, None], weight.to(wide), u_key.to(wide)[:, None], u_weight[:, None, None]
    rows, grad_key, grad_weight = [], 0, 0
    step = max(1, TILE_ELEMENTS // max(1, key.numel()))
    for first in range(0, max(1, query.shape[1]), step):
        tile = slice(first, first + step)
        p, g = weights[:, tile], grad[:, tile]
        h = torch.tanh(query.to(wide)[:, tile, None] + k)
        if mask is not None:
            seen = mask if mask.shape[1] == 1 else mask[:, tile]
            p, g, h = p.masked_fill(~seen, 0), g.masked_fill(~seen, 0), h.masked_fill(~seen[..., None], 0)
        mean = (p * g).sum(-1, keepdim=True)
        d = (p * (g - mean)).unsqueeze(-1)
        c, u = 1 - h * h, u_query.to(wide)[:, tile, None] + u_k
        e = (w * c * u + h * u_w).sum(-1)  # gradient of d
        mean_e = (p * e).sum(-1, keepdim=True)
        x = d * c * (u_w - 2 * w * h * u)
        rows.append((p * (e - mean_e), e * (g - mean) - g * mean_e, x.sum(2)))
        grad_key = grad_key + x.sum(1)
        grad_weight = grad_weight + (d * c * u).sum((0, 1, 2))
    grad_grad, grad_weights, grad_query = (torch.cat(r, 1) for r in zip(*rows, strict=True))
    if mask is not None:
        grad_grad, grad_weights = (t.masked_fill(~mask, 0) for t in (grad_grad, grad_weights))
    narrow = (t.to(like.dtype) for t, like in ((grad_query, query), (grad_key, key), (grad_weight, weight)))
    return grad_grad, grad_weights, *narrow, None


def backward_vmap(ops, info, in_dims, *args):
    return _vmap(ops.additive_weights_backward, info, in_dims, *args), (0, 0, 0)


register(
    [
        Card(
            "additive_weights(Tensor query, Tensor key, Tensor weight, Tensor? mask) -> Tensor",
            weights_fake, weights_setup, weights_backward, weights_vmap,
        ),
        Card(
            "additive_weights_backward(Tensor grad_weights, Tensor weights, Tensor query, Tensor key, Tensor weight, "
            "Tensor? mask) -> (Tensor, Tensor, Tensor)",
            backward_fake, backward_setup, backward_backward, backward_vmap, casts=False,
        ),
    ]
)  # fmt: skip
