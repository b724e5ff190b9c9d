"""conv2d by Triton kernels: its three operators of torch.ops.cvfast_triton and the launches behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from cvfast import _env
from cvfast.ops import conv2d as card
from cvfast.ops.card import autocast_dtype

DTYPES = (torch.float32, torch.float64)
MIN_CAPABILITY = 8  # Triton gives up tensor cores, and spills registers, on older GPUs
INSTALLED = find_spec("triton") is not None

# One tile of the output and one step of the sum, in elements, small enough for no register to spill. They are the same
# for every shape, so that a sample's bits do not depend on the batch it comes in. CHUNK, a multiple of BLOCK_K, is what
# is added up before it joins the total: with 512 an H100 gave up to eleven times cuDNN's error, which tests/gpu refuse.
BLOCK = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "CHUNK": 64}
OFFSETS_32 = 2**30  # positions and offsets below this, and the tiles that reach past them, fit 32-bit arithmetic


class Geometry(NamedTuple):
    """Sizes of a convolution without its batch; channels are those of one group (csrc/include/cvfast/conv2d.h)."""

    groups: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int


def why_not(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> list[str]:
    """Reasons why Triton's kernels cannot run this call."""
    if not INSTALLED:
        return ["the package triton is not installed"]
    device = input.device.type
    if device != "cuda" and not (device == "cpu" and _env.triton_interpret):
        return [f"Triton kernels run on CUDA tensors (or with TRITON_INTERPRET=1 on the CPU), not on {device!r}"]
    if input.layout != torch.strided or weight.layout != torch.strided:
        return ["sparse and other unusual layouts are torch's"]
    dtype = autocast_dtype(input, device)
    if dtype not in DTYPES:
        return [f"no kernel for {dtype}"]
    if not _env.triton_interpret:
        gpu = torch.cuda.get_device_properties(input.device)
        if gpu.major < MIN_CAPABILITY:
            return [f"Triton kernels need compute capability {MIN_CAPABILITY}.0, this GPU has {gpu.major}.{gpu.minor}"]
    return []


def why_slower(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    if _env.triton_interpret:
        return ["Triton's interpreter is for tests"]
    return ["the Triton kernel is a first, simple one and not measured against cuDNN"]


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Calls the operator; shapes and meaning as in cvfast.functional.conv2d."""
    return torch.ops.cvfast_triton.conv2d(input, weight, bias, stride, padding, dilation, groups)


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> Tensor:
    """torch.ops.cvfast_triton.conv2d: output [N, K, P, Q]."""
    output = card.conv2d_fake(input, weight, bias, *options)
    bias = None if bias is None else bias.contiguous()  # the kernel takes strides of images only
    shape = _geometry(input.shape, weight.shape, output.shape, *options)
    _launch(
        "conv2d", (input, weight, bias, output), shape,
        rows=_positions(output), columns=shape.out_channels, reduction=prod(weight.shape[1:]),
    )  # fmt: skip
    return output


def input_grad(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *options) -> Tensor:
    """torch.ops.cvfast_triton.conv2d_input_grad: grad_input [N, C, H, W] = input_size."""
    grad_input = card.input_grad_fake(grad_output, weight, input_size, *options)
    return launch_input_grad(grad_output, weight, None, grad_input, *options)


def launch_input_grad(grad_output: Tensor, weight: Tensor, bias: Tensor | None, grad_input: Tensor, *options) -> Tensor:
    """Fills grad_input [N, C, H, W]; with bias [C] added it is the transposed convolution of grad_output."""
    bias = None if bias is None else bias.contiguous()
    shape = _geometry(grad_input.shape, weight.shape, grad_output.shape, *options)
    _launch(
        "conv2d_input_grad", (grad_output, weight, bias, grad_input), shape,
        rows=_positions(grad_input), columns=shape.in_channels,
        reduction=shape.out_channels * shape.kernel_height * shape.kernel_width,
    )  # fmt: skip
    return grad_input


def weight_grad(grad_output: Tensor, input: Tensor, weight_size: Sequence[int], *options) -> Tensor:
    """torch.ops.cvfast_triton.conv2d_weight_grad: grad_weight [K, C/groups, R, S] = weight_size."""
    grad_weight = card.weight_grad_fake(grad_output, input, weight_size, *options)
    shape = _geometry(input.shape, weight_size, grad_output.shape, *options)
    _launch(
        "conv2d_weight_grad", (grad_output, input, grad_weight), shape,
        rows=prod(weight_size[1:]), columns=shape.out_channels, reduction=_positions(grad_output),
    )  # fmt: skip
    return grad_weight


def _launch(name: str, tensors: tuple, shape: Geometry, rows: int, columns: int, reduction: int) -> None:
    """Fills tensors[-1] by the kernel `name`, one program for each tile of [rows, columns] and each group."""
    output = tensors[-1]
    if output.dtype not in DTYPES:
        raise NotImplementedError(f"cvfast_triton.{name}: no kernel for {output.dtype}; there are kernels for {DTYPES}")
    if output.numel() == 0:
        return
    from cvfast.backends.triton.kernels import conv2d as kernels

    grid = (_cdiv(rows, BLOCK["BLOCK_M"]) * _cdiv(columns, BLOCK["BLOCK_N"]) * shape.groups,)
    images = [tensor for tensor in tensors if tensor is not None and tensor.dim() == 4]
    wide = max(rows, reduction, *map(_extent, images)) > OFFSETS_32
    with torch.cuda.device(output.device) if output.is_cuda else nullcontext():
        getattr(kernels, name)[grid](
            *tensors, shape, *(image.stride() for image in images), rows, reduction,
            WIDE=wide, num_warps=4, num_stages=1, **BLOCK,
        )  # fmt: skip


def _geometry(
    input: Sequence[int], weight: Sequence[int], output: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Geometry:  # fmt: skip
    """The sizes in numbers, from those of input [N, C, H, W], weight [K, C/groups, R, S] and output [N, K, P, Q]."""
    channels, out_channels = weight[1], weight[0] // groups
    return Geometry(groups, channels, *input[2:], out_channels, *output[2:], *weight[2:], *stride, *padding, *dilation)


def _positions(image: Tensor) -> int:
    """How many pixels [N, *, H, W] has in all its samples."""
    return image.shape[0] * image.shape[2] * image.shape[3]


def _extent(tensor: Tensor) -> int:
    """Elements from the tensor's first to its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def implement(operator: str, function: Callable) -> None:
    """Makes `function` the implementation of torch.ops.cvfast_triton.<operator> and of its twin without derivatives."""
    for library in _implementations:
        for device in ("CUDA", "CPU") if _env.triton_interpret else ("CUDA",):
            library.impl(operator, function, device)


_implementations = [torch.library.Library(name, "IMPL") for name in ("cvfast_triton", "cvfast_triton_kernels")]
implement("conv2d", forward)
implement("conv2d_input_grad", input_grad)
implement("conv2d_weight_grad", weight_grad)
