"""attention_lstm_cell: a decode step as one operator of the compiled libraries, without derivatives.

input [B, I], keys [B, S, A], values [B, S, K], h and c [B, H], mask bool [B, S], w_query [A, H], v [A] (None: dot
products scaled by 1 / sqrt(A)), w_ih [4 H, I + K], w_hh [4 H, H], biases [4 H] -> h, c, context [B, K], weights [B, S].
"""

from __future__ import annotations

from cvfast.ops.card import kernel

STEP = kernel(
    "attention_lstm_cell(Tensor input, Tensor keys, Tensor values, Tensor h, Tensor c, Tensor? mask, Tensor w_query, "
    "Tensor? v, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh) -> (Tensor, Tensor, Tensor, Tensor)"
)
