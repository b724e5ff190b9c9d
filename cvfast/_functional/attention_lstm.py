"""attention_lstm_cell, a decode step, and attention_lstm, all of them: by one kernel call where there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast import backend as _backend
from cvfast._functional.additive_attention import additive_attention
from cvfast._functional.recurrent import lstm_cell


def attention_lstm_cell(
    input: Tensor,
    keys: Tensor,
    state: tuple[Tensor, Tensor],
    w_query: Tensor,
    v: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    w_key: Tensor | None = None,
    projected_keys: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One decode step of a captioner: attention over the keys by h, then an LSTM cell on [input, context].

    Scores are v . tanh(w_query h + w_key key) (Bahdanau et al. 2015), or, with v None, (w_query h) . key / sqrt(K).
    Keys that the mask hides have weight 0 and take no part. Without derivatives, in float32 and float64 on the CPU,
    with keys projected before or dot products, the whole step is one call of the compiled kernels.

    Args:
        input: [B, I]; keys: [B, S, K], also the values; state: (h, c), [B, H] each.
        w_query: [A, H] (dot products: A = K); v: [A] or None.
        w_ih: [4 H, I + K]; w_hh: [4 H, H]; b_ih, b_hh: [4 H] or None, as torch.nn.LSTMCell's.
        mask: bool [B, S], True where the key is seen.
        w_key: [A, K], or projected_keys: [B, S, A], w_key times the keys, made once for many steps. With v None
            neither.
        backend: "auto", "ext", "triton" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        (h [B, H], c [B, H], context [B, K], weights [B, S]).

    Raises:
        RuntimeError: shapes or dtypes that do not fit; or the named backend cannot run.
        ValueError: neither or both of w_key and projected_keys with v, or one of them without; an unknown backend.
    """
    _check_scores("attention_lstm_cell", v, w_key, projected_keys)
    h, c = state
    if w_key is None:
        features = keys if v is None else projected_keys
        operands = (input, features, keys, h, c, mask, w_query, v, w_ih, w_hh, b_ih, b_hh)
        results = _in_one_call("lstm_step", "attention_lstm_cell", "input [B, I]", operands, backend)
        if results is not None:
            return results
    if v is None:
        context, weights = _dot_attention(torch.nn.functional.linear(h, w_query), keys, mask)
    else:
        by_keys = keys if projected_keys is None else projected_keys
        context, weights = additive_attention(h, by_keys, keys, w_query, w_key, v, mask, backend=backend)
    h, c = lstm_cell(torch.cat((input, context), -1), (h, c), w_ih, w_hh, b_ih, b_hh, backend=backend)
    return h, c, context, weights


def attention_lstm(
    input: Tensor,
    keys: Tensor,
    state: tuple[Tensor, Tensor],
    w_query: Tensor,
    v: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    projected_keys: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """`attention_lstm_cell` over a sequence whose words are known (teacher forcing).

    In float32 and float64 on the CPU all steps are one call of the compiled kernels, with additive scores the
    derivative as well: gradients of weights are products over all steps.

    Args:
        input: [B, T, I], T > 0; all else as in `attention_lstm_cell`, keys projected before.

    Returns:
        (output [B, T, H], (h, c) after the last step, contexts [B, T, K], weights [B, T, S]).

    Raises:
        RuntimeError, ValueError: as `attention_lstm_cell`.
    """
    _check_scores("attention_lstm", v, None, projected_keys)
    if input.dim() != 3 or input.shape[1] == 0:
        raise RuntimeError(f"attention_lstm: expected input [B, T, I] with T > 0, but got {list(input.shape)}")
    features = keys if v is None else projected_keys
    operands = (input.transpose(0, 1), features, keys, *state, mask, w_query, v, w_ih, w_hh, b_ih, b_hh)
    results = _in_one_call("lstm_steps", "attention_lstm", "input [T, B, I]", operands, backend)
    if results is not None:
        output, c, contexts, weights = results
        return output.transpose(0, 1), (output[-1], c), contexts.transpose(0, 1), weights.transpose(0, 1)
    steps = []
    for x in input.unbind(1):
        *state, context, weights = attention_lstm_cell(
            x, keys, state, w_query, v, w_ih, w_hh, b_ih, b_hh, mask, projected_keys=projected_keys, backend=backend
        )
        steps.append((state[0], context, weights))
    output, contexts, weights = (torch.stack(of_steps, 1) for of_steps in zip(*steps, strict=True))
    return output, tuple(state), contexts, weights


def _check_scores(name: str, v: Tensor | None, w_key: Tensor | None, projected_keys: Tensor | None) -> None:
    if (w_key is not None) + (projected_keys is not None) != (v is not None):
        raise ValueError(
            f"{name}: additive scores take w_key or projected_keys, dot products neither, but got "
            f"w_key {_size(w_key)}, projected_keys {_size(projected_keys)} and v {_size(v)}"
        )


def _in_one_call(
    kernel: str, name: str, input: str, operands: tuple[Tensor | None, ...], backend: str | None
) -> tuple[Tensor, ...] | None:
    """The results of the chosen backend's `kernel`; None where it has none for these operands."""
    _, features, keys, h, _, mask, w_query, v, *_ = operands
    chosen = _backend.select("additive_attention", backend, h.unsqueeze(1), features, keys, w_query, None, v, mask)
    run = getattr(chosen, kernel, None)
    try:
        return None if run is None else run(*operands)
    except RuntimeError as error:  # kernels refuse what does not fit; asking before each call would take longer
        raise RuntimeError(_misfit(name, input, *operands)) from error


def _dot_attention(query: Tensor, keys: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Context [B, K] and weights [B, S] of query [B, K] with keys [B, S, K]."""
    scores = (keys @ (query * keys.shape[-1] ** -0.5).unsqueeze(-1)).squeeze(-1)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        keys = keys.masked_fill(~mask.unsqueeze(-1), 0)
        some = mask.any(-1, keepdim=True)
        weights = scores.masked_fill(~mask & some, -torch.inf).softmax(-1).masked_fill(~mask, 0)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _misfit(name: str, input: str, *tensors: Tensor | None) -> str:
    names = (
        f"{input}, keys as compared [B, S, A], keys [B, S, K], h [B, H], c [B, H], mask bool [B, S], "
        "w_query [A, H], v [A], w_ih [4 H, I + K], w_hh [4 H, H], b_ih [4 H], b_hh [4 H]"
    )
    found = ", ".join("None" if t is None else f"{t.dtype} {list(t.shape)}" for t in tensors)
    return f"{name}: expected, in one dtype, {names}, but got {found}"


def _size(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
