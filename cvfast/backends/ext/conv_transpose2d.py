"""conv_transpose2d by conv2d's C++ and CUDA C++ kernels: it is the gradient of a convolution to its input."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cvfast.backends.ext.conv2d import SLOW_ON_CUDA, why_not
from cvfast.ops.card import call

__all__ = ["run", "why_not", "why_slower"]


def why_slower(input: Tensor, *args) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    return [SLOW_ON_CUDA] if input.is_cuda else []


run = partial(call, torch.ops.cvfast.conv_transpose2d.default)  # arguments as in cvfast.functional.conv_transpose2d
