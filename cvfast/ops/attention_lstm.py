"""attention_lstm: a captioner's decoder, a step or all of them as one operator of the compiled libraries.

keys [B, S, A], values [B, S, K], h and c [B, H], mask bool [B, S], w_query [A, H], v [A] (None: dot products scaled by
1 / sqrt(A)), w_ih [4 H, I + K], w_hh [4 H, H], biases [4 H]; float32 or float64. All steps have a derivative, another
operator. Tracers and transforms see the decoder's parts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from cvfast.ops.card import kernel
from cvfast.ops.recurrent import step, vjp

_OPERANDS = (
    "Tensor input, Tensor keys, Tensor values, Tensor h, Tensor c, Tensor? mask, Tensor w_query, Tensor{} v, "
    "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
)
# One step, input [B, I] -> h, c, context [B, K], weights [B, S].
STEP = kernel(f"attention_lstm_cell({_OPERANDS.format('?')}) -> (Tensor, Tensor, Tensor, Tensor)")
# All of them, input [T, B, I] -> states [T + 1, B, H] from h on, the last c, rows [T, B, I + K] of input and context,
# weights [T, B, S]; and, for the derivative, queries [T, B, A] and saved [T, B, 5 H] ([0] without).
_forward = kernel(
    f"attention_lstm({_OPERANDS.format('?')}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Gradients of rows, keys, values, states, c, w_query, v (of each sample), w_ih, w_hh and of either bias [4 H, 1].
_backward = kernel(
    "attention_lstm_backward(Tensor grad_states, Tensor grad_c, Tensor grad_rows, Tensor grad_weights, "
    f"{_OPERANDS.format('')}, Tensor states, Tensor rows, Tensor weights, Tensor queries, Tensor saved) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _AttentionLSTM(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, *operands):
        states, c, rows, weights, *kept = _forward(*operands, True)
        ctx.save_for_backward(*operands, states, rows, weights, *kept)
        return states, c, rows, weights

    @staticmethod
    def backward(ctx, *grads):
        operands, results = ctx.saved_tensors[:12], ctx.saved_tensors[12:]
        gradients = _unrolled_gradients if torch.is_grad_enabled() else _gradients
        found = gradients(grads, operands, results)
        return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=True))


def _gradients(grads, operands, results) -> tuple[Tensor | None, ...]:
    rows, keys, values, states, c, w_query, v, w_ih, w_hh, bias = _backward(*grads, *operands, *results)
    bias = bias.squeeze(1)
    input = rows[..., : operands[0].shape[2]]
    return input, keys, values, states[0], c, None, w_query, v.sum(0), w_ih, w_hh, bias, bias.clone()


def _unrolled_gradients(grads, operands, _) -> list[Tensor | None]:
    """Gradients that are differentiable themselves."""
    places = [i for i, t in enumerate(operands) if t is not None and t.is_floating_point()]

    def definition(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, values, strict=True))
        return unrolled(*(given.get(i, t) for i, t in enumerate(operands)))

    _, pull = vjp(definition, *(operands[i] for i in places))
    found = dict(zip(places, pull(grads), strict=True))
    return [found.get(i) for i in range(len(operands))]


def unrolled(input, keys, values, h, c, mask, w_query, v, w_ih, w_hh, b_ih, b_hh) -> tuple[Tensor, ...]:
    """states, c, rows and weights in torch's operators; v is given."""
    linear = torch.nn.functional.linear
    states, rows, looks = [h], [], []
    if mask is not None:
        sees = mask.any(1, keepdim=True)
        values = values.masked_fill(~(mask & sees).unsqueeze(-1), 0)
    for x in input:
        scores = torch.tanh(linear(h, w_query)[:, None] + keys) @ v
        if mask is None:
            weights = scores.softmax(-1)
        else:
            weights = scores.masked_fill(~mask & sees, -torch.inf).softmax(-1).masked_fill(~mask, 0)
        row = torch.cat((x, (weights.unsqueeze(1) @ values).squeeze(1)), 1)
        h, c = step("lstm", linear(row, w_ih, b_ih), linear(h, w_hh, b_hh), h, c)
        states.append(h), rows.append(row), looks.append(weights)
    return torch.stack(states), c, torch.stack(rows), torch.stack(looks)


def attention_lstm(input: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
    """Output [T, B, H], the last c, contexts [T, B, K] and weights [T, B, S]; differentiable with additive scores."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, *operands):
        states, c, rows, weights = _AttentionLSTM.apply(input, *operands)
    else:
        states, c, rows, weights, *_ = _forward(input, *operands, False)
    return states[1:], c, rows[..., input.shape[2] :], weights
