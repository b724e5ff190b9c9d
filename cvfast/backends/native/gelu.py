"""gelu by torch's own operator."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(input: Tensor) -> list[str]:
    """Never refuses."""
    return []


def why_slower(input: Tensor) -> list[str]:
    """Nothing is left to be taken instead."""
    return []


def run(input: Tensor) -> Tensor:
    return torch.nn.functional.gelu(input)
