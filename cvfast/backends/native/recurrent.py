"""lstm, gru and rnn by torch's own operators; a call is cvfast._functional.recurrent.Call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cvfast.ops.recurrent import Variation, unrolled


def why_not(call) -> list[str]:
    """Never refuses."""
    return []


def why_slower(call) -> list[str]:
    """Nothing is left to be taken instead."""
    return []


def run(call) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n or None); what torch refuses (no steps, samples without steps) is made of what it takes."""
    if call.varies:
        return _varied(call)
    states = (call.h_0,) if call.c_0 is None else (call.h_0, call.c_0)
    if call.lengths is not None:
        output, states = _with_lengths(call, states)
    elif call.batch_sizes is not None:
        output, *states = _torchs(call, (call.input, call.batch_sizes), states)
    elif call.input.shape[0] * call.input.shape[1] == 0:
        output, states = _nothing(call, states)
    else:
        output, *states = _torchs(call, (call.input,), states)
    return output, states[0], states[1] if len(states) > 1 else None


def _varied(call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Beside torch's definition: step by step."""
    output, states = call.input, []
    for layer in range(len(call.weights) // call.directions):
        output = torch.nn.functional.dropout(output, call.dropout) if layer > 0 else output
        parts = []
        for direction in range(call.directions):
            i = layer * call.directions + direction
            c_0 = None if call.c_0 is None else call.c_0[i]
            part, *state = unrolled(
                call.cell, output, call.lengths, call.batch_sizes, call.h_0[i], c_0, *call.weights[i], direction == 1,
                _variation(call, i),
            )  # fmt: skip
            parts.append(part)
            states.append(state[: 1 if c_0 is None else 2])
        output = torch.cat(parts, -1)
    h_n, *c_n = (torch.stack(s) for s in zip(*states, strict=True))
    return output, h_n, c_n[0] if c_n else None


def _variation(call, i: int) -> Variation:
    """Of layer and direction i; its mask is drawn here."""
    mask, norms = None, (None, None) if call.norms is None else (call.norms[i][:3], call.norms[i][3:])
    if call.recurrent_dropout > 0:
        mask = torch.nn.functional.dropout(torch.ones_like(call.h_0[i]), call.recurrent_dropout)
    bias = norms[1][0] if norms[1] else None
    return Variation(mask, norms[0], bias, *call.zoneout, call.train)


def _torchs(call, input: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = [t for w in call.weights for t in (w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.w_hr) if t is not None]
    last = (False,) if len(input) == 1 else ()  # batch_first
    return getattr(torch, call.cell)(
        *input, states if len(states) > 1 else states[0], weights, call.weights[0].b_ih is not None,
        len(call.weights) // call.directions, call.dropout, call.dropout > 0, call.directions == 2, *last,
    )  # fmt: skip


def _with_lengths(call, states: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """The samples that have steps as a packed sequence; the others keep their states."""
    present = torch.nonzero(call.lengths).squeeze(1).to(call.input.device)
    if len(present) == 0:
        return _nothing(call, states)
    lengths = call.lengths[present.cpu()]
    packed = pack_padded_sequence(call.input.index_select(1, present), lengths, enforce_sorted=False)
    order = present.index_select(0, packed.sorted_indices)
    result, *ends = _torchs(call, (packed.data, packed.batch_sizes), tuple(s.index_select(1, order) for s in states))
    padded, _ = pad_packed_sequence(packed._replace(data=result), total_length=call.input.shape[0])
    output = padded.new_zeros(*call.input.shape[:2], padded.shape[2]).index_copy(1, present, padded)
    return output, [s.index_copy(1, order, end) for s, end in zip(states, ends, strict=True)]


def _nothing(call, states: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Results of a call without any step: the states; connected with every operand, with gradient 0."""
    steps, batch, _ = call.input.shape
    operands = [call.input, *(t for w in call.weights for t in w if t is not None)]
    zero = sum(t.flatten()[:0].sum() for t in operands)
    output = call.input.new_zeros(steps, batch, call.h_0.shape[2] * call.directions) + zero
    return output, [s.clone() for s in states]
