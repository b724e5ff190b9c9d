"""The linear map."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [*, I] times weight [O, I] transposed, plus bias [O]: [*, O]. As torch.nn.functional.linear."""
    output = torch.einsum("...i,oi->...o", input, weight)
    return output if bias is None else output + bias
