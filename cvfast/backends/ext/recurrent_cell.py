"""lstm_cell, gru_cell and rnn_cell by cvfast's C++ kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast.backends.ext.recurrent import reasons
from cvfast.ops.card import call, derives, watched
from cvfast.ops.recurrent import CELLS, STEP, wants_saved

OPERATORS = {cell: getattr(torch.ops.cvfast, f"{cell}_cell").default for cell in CELLS}


def why_not(cell: str, input: Tensor, *operands) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    return reasons(input)


def why_slower(*args) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    return []


def run(
    cell: str,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    """(h, c) or (h,) after the step; shapes as in cvfast.functional.lstm_cell."""
    operands = (input, h, c, w_ih, w_hh, b_ih, b_hh)
    if watched(input) or derives(operands):
        new_h, new_c, _ = call(OPERATORS[cell], *operands, wants_saved(*operands))
    else:
        new_h, new_c = STEP[cell](*operands)
    return (new_h,) if c is None else (new_h, new_c)


def run_unasked(cell: str, input: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...] | None:
    """`run` of operands that nobody has looked at; None where somebody has to: the kernel checks them, too."""
    if watched(input) or derives((input, *operands)):
        return None
    try:
        new_h, new_c = STEP[cell](input, *operands)
    except RuntimeError:
        return None
    return (new_h,) if operands[1] is None else (new_h, new_c)
