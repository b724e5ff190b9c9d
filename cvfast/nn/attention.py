"""Attention layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvfast import functional
from cvfast.nn.leaf import is_recorded, node
from cvfast.nn.recurrent import LSTMCell


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on cvfast's kernels: the same arguments, parameters, state_dict and repr.

    Without weights (`need_weights=False`) memory grows with L + S. The weights that are returned are [N, L, S] or
    [N, heads, L, S] by definition; averaged ones take no more than that where they need no gradient. A query whose keys
    are all masked gets 0 from the attention (then the output projection's bias), weights 0 and gradients 0, where torch
    gives NaN.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, result and errors as torch.nn.MultiheadAttention's; masks are True (or -inf) where hidden."""
        if is_recorded(self, query):
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return node(self, query, key, value, *masks)
        plain = key_padding_mask is None and attn_mask is None and not (need_weights or is_causal)
        if plain and query is key is value:
            output = self._in_one_call(query)
            if output is not None:
                return output, None
        batched = torch.nn.functional._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if is_causal:
            attn_mask = None  # the hint says that it is the causal mask
        samples = 0 if self.batch_first else 1
        if not batched:
            query, key, value = (t.unsqueeze(samples) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value)
        k, v, appended = self._append_keys(k, v)
        q, k, v = (self._heads(t) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, appended, q)
        window = (None, 0) if is_causal else None
        dropout = self.dropout if self.training else 0.0
        derives = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if need_weights and (derives or dropout > 0 or not average_attn_weights):
            weights = torch.nn.functional.dropout(_weights(q, k, mask, is_causal), dropout)
            output = weights @ v
        else:
            output = functional.scaled_dot_product_attention(q, k, v, mask, dropout, window=window)
            weights = None
        output = output.permute(0, 2, 1, 3) if self.batch_first else output.permute(2, 0, 1, 3)
        output = functional.linear(output.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        elif need_weights and weights is None:
            weights = functional.attention_statistics(q, k, mask, window=window, mean_weights=True).mean_weights
        if not batched:
            output = output.squeeze(samples)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _in_one_call(self, input: Tensor) -> Tensor | None:
        """Plain inference of self-attention; None where the steps have to be taken."""
        if not self._is_one_call() or input.dim() != 3 or input.shape[2] != self.embed_dim:
            return None
        out = self.out_proj
        weights = (self.in_proj_weight, self.in_proj_bias, out.weight, out.bias)
        return functional.self_attention(input, *weights, self.num_heads)

    def _is_one_call(self) -> bool:
        """Whether `_in_one_call` may do what this layer does, as far as its options say."""
        return (
            not torch.is_grad_enabled()
            and self._qkv_same_embed_dim
            and self.batch_first
            and self.bias_k is None
            and not self.add_zero_attn
            and not (self.training and self.dropout > 0)
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections, each of embed_dim; one product where all three inputs are the same tensor."""
        linear = functional.linear
        if self._qkv_same_embed_dim and query is key and key is value:
            return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return tuple(linear(*args) for args in zip((query, key, value), weights, biases, strict=True))

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with the learned key (add_bias_kv) and the zero key (add_zero_attn), and how many those are."""
        length = 1 if self.batch_first else 0
        more = [(self.bias_k, self.bias_v)] if self.bias_k is not None else []
        if self.add_zero_attn:
            zero = k.new_zeros(1, 1, self.embed_dim)
            more.append((zero, zero))
        if not more:
            return k, v, 0
        size = list(k.shape)
        size[length] = 1
        k = torch.cat([k, *(extra.expand(size) for extra, _ in more)], length)
        v = torch.cat([v, *(extra.expand(size) for _, extra in more)], length)
        return k, v, len(more)

    def _heads(self, tensor: Tensor) -> Tensor:
        """[N, L, E] (batch_first) or [L, N, E] as a view [N, heads, L, head_dim]."""
        tensor = tensor.unflatten(-1, (self.num_heads, self.head_dim))
        return tensor.permute(0, 2, 1, 3) if self.batch_first else tensor.permute(1, 2, 0, 3)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, appended: int, q: Tensor) -> Tensor | None:
        """Both masks as one for scaled_dot_product_attention: bool (True: seen) or added; appended keys are seen."""
        if attn_mask is not None:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
        if padding is not None:
            padding = padding[:, None, None]
        merged = None
        for mask in (attn_mask, padding):
            if mask is None:
                continue
            mask = torch.nn.functional.pad(mask, (0, appended)) if appended else mask
            mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
            merged = mask if merged is None else _merged(merged, mask)
        return merged


class AdditiveAttention(torch.nn.Module):
    """Bahdanau's additive attention: cvfast.functional.additive_attention with its three weights as parameters.

    Args: query_size Q, key_size K, size A (of the features in which they are compared).
    Input query [B, T, Q] or [B, Q], keys [B, S, K], values [B, S, E] (default: the keys), mask bool [B, S] or
    [B, T, S]; output (context, weights). For many steps over the same keys, project them once with `project_keys` and
    give the result as `projected_keys`.
    """

    def __init__(self, query_size: int, key_size: int, size: int, device=None, dtype=None) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.query_size, self.key_size, self.size = query_size, key_size, size
        self.w_query = torch.nn.Parameter(torch.empty(size, query_size, **options))
        self.w_key = torch.nn.Parameter(torch.empty(size, key_size, **options))
        self.v = torch.nn.Parameter(torch.empty(size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's uniform for the projections, uniform within 1 / sqrt(A) for v."""
        torch.nn.init.xavier_uniform_(self.w_query)
        torch.nn.init.xavier_uniform_(self.w_key)
        torch.nn.init.uniform_(self.v, -(self.size**-0.5), self.size**-0.5)

    def project_keys(self, keys: Tensor) -> Tensor:
        """[B, S, A] from keys [B, S, K]."""
        return functional.linear(keys, self.w_key)

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None = None,
        mask: Tensor | None = None,
        projected_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if is_recorded(self, query):
            return node(self, query, keys, values, mask, projected_keys)
        values = keys if values is None else values
        if projected_keys is not None:
            return functional.additive_attention(query, projected_keys, values, self.w_query, None, self.v, mask)
        return functional.additive_attention(query, keys, values, self.w_query, self.w_key, self.v, mask)

    def extra_repr(self) -> str:
        return f"{self.query_size}, {self.key_size}, {self.size}"


class AttentionLSTMCell(torch.nn.Module):
    """One decode step of a captioner: attention by h, then an LSTM cell on [input, context].

    score: "additive" (AdditiveAttention of attention_size features) or "dot" (h projected to the keys' size, scaled by
    1 / sqrt(K)). Input [B, I], keys [B, S, K] (also the values), state (h, c) of [B, H] each, mask bool [B, S];
    output (h, c, context [B, K], weights [B, S]). Raises ValueError for another score.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        key_size: int,
        attention_size: int | None = None,
        score: str = "additive",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        if score == "additive":
            size = hidden_size if attention_size is None else attention_size
            self.attention = AdditiveAttention(hidden_size, key_size, size, **options)
        elif score == "dot":
            self.attention = torch.nn.Linear(hidden_size, key_size, bias=False, **options)
        else:
            raise ValueError(f"AttentionLSTMCell: unknown score {score!r}; allowed: additive, dot")
        self.score = score
        self.cell = LSTMCell(input_size + key_size, hidden_size, **options)

    def project_keys(self, keys: Tensor) -> Tensor | None:
        """What forward takes as projected_keys: [B, S, A] for additive scores, nothing for dot products."""
        return self.attention.project_keys(keys) if self.score == "additive" else None

    def forward(
        self,
        input: Tensor,
        keys: Tensor,
        state: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        projected_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if is_recorded(self, input):
            return node(self, input, keys, state, mask, projected_keys)
        return self._run(functional.attention_lstm_cell, input, keys, state, mask, projected_keys)

    def unroll(
        self,
        input: Tensor,
        keys: Tensor,
        state: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        projected_keys: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """All steps of input [B, T, I]: output [B, T, H], (h, c) at the end, contexts [B, T, K], weights [B, T, S]."""
        projected_keys = self.project_keys(keys) if projected_keys is None else projected_keys
        return self._run(functional.attention_lstm, input, keys, state, mask, projected_keys)

    def _run(self, function: Callable, input: Tensor, keys: Tensor, state, mask, projected_keys) -> tuple:
        attention, cell = self.attention, self.cell
        if self.score == "dot":
            w_query, v, options = attention.weight, None, {}
        else:
            w_query, v = attention.w_query, attention.v
            options = {"w_key": attention.w_key} if projected_keys is None else {"projected_keys": projected_keys}
        cell_weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        return function(input, keys, state, w_query, v, *cell_weights, mask, **options)


def _merged(first: Tensor, second: Tensor) -> Tensor:
    """One mask that says what both say; each is bool (True: seen) or added to the scores."""
    if first.dtype == second.dtype:
        return first & second if first.dtype == torch.bool else first + second
    added, seen = (second, first) if first.dtype == torch.bool else (first, second)
    return torch.where(seen, added, -torch.inf)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) over the keys that are seen, [N, heads, L, S]; 0 where none is."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is None and not is_causal:
        return scores.softmax(-1)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if is_causal:
        seen = seen.tril()
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        seen = seen & (mask != -torch.inf)
        scores = scores + mask.masked_fill(mask == -torch.inf, 0)
    some = seen.any(-1, keepdim=True)
    return scores.masked_fill(~seen & some, -torch.inf).softmax(-1).masked_fill(~seen, 0)
