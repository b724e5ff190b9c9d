"""The matrix product of the references."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in pieces, so that float64's own rounding does not add up: along the sum, and along both for gradients."""
    pieces = [columns.split(16, -2) for columns in b.split(64, -1)]
    rows = []
    for row in a.split(64, -2):
        row = row.split(16, -1)
        rows.append(torch.cat([sum(x @ y for x, y in zip(row, column, strict=True)) for column in pieces], -1))
    return torch.cat(rows, -2)
