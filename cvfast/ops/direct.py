"""Kernels called without torch's dispatcher, which takes longer than a small kernel: C reads tensors by DLPack."""

from __future__ import annotations

from collections.abc import Callable

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
    return _library.C.set_tensors(api, Tensor, torch.nn.Parameter, Tensor.is_neg, torch.empty_like, Tensor.new_empty)


_NAMES = ("recurrent_step", "recurrent_cell", "recurrent_layers")
recurrent_step, recurrent_cell, recurrent_layers = (
    [getattr(_library.C, name) for name in _NAMES] if _connected() else [lambda *args: None] * len(_NAMES)
)


def unseen(certain: Callable | None = None):
    """Notes, for C to compare, that nobody is to see an operator's call; who is compiling has to be asked besides.

    No autograd, tracer, mode, transform, autocast or profiler. None where the compiled module is missing.
    certain: notes what else has to hold.
    """
    if _library.C is None:
        return None
    state = _library.C.Unchanged()
    state.result(torch.is_grad_enabled, (), False)
    state.result(transforms, (), None)
    state.result(torch._C._len_torch_dispatch_stack, (), 0)
    state.result(torch._C._len_torch_function_stack, (), 0)
    state.result(torch.is_autocast_enabled, ("cpu",), False)
    state.result(vars(forward_ad).get, ("_current_level",), -1)
    state.result(torch.autograd._profiler_enabled, (), False)
    if certain is not None:
        certain(state)
    return state
