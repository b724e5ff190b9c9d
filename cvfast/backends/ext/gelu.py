"""gelu by cvfast's C++ kernels (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cvfast import _library
from cvfast.ops.card import watched
from cvfast.ops.gelu import gelu

_LEAST = 16384  # elements; with fewer a call takes longer than torch's operator


def why_not(input: Tensor) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    if not input.is_cpu or input.dtype is not torch.float32:
        return [f"no kernel of gelu for {input.dtype} on {input.device.type} (there is one for float32 on the CPU)"]
    if _library.ops.reason is not None:
        return [_library.ops.reason]
    if type(input) is not Tensor or watched(input) or forward_ad._current_level >= 0:
        return ["tracers, transforms and other classes of tensors are torch's"]
    if not input.is_contiguous():
        return ["only contiguous tensors"]
    return []


def why_slower(input: Tensor) -> list[str]:
    """Where torch's own operator is taken although the kernel could run."""
    return [] if input.numel() >= _LEAST else ["of few elements torch's operator is as fast"]


run = gelu
