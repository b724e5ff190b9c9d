"""lstm_cell, gru_cell and rnn_cell by cvfast's C++ kernels (CPU)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cvfast.backends.ext.recurrent import reasons
from cvfast.ops.card import call
from cvfast.ops.direct import recurrent_cell, recurrent_step, unseen
from cvfast.ops.recurrent import CELLS, NUMBERS, wants_saved

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
    new_h, new_c, _ = call(OPERATORS[cell], *operands, wants_saved(*operands))
    return (new_h,) if c is None else (new_h, new_c)


_unseen = unseen()


def run_unasked(cell: str, *operands: Tensor | None) -> tuple[Tensor, ...] | None:
    """`run` of operands that nobody has looked at; None where somebody has to: C checks them, too."""
    if torch.compiler.is_compiling():
        return None
    state = recurrent_step(_unseen, NUMBERS[cell], *operands)
    return (state,) if isinstance(state, Tensor) else state


def prepare(cell: str, certain: Callable) -> Callable:
    """A function of a module's parameters, input and hx: the state after its step, or None where somebody has to ask.

    certain: as `unseen` has it. Not to be called where a compiler looks on.
    """
    return partial(recurrent_cell, unseen(certain), NUMBERS[cell])
