"""Kernels called without torch's dispatcher, which takes longer than a small kernel: C reads tensors by DLPack."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cvfast import _library
from cvfast.ops.card import transforms


def _connected() -> bool:
    """Whether torch and the compiled module could agree on how tensors are read."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if api is None or _library.C is None or not _library.ops.loaded:
        return False
    return _library.C.set_tensors(api, Tensor, torch.nn.Parameter, Tensor.is_neg, torch.empty_like)


recurrent_step = _library.C.recurrent_step if _connected() else lambda *args: None


def unseen() -> bool:
    """Whether nobody is to see an operator's call: no autograd, tracer, mode, transform, autocast or profiler."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or transforms() is not None
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or _profiled()
    )


_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_profiled = torch.autograd._profiler_enabled
