"""lstm, gru and rnn by cvfast's C++ kernels (CPU); a call is cvfast._functional.recurrent.Call."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cvfast import _library
from cvfast._packed import packed
from cvfast.ops.card import call as call_operator
from cvfast.ops.card import watched
from cvfast.ops.recurrent import PACK, STACK, wants_saved

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
    if not (watched(call.input) or call.dropout > 0 or wants_saved(call.input, call.h_0, call.c_0, *weights)):
        return _run_at_once(call, weights)
    op = getattr(torch.ops.cvfast, call.cell).default
    output, states = call.input, []
    for layer in range(len(call.weights) // call.directions):
        if layer > 0 and call.dropout > 0:
            output = torch.nn.functional.dropout(output, call.dropout)
        parts = []
        for direction in range(call.directions):
            i = layer * call.directions + direction
            w = call.weights[i]
            operands = (
                output, call.lengths, call.batch_sizes, call.h_0[i], None if call.c_0 is None else call.c_0[i],
                w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.w_hr,
            )  # fmt: skip
            part, *state, _ = call_operator(op, *operands, direction == 1, wants_saved(*operands))
            parts.append(part)
            states.append(state)
        output = parts[0] if call.directions == 1 else torch.cat(parts, -1)
    h_n, c_n = (torch.stack(s) if len(s) > 1 else s[0].unsqueeze(0) for s in zip(*states, strict=True))
    return output, h_n, None if call.c_0 is None else c_n


def _run_at_once(call, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `run`, without derivatives: one operator for all layers, which takes weights that were packed before."""
    kept: list[Tensor] = []
    if len(call.input) > 1:  # of a single step the kernels read each weight once, where it lies
        kept = [packed(None, lambda: 1, partial(PACK[call.cell], *w), *w) for w in call.weights]
    output, h_n, c_n = STACK[call.cell](
        call.input, call.lengths, call.batch_sizes, call.h_0, call.c_0, weights, call.weights[0].b_ih is not None,
        call.directions, [] if any(k is None for k in kept) else kept,
    )  # fmt: skip
    if h_n.numel() == 0 and len(h_n) == 1:  # the strides that `run` gives, and the fake
        h_n, c_n = h_n[0].unsqueeze(0), c_n if call.c_0 is None else c_n[0].unsqueeze(0)
    return output, h_n, None if call.c_0 is None else c_n
