"""lstm, gru and rnn by cvfast's C++ kernels (CPU); a call is cvfast._functional.recurrent.Call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cvfast import _library
from cvfast._packed import packed
from cvfast.ops.card import call as call_operator
from cvfast.ops.card import derives, watched
from cvfast.ops.direct import recurrent_layers, unseen
from cvfast.ops.recurrent import NUMBERS, PACK, STACK, wants_saved

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # all that autocast knows


def why_not(call) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    if call.varies:
        return ["layer normalisation, dropout of the recurrence and zoneout run in torch's operators"]
    return reasons(call.input)


def reasons(input: Tensor) -> list[str]:
    """Reasons against a call with this input, of a layer or a cell."""
    if not (input.is_cpu or input.is_meta):
        return [f"no recurrent kernel for device {input.device.type!r} (there are kernels for cpu)"]
    if _library.ops.reason is not None:
        return [_library.ops.reason]
    if input.dtype not in DTYPES:
        return [f"no kernel for {input.dtype} on cpu"]
    if input.layout is not torch.strided:
        return ["sparse and other unusual layouts are torch's"]
    return []


def why_slower(call) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    return []


def run(call) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n or None); shapes and meaning as in cvfast.functional.lstm."""
    weights = [t for w in call.weights for t in w if t is not None]
    if call.dropout == 0:
        biases = call.weights[0].b_ih is not None
        results = _run_at_once(
            call.cell, call.input, call.lengths, call.batch_sizes, call.h_0, call.c_0, weights, biases, call.directions
        )
        if results is not None:
            return results
    op = getattr(torch.ops.cvfast, call.cell).default
    output, states = call.input, []
    h_0, c_0 = _by_layer(call.h_0), None if call.c_0 is None else _by_layer(call.c_0)
    for layer in range(len(call.weights) // call.directions):
        if layer > 0 and call.dropout > 0:
            output = torch.nn.functional.dropout(output, call.dropout)
        parts = []
        for direction in range(call.directions):
            i = layer * call.directions + direction
            w = call.weights[i]
            operands = (
                output, call.lengths, call.batch_sizes, h_0[i], None if c_0 is None else c_0[i],
                w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.w_hr,
            )  # fmt: skip
            part, *state, _ = call_operator(op, *operands, direction == 1, wants_saved(*operands))
            parts.append(part)
            states.append(state)
        output = parts[0] if call.directions == 1 else torch.cat(parts, -1)
    h_n, c_n = (torch.stack(s) if len(s) > 1 else s[0].unsqueeze(0) for s in zip(*states, strict=True))
    return output, h_n, None if call.c_0 is None else c_n


def _by_layer(states: Tensor) -> Sequence[Tensor]:
    """States of each layer and direction, in the way whose derivative costs the least."""
    return (states.squeeze(0),) if len(states) == 1 else states.unbind()


def _run_at_once(
    cell: str,
    input: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    biases: bool,
    directions: int,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """As `run`, by one operator for all layers, which takes weights that were packed before; None with derivatives."""
    if watched(input) or derives((input, h_0, c_0, *weights)):
        return None
    kept = None
    if input.size(0) > 1:  # of a single step the kernels read each weight once, where it lies
        kept = _kept(cell, weights, biases, h_0.size(0))
    output, h_n, c_n = STACK[cell](input, lengths, batch_sizes, h_0, c_0, weights, biases, directions, kept)
    if h_n.numel() == 0 and h_n.size(0) == 1:  # the strides that `run` gives, and the fake
        h_n, c_n = h_n[0].unsqueeze(0), c_n if c_0 is None else c_n[0].unsqueeze(0)
    return output, h_n, None if c_0 is None else c_n


def _kept(cell: str, weights: Sequence[Tensor], biases: bool, count: int) -> Tensor | None:
    """What was packed of the weights of `count` layers and directions."""
    return packed(None, lambda: 1, lambda: PACK[cell](weights, biases, count), *weights)


def run_unasked(
    cell: str, input: Tensor, h_0: Tensor, c_0: Tensor | None, weights: Sequence[Tensor], biases: bool, directions: int
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`run` of operands that nobody has looked at; None where somebody has to: the kernels check them, too.

    All that Python asks costs more than a short sequence: the most where other work has taken the caches.
    """
    try:
        return _run_at_once(cell, input, None, None, h_0, c_0, weights, biases, directions)
    except RuntimeError:
        return None


def prepare(cell: str, certain: Callable) -> Callable:
    """A function of input [T, B, I] and the other operands of `run_unasked`, without projections, in this order.

    Its results, or None where somebody has to ask. Not to be called where a compiler looks on.
    certain: as `unseen` has it.
    """
    state, number = unseen(certain), NUMBERS[cell]

    def run_prepared(input, h_0, c_0, weights, biases, directions):
        if state is None or not state.holds():
            return None
        count = len(weights) // (4 if biases else 2)
        kept = _kept(cell, weights, biases, count) if input.size(0) > 1 else None
        return recurrent_layers(number, input, h_0, c_0, weights, biases, directions, kept)

    return run_prepared
