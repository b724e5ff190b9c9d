"""Recurrent layers as their equations say: step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvfast.reference.linear import linear


def lstm(input, hx, params, has_biases=True, num_layers=1, dropout=0.0, train=False, bidirectional=False,
         batch_first=False, *, lengths=None):  # fmt: skip
    """As cvfast.functional.lstm, without dropout and PackedSequence; differentiable by autograd to every order."""
    return layers(_lstm_step, input, hx, params, has_biases, num_layers, bidirectional, batch_first, lengths)


def gru(input, hx, params, has_biases=True, num_layers=1, dropout=0.0, train=False, bidirectional=False,
        batch_first=False, *, lengths=None):  # fmt: skip
    """As cvfast.functional.gru; see lstm."""
    return layers(_gru_step, input, (hx,), params, has_biases, num_layers, bidirectional, batch_first, lengths)


def rnn(input, hx, params, has_biases=True, num_layers=1, dropout=0.0, train=False, bidirectional=False,
        batch_first=False, *, nonlinearity="tanh", lengths=None):  # fmt: skip
    """As cvfast.functional.rnn; see lstm."""
    step = _relu_step if nonlinearity == "relu" else _tanh_step
    return layers(step, input, (hx,), params, has_biases, num_layers, bidirectional, batch_first, lengths)


def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """As cvfast.functional.lstm_cell."""
    return _lstm_step(linear(input, w_ih, b_ih), linear(hx[0], w_hh, b_hh), hx)


def gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """As cvfast.functional.gru_cell."""
    return _gru_step(linear(input, w_ih, b_ih), linear(hx, w_hh, b_hh), (hx,))[0]


def rnn_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None, *, nonlinearity="tanh"):
    """As cvfast.functional.rnn_cell."""
    step = _relu_step if nonlinearity == "relu" else _tanh_step
    return step(linear(input, w_ih, b_ih), linear(hx, w_hh, b_hh), (hx,))[0]


def layers(step, input, hx, params, has_biases, num_layers, bidirectional, batch_first, lengths) -> tuple[Tensor, ...]:
    """A stack of layers of one cell: (output, h_n, ...)."""
    if input.dim() == 2:
        hx = [s[:, None] for s in hx]
        return tuple(r[:, 0] for r in layers(step, input[:, None], hx, params, has_biases, num_layers, bidirectional,
                                             False, lengths))  # fmt: skip
    if batch_first:
        output, *states = layers(step, input.transpose(0, 1), hx, params, has_biases, num_layers, bidirectional, False,
                                 lengths)  # fmt: skip
        return output.transpose(0, 1), *states
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    finals = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            weights = _named(params[i * each : (i + 1) * each], has_biases)
            output, final = one_layer(step, input, [s[i] for s in hx], weights, direction == 1, lengths)
            outputs.append(output)
            finals.append(final)
        input = torch.cat(outputs, -1)
    return input, *(torch.stack(s) for s in zip(*finals, strict=True))


def _named(weights: Sequence[Tensor], has_biases: bool) -> tuple[Tensor | None, ...]:
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    projection = rest[2:] if has_biases else rest
    return w_ih, w_hh, b_ih, b_hh, projection[0] if projection else None


def one_layer(step, input, states, weights, reverse, lengths) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output [T, B, O] (0 beyond a sample's length) and final states of one layer and direction."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    steps, batch, _ = input.shape
    lengths = torch.full((batch,), steps) if lengths is None else torch.as_tensor(lengths)
    x = linear(input, w_ih, b_ih)
    nothing = sum(t.flatten()[:0].sum() for t in (x, w_hh, b_hh, w_hr) if t is not None)  # connects what no step uses
    state = tuple(s + nothing for s in states)
    outputs = [state[0]] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        h, *rest = step(x[t], linear(state[0], w_hh, b_hh), state)
        after = (h if w_hr is None else h @ w_hr.T, *rest)
        runs = (t < lengths)[:, None]
        state = tuple(torch.where(runs, a, s) for a, s in zip(after, state, strict=True))
        outputs[t] = torch.where(runs, after[0], 0.0)
    return torch.stack(outputs) if steps else state[0].new_zeros(0, *state[0].shape) + nothing, state


def _lstm_step(x: Tensor, r: Tensor, state) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + r).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(x: Tensor, r: Tensor, state) -> tuple[Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), r.chunk(3, -1)
    reset, update = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    new = torch.tanh(x_n + reset * h_n)
    return ((1 - update) * new + update * state[0],)


def _tanh_step(x: Tensor, r: Tensor, state) -> tuple[Tensor]:
    return (torch.tanh(x + r),)


def _relu_step(x: Tensor, r: Tensor, state) -> tuple[Tensor]:
    return (torch.relu(x + r),)
