"""conv_transpose2d by conv2d's C++ and CUDA C++ kernels: it is the gradient of a convolution to its input."""

from __future__ import annotations

from functools import partial

import torch

from cvfast.backends.ext.conv2d import why_not, why_slower
from cvfast.ops.card import call

__all__ = ["run", "why_not", "why_slower"]


run = partial(call, torch.ops.cvfast.conv_transpose2d.default)  # arguments as in cvfast.functional.conv_transpose2d
