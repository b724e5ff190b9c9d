"""The card of attention: the operator, its derivative as an operator, and that one's derivative as tensor operations.

With P the weights, f the dropout factors (0 or 1 / (1 - p)) and g the output's gradient, all for one head:
  S = scale q k^T + bias,  P = softmax(S),  output = (P f) v
  Y = f (g v^T),  dS = P (Y - delta),  delta = sum_j P Y - grad_log_sum
  grad_q = scale dS k,  grad_k = scale dS^T q,  grad_v = (P f)^T g,  grad_bias = dS
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cvfast.ops.card import Card, call, kernel, register

_SHARED = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? key_lengths, Tensor? seed, "
    "float dropout_p, float? scale, SymInt left, SymInt right"
)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """bfloat16 and float16 are computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# attention: query [B, H, L, D], key [B, Hk, S, D], value [B, Hk, S, Dv]; bias and mask (bool) [B or 1, H or 1, L or 1,
# S or 1]; key_lengths [B] int64; seed [1] int64; scale None: 1 / sqrt(D) -> output [B, H, L, Dv], log_sum [B, H, L].
# Query i sees key j if i - left <= j <= i + right. As torch's, the output lies in memory as a query of its shape does.


def attention_fake(query, key, value, *rest) -> tuple[Tensor, Tensor]:
    same = value.shape[3] == query.shape[3]
    output = torch.empty_like(query) if same else query.new_empty(*query.shape[:3], value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=compute_dtype(query))


def attention_setup(ctx, inputs, output) -> None:
    *tensors, ctx.dropout_p, ctx.scale, ctx.left, ctx.right = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def attention_backward(ops, ctx, needs, grad: Tensor | None, grad_log_sum: Tensor | None):
    *tensors, output, log_sum = ctx.saved_tensors
    query, key, value, bias = tensors[:4]
    if grad is None:
        grad = torch.zeros_like(output)
    options = (ctx.dropout_p, ctx.scale, ctx.left, ctx.right, needs[3])
    grads = call(ops.attention_backward.default, grad, grad_log_sum, output, log_sum, *tensors, *options)
    grad_bias = grads[3].to(bias.dtype) if needs[3] else None
    return (*grads[:3], grad_bias, *(None for _ in needs[4:]))


# attention_backward: grad_output as output, grad_log_sum as log_sum -> grad_query, grad_key, grad_value, grad_bias
# (as bias, in the compute dtype; [0, 0, 0, 0] without bias_grad).


def backward_fake(grad, grad_log_sum, output, log_sum, query, key, value, bias, *rest):
    grads = [torch.empty_like(t) for t in (query, key, value)]
    size = bias.shape if rest[-1] else (0, 0, 0, 0)
    return (*grads, query.new_empty(size, dtype=compute_dtype(query)))


def backward_setup(ctx, inputs, output) -> None:
    grad, grad_log_sum, _, _, *tensors, ctx.dropout_p, ctx.scale, ctx.left, ctx.right, ctx.bias_grad = inputs
    ctx.save_for_backward(grad, grad_log_sum, *tensors)
    ctx.set_materialize_grads(False)


def backward_backward(ops, ctx, needs, *cotangents):
    """Exact, of any order, by tensor operations on one tile of queries after the other.

    Memory: about ten tensors of TILE_ELEMENTS elements, or of one query per head where that is more.
    """
    grad, grad_log_sum, query, key, value, bias, mask, key_lengths, seed = ctx.saved_tensors
    u_query, u_key, u_value, u_bias = cotangents
    u_bias = u_bias if ctx.bias_grad else None
    scale = max(query.shape[3], 1) ** -0.5 if ctx.scale is None else ctx.scale
    wide = Wide(query, key)
    q, k, v, g, u_q, u_k, u_v = (wide(t) for t in (query, key, value, grad, u_query, u_key, u_value))
    b, u_b, g_log_sum = wide.bias(bias), wide.bias(u_bias), wide(_column(grad_log_sum))
    sums = {name: 0 for name in ("k", "v", "b")}
    rows = {name: [] for name in ("g", "g_log_sum", "q")}
    for tile in wide.tiles():
        row = lambda t, tile=tile: t if t is None or t.shape[-2] == 1 else t[..., tile, :]  # noqa: E731
        q_, g_, u_q_, b_, u_b_, g_log_sum_ = map(row, (q, g, u_q, b, u_b, g_log_sum))
        visible = wide.visible(tile, b_, mask, key_lengths, ctx.left, ctx.right)
        seen = visible.any(-2, keepdim=True).transpose(-1, -2)
        k_, v_ = k.masked_fill(~seen, 0), v.masked_fill(~seen, 0)
        p = _weights(scale * q_ @ _t(k_), b_, visible)
        f = wide.dropout(tile, seed, ctx.dropout_p)
        y = (g_ @ _t(v_)) * f
        delta = (p * y).sum(-1, keepdim=True)
        if g_log_sum_ is not None:
            delta = delta - g_log_sum_
        ds = p * (y - delta)
        u = p.new_zeros(())
        if u_q is not None:
            u = u + scale * u_q_ @ _t(k_)
        if u_k is not None:
            u = u + scale * q_ @ _t(u_k)
        if u_b_ is not None:
            u = u + u_b_
        r = (p * u).sum(-1, keepdim=True)
        e = p * (u - r) * f  # gradient of g v^T
        x = u * (y - delta) - r * y  # gradient of P
        if u_v is not None:
            x = x + g_ @ _t(u_v) * f
        s = p * (x - (p * x).sum(-1, keepdim=True))  # gradient of S
        rows["g"].append(e @ v_ if u_v is None else e @ v_ + (p * f) @ u_v)
        rows["g_log_sum"].append(r)
        rows["q"].append(scale * (s @ k_ if u_k is None else s @ k_ + ds @ u_k))
        sums["v"] = sums["v"] + _t(e) @ g_
        sums["k"] = sums["k"] + scale * (_t(s) @ q_ if u_q is None else _t(s) @ q_ + _t(ds) @ u_q_)
        if needs[7]:
            sums["b"] = sums["b"] + wide.bias_rows(s, b, tile)
    grad_g, grad_q = (wide.back(torch.cat(rows[name], -2), query) for name in ("g", "q"))
    grad_g_log_sum = None if grad_log_sum is None else torch.cat(rows["g_log_sum"], -2).flatten(1, 2).squeeze(-1)
    grad_k, grad_v = (wide.back(sums[name].sum(2, keepdim=True), key) for name in ("k", "v"))
    grad_bias = sums["b"].reshape(bias.shape).to(bias.dtype) if needs[7] else None
    return (grad_g, grad_g_log_sum, None, None, grad_q, grad_k, grad_v, grad_bias, *(None for _ in needs[8:]))


TILE_ELEMENTS = 2**20


class Wide:
    """Operands in the compute dtype with the heads as [Hk, H / Hk], and the tiles of queries that are worked on."""

    def __init__(self, query: Tensor, key: Tensor):
        self.dtype, self.device = compute_dtype(query), query.device
        self.batch, self.heads, self.queries, _ = query.shape
        self.key_heads, self.keys = key.shape[1:3]

    def __call__(self, tensor: Tensor | None) -> Tensor | None:
        """[B, H or Hk, *] as [B, Hk, H / Hk or 1, *]."""
        return None if tensor is None else tensor.to(self.dtype).unflatten(1, (self.key_heads, -1))

    def bias(self, tensor: Tensor | None) -> Tensor | None:
        """[B or 1, H or 1, L or 1, S or 1] as [B or 1, Hk or 1, H / Hk or 1, L or 1, S or 1]; of a mask as well."""
        if tensor is None:
            return None
        tensor = tensor if tensor.dtype == torch.bool else tensor.to(self.dtype)
        return tensor.unsqueeze(1) if tensor.shape[1] == 1 else tensor.unflatten(1, (self.key_heads, -1))

    def back(self, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.flatten(1, 2).to(like.dtype)

    def tiles(self) -> Iterator[slice]:
        step = max(1, TILE_ELEMENTS // max(1, self.batch * self.heads * self.keys))
        return (slice(i, min(i + step, self.queries)) for i in range(0, max(1, self.queries), step))

    def places(self, tile: slice) -> tuple[Tensor, Tensor]:
        """Query numbers as a column, key numbers as a row."""
        i = torch.arange(tile.start, tile.stop, device=self.device)[:, None]
        return i, torch.arange(self.keys, device=self.device)

    def visible(self, tile, bias, mask, key_lengths, left, right) -> Tensor:
        i, j = self.places(tile)
        visible = (j >= i - left) & (j <= i + right)
        if key_lengths is not None:
            visible = visible & (j < key_lengths.reshape(-1, 1, 1, 1, 1))
        if mask is not None:
            mask = self.bias(mask)
            visible = visible & (mask if mask.shape[-2] == 1 else mask[..., tile, :])
        return visible if bias is None else visible & (bias != -torch.inf)

    def dropout(self, tile: slice, seed: Tensor | None, dropout_p: float) -> Tensor | float:
        if dropout_p == 0:
            return 1.0
        head = torch.arange(self.batch * self.heads, device=self.device)
        kept_ = kept(seed, dropout_p, head.reshape(self.batch, self.key_heads, -1, 1, 1), *self.places(tile))
        return kept_.to(self.dtype) / (1 - dropout_p) if dropout_p < 1 else kept_.to(self.dtype) * 0

    def bias_rows(self, gradient: Tensor, bias: Tensor, tile: slice) -> Tensor:
        """The tile's gradient of S as a gradient of the bias: rows of it, or a share of all where it has one row."""
        if bias.shape[-2] == 1:
            return gradient.sum_to_size(bias.shape)
        gradient = gradient.sum_to_size(*bias.shape[:-2], tile.stop - tile.start, bias.shape[-1])
        return torch.nn.functional.pad(gradient, (0, 0, tile.start, bias.shape[-2] - tile.stop))


def _weights(scores: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    """softmax over the visible keys; 0 for a query that sees none."""
    if bias is not None:
        scores = scores + bias.masked_fill(bias == -torch.inf, 0)
    sees = visible.any(-1, keepdim=True)
    return scores.masked_fill(~visible & sees, -torch.inf).softmax(-1).masked_fill(~visible, 0)


def _t(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2)


def _column(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(-1)


# Dropout: the twin of csrc/cpu/kernels/attention_dropout.h, 32-bit arithmetic in int64.


def kept(seed: Tensor, dropout_p: float, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which weights are not dropped; head is b * H + h. bool, broadcast over head, query and key."""
    low, high = seed & _BITS, (seed >> 32) & _BITS
    first = _mixed(_mixed(low + _mixed(high)) + _mixed(head))
    second = _mixed(first ^ _GOLDEN_RATIO)
    x = _mixed(first + query) + key * _GOLDEN_RATIO & _BITS
    x = (x ^ (x >> 16)) * 0x7FEB352D & _BITS
    x = ((x ^ (x >> 15)) + _mixed(second + query)) * 0x846CA68B & _BITS
    return (x ^ (x >> 16)) >= int(min(dropout_p * 2**32, 2**32 - 1))


_BITS, _GOLDEN_RATIO = 0xFFFFFFFF, 0x9E3779B9


def _mixed(x: Tensor) -> Tensor:
    x = x & _BITS
    x = (x ^ (x >> 16)) * 0x7FEB352D & _BITS
    x = (x ^ (x >> 15)) * 0x846CA68B & _BITS
    return x ^ (x >> 16)


# vmap's batch dimension becomes part of B. Dropout then differs from sample to sample.


def _folded(size: int, batch: int, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """[size * B, ...] from a tensor [B or 1, ...] with vmap's dimension at `dim` or (None) without one."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def _unfolded(size: int, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(t.unflatten(0, (size, -1)) for t in tensors), tuple(0 for _ in tensors)


def attention_vmap(ops, info, in_dims, *args):
    *tensors, seed, dropout_p, scale, left, right = args
    batch = _batch(tensors[0], in_dims[0])
    folded = (_folded(info.batch_size, batch, t, d) for t, d in zip(tensors, in_dims, strict=False))
    seed = _one_seed(seed, in_dims[len(tensors)])
    return _unfolded(info.batch_size, ops.attention(*folded, seed, dropout_p, scale, left, right))


def backward_vmap(ops, info, in_dims, *args):
    *tensors, seed, dropout_p, scale, left, right, bias_grad = args
    batch = _batch(tensors[0], in_dims[0])
    folded = (_folded(info.batch_size, batch, t, d) for t, d in zip(tensors, in_dims, strict=False))
    seed = _one_seed(seed, in_dims[len(tensors)])
    grads = ops.attention_backward(*folded, seed, dropout_p, scale, left, right, bias_grad)
    grads, dims = _unfolded(info.batch_size, grads)
    if bias_grad:
        bias, dim = tensors[7], in_dims[7]
        rows = (bias if dim is None else bias.movedim(dim, 0)[0]).shape[0]
        grads = (*grads[:3], grads[3].sum(1, keepdim=True) if rows == 1 else grads[3])
    return grads, dims


def _batch(tensor: Tensor, dim: int | None) -> int:
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def _one_seed(seed: Tensor | None, dim: int | None) -> Tensor | None:
    """Places differ between the samples of a vmap, so one seed draws for all of them."""
    return seed if seed is None or dim is None else seed.movedim(dim, 0)[0]


register(
    [
        Card(
            f"attention({_SHARED}) -> (Tensor, Tensor)",
            attention_fake, attention_setup, attention_backward, attention_vmap,
        ),
        Card(
            "attention_backward(Tensor grad_output, Tensor? grad_log_sum, Tensor output, Tensor log_sum, "
            f"{_SHARED}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
            backward_fake, backward_setup, backward_backward, backward_vmap, casts=False,
        ),
    ]
)  # fmt: skip

# Of query, key and value of one size, without a window's left side, for results without derivatives.
PLAIN_ATTENTION = kernel("attention.plain(Tensor query, Tensor key, Tensor value, float? scale, int right) -> Tensor")
