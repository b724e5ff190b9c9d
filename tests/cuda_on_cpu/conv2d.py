"""csrc/include/cvfast/conv2d.h for Python: the structs, and the three launchers called on CPU tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tests.cuda_on_cpu.simulator import Launch, Module

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # cvfast::DType


class Conv2dShape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "batch", "in_channels", "in_height", "in_width", "out_channels", "out_height", "out_width",
            "kernel_height", "kernel_width", "stride_h", "stride_w", "padding_h", "padding_w",
            "dilation_h", "dilation_w", "groups",
        )
    )  # fmt: skip


class Tensor4(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4))

    @classmethod
    def of(cls, tensor: Tensor) -> Tensor4:
        return cls(tensor.data_ptr(), (ctypes.c_int64 * 4)(*tensor.stride()))


_HEAD = (("shape", Conv2dShape), ("dtype", ctypes.c_int32))


class Epilogue(ctypes.Structure):  # the CPU's; of zeros here
    _fields_ = (
        ("activation", ctypes.c_int32), ("negative_slope", ctypes.c_double), ("residual", ctypes.c_void_p),
        ("pooling", ctypes.c_int32),
    )  # fmt: skip


class Conv2dForward(ctypes.Structure):
    _fields_ = (
        *_HEAD, ("input", Tensor4), ("weight", Tensor4), ("bias", ctypes.c_void_p), ("output", Tensor4),
        ("epilogue", Epilogue), ("packed", ctypes.c_void_p), ("same_weights", ctypes.c_bool),
    )  # fmt: skip


class Conv2dInputGrad(ctypes.Structure):
    _fields_ = (
        *_HEAD, ("grad_output", Tensor4), ("weight", Tensor4), ("bias", ctypes.c_void_p), ("grad_input", Tensor4),
        ("epilogue", Epilogue), ("packed", ctypes.c_void_p),
    )  # fmt: skip


class Conv2dWeightGrad(ctypes.Structure):
    _fields_ = (*_HEAD, ("grad_output", Tensor4), ("input", Tensor4), ("grad_weight", Tensor4))


Geometry = dict  # stride, padding, dilation: pairs; groups: int


def shape(input_size: torch.Size, weight_size: torch.Size, output_size: torch.Size, geometry: Geometry) -> Conv2dShape:
    return Conv2dShape(
        *input_size, weight_size[0], *output_size[2:], *weight_size[2:],
        *geometry["stride"], *geometry["padding"], *geometry["dilation"], geometry["groups"],
    )  # fmt: skip


def forward(
    module: Module, input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, geometry: Geometry, **options
) -> list[Launch]:
    """Writes conv2d(input, weight, bias) to ``output``; ``options`` are those of ``Module.call``."""
    arguments = Conv2dForward(
        shape(input.shape, weight.shape, output.shape, geometry), DTYPES[input.dtype], Tensor4.of(input),
        Tensor4.of(weight), None if bias is None else bias.data_ptr(), Tensor4.of(output),
    )  # fmt: skip
    reads = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    return module.call("conv2d_forward", arguments, reads=reads, writes={"output": output}, **options)


def input_grad(
    module: Module, grad_output: Tensor, weight: Tensor, bias: Tensor | None, grad_input: Tensor, geometry: Geometry,
    **options,
) -> list[Launch]:  # fmt: skip
    """Writes the gradient to conv2d's input, plus bias: conv_transpose2d(grad_output, weight, bias)."""
    arguments = Conv2dInputGrad(
        shape(grad_input.shape, weight.shape, grad_output.shape, geometry), DTYPES[weight.dtype],
        Tensor4.of(grad_output), Tensor4.of(weight), None if bias is None else bias.data_ptr(), Tensor4.of(grad_input),
    )  # fmt: skip
    reads = {"grad_output": grad_output, "weight": weight} | ({} if bias is None else {"bias": bias})
    return module.call("conv2d_input_grad", arguments, reads=reads, writes={"grad_input": grad_input}, **options)


def weight_grad(
    module: Module, grad_output: Tensor, input: Tensor, grad_weight: Tensor, geometry: Geometry, **options
) -> list[Launch]:
    arguments = Conv2dWeightGrad(
        shape(input.shape, grad_weight.shape, grad_output.shape, geometry), DTYPES[input.dtype],
        Tensor4.of(grad_output), Tensor4.of(input), Tensor4.of(grad_weight),
    )  # fmt: skip
    reads = {"grad_output": grad_output, "input": input}
    return module.call("conv2d_weight_grad", arguments, reads=reads, writes={"grad_weight": grad_weight}, **options)
