"""cvfast.override(): calls of torch's functions go to cvfast's within a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from cvfast import functional


def _layers(function: Callable, **options) -> Callable:
    """torch.lstm and its kin, which take [T, B, I] or, in their other form, a packed sequence's data and sizes."""

    def run(input: Tensor, second, *args, **kwargs):
        packed = isinstance(second, Tensor) and second.dtype == torch.int64
        if not packed:
            return function(input, second, *args, **options, **kwargs)
        output, *states = function(PackedSequence(input, second), *args, **options, **kwargs)
        return output.data, *states

    return run


def _cell(function: Callable, **options) -> Callable:
    return lambda *args, **kwargs: function(*args, **options, **kwargs)


_CVFASTS: dict[Callable, Callable] = {
    torch.nn.functional.conv2d: functional.conv2d,
    torch.conv2d: functional.conv2d,
    torch.nn.functional.conv_transpose2d: functional.conv_transpose2d,
    torch.conv_transpose2d: functional.conv_transpose2d,
    torch.nn.functional.scaled_dot_product_attention: functional.scaled_dot_product_attention,
    torch.nn.functional.linear: functional.linear,
    torch.lstm: _layers(functional.lstm),
    torch.gru: _layers(functional.gru),
    torch.rnn_tanh: _layers(functional.rnn, nonlinearity="tanh"),
    torch.rnn_relu: _layers(functional.rnn, nonlinearity="relu"),
    torch.lstm_cell: functional.lstm_cell,
    torch.gru_cell: functional.gru_cell,
    torch.rnn_tanh_cell: _cell(functional.rnn_cell, nonlinearity="tanh"),
    torch.rnn_relu_cell: _cell(functional.rnn_cell, nonlinearity="relu"),
}


def _plain(argument: object) -> bool:
    return not isinstance(argument, Tensor) or (type(argument) in (Tensor, Parameter) and not argument.is_nested)


class override(TorchFunctionMode):
    """Within the block, calls of torch's functions run cvfast's kernels, whoever calls them in this thread.

    For models whose layers cvfast.accelerate cannot swap, because their forward calls the functions itself:
    F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention, torch.lstm, gru, rnn_tanh, rnn_relu and
    their cells, by these names or those in torch. Subclasses of Tensor and nested tensors stay with torch, and so do
    calls that torch makes inside functions of its own (F.multi_head_attention_forward).

        with cvfast.override():
            output = model(images)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # torch takes the mode off while this runs, so backends that call torch's functions do not come back here.
        kwargs = kwargs or {}
        cvfasts = _CVFASTS.get(func)
        if cvfasts is None or not all(map(_plain, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        return cvfasts(*args, **kwargs)
