"""lstm_cell, gru_cell and rnn_cell by torch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(*args) -> list[str]:
    """Never refuses."""
    return []


def why_slower(*args) -> list[str]:
    """Nothing is left to be taken instead."""
    return []


def run(cell: str, input: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, ...]:
    """(h, c) or (h,) after the step; shapes as in cvfast.functional.lstm_cell."""
    function = getattr(torch, f"{cell}_cell")
    return (function(input, h, *weights),) if c is None else function(input, (h, c), *weights)
