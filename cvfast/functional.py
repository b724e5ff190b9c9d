"""cvfast's public functions: torch.nn.functional's names and signatures, run by the fastest backend able to.

Each function checks what its caller can get wrong, normalises the arguments and hands them to the chosen backend. The
mathematics is in cvfast/reference, the kernels are in csrc and cvfast/backends/triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvfast import backend as _backend

__all__ = ["conv2d"]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """2-D convolution (cross-correlation), with torch.nn.functional.conv2d's meaning and arguments.

    Args:
        input: [N, C, H, W] or [C, H, W]; contiguous and channels_last are both read in place.
        weight: [K, C/groups, R, S], of input's dtype.
        bias: [K] or None.
        stride, dilation: >= 1, one number or (height, width).
        padding: >= 0, one number or (height, width); "valid" (none) or "same" (output as large as the input; stride 1).
        groups: divides C and K.
        backend: "auto", "ext", "triton" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        [N, K, P, Q] (or [K, P, Q]) with P = floor((H + 2*padding - dilation*(R - 1) - 1) / stride) + 1, Q likewise;
        channels_last if input or weight is. dtypes: float32, float64, bfloat16, float16 on the CPU; others are torch's.

    Raises:
        RuntimeError: as torch's, for shapes, dtypes or options that do not fit; or where the named backend cannot run.
        TypeError, ValueError: arguments of another type, an unknown backend.
    """
    if input.dim() not in (3, 4) or weight.dim() != 4:
        _wrong_dimensions(input, weight)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        batched, padding = _string_padding(batched, weight, padding, stride, dilation)
    else:
        padding = _pair("padding", padding)
    _check_conv2d(batched, weight, bias, stride, padding, dilation, groups)
    args = (batched, weight, bias, stride, padding, dilation, groups)
    output = _backend.select("conv2d", backend, *args).run(*args)
    return output if input.dim() == 4 else output.squeeze(0)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a number, or a sequence of one or two numbers."""
    if type(value) is int:
        return (value, value)
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, (str, bool)) or not isinstance(value, Sequence):
        raise TypeError(f"conv2d: {name} must be an int or a pair of ints, got {value!r}")
    if len(value) not in (1, 2):
        raise RuntimeError(f"conv2d: {name} takes one number or two (height, width), got {tuple(value)}")
    if not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in value):
        raise TypeError(f"conv2d: {name} must be an int or a pair of ints, got {value!r}")
    return (value[0], value[-1])


def _string_padding(
    input: Tensor, weight: Tensor, padding: str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """The input and the symmetric padding that "valid" or "same" stand for.

    An even kernel's "same" needs one zero more below and on the right; it is added to the input, as torch does.
    """
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"conv2d: padding must be 'valid', 'same' or numbers, got {padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"conv2d: padding='same' is not supported for strided convolutions, got stride {stride}")
    if min(dilation) < 1:
        raise RuntimeError(f"conv2d: dilation should be greater than zero, got {dilation}")
    height, width = (dilation[i] * (weight.shape[i + 2] - 1) for i in range(2))
    if height % 2 or width % 2:
        input = torch.nn.functional.pad(input, (0, width % 2, 0, height % 2))
    return input, (height // 2, width // 2)


def _wrong_dimensions(input: Tensor, weight: Tensor) -> None:
    raise RuntimeError(
        f"conv2d: Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight "
        f"{list(weight.shape)}, but got {input.dim()}-dimensional input of size {list(input.shape)} instead; "
        "input is [N, C, H, W] or [C, H, W], weight is [K, C/groups, R, S]"
    )


def _check_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    """Raises RuntimeError, in torch's words where torch has some, for what does not fit together."""
    if groups < 1:
        raise RuntimeError(f"conv2d: non-positive groups is not supported, got groups={groups}")
    if stride[0] < 1 or stride[1] < 1:
        raise RuntimeError(f"conv2d: non-positive stride is not supported, got {stride}")
    if padding[0] < 0 or padding[1] < 0:
        raise RuntimeError(f"conv2d: negative padding is not supported, got {padding}")
    if dilation[0] < 1 or dilation[1] < 1:
        raise RuntimeError(f"conv2d: dilation should be greater than zero, got {dilation}")
    _check_same("weight", weight, input)
    out_channels, group_channels, *kernel = weight.shape
    _, channels, *size = input.shape
    if out_channels < groups or out_channels % groups:
        raise RuntimeError(
            f"conv2d: Given groups={groups}, expected weight to be at least {groups} at dimension 0 and divisible by "
            f"it, but got weight of size {list(weight.shape)} instead"
        )
    if channels != group_channels * groups:
        raise RuntimeError(
            f"conv2d: Given groups={groups}, weight of size {list(weight.shape)}, expected input{list(input.shape)} "
            f"to have {group_channels * groups} channels, but got {channels} channels instead"
        )
    if bias is not None:
        _check_same("bias", bias, input)
        if bias.shape != (out_channels,):
            raise RuntimeError(
                f"conv2d: Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with "
                f"{out_channels} elements, but got bias of size {list(bias.shape)} instead"
            )
    for i in (0, 1):
        padded, extent = size[i] + 2 * padding[i], dilation[i] * (kernel[i] - 1) + 1
        if kernel[i] < 1 or padded < extent:
            raise RuntimeError(
                "conv2d: Kernel size can't be greater than actual input size (or empty): "
                f"{('height', 'width')[i]} {size[i]} padded to {padded}, kernel {kernel[i]} covering {extent}"
            )


def _check_same(name: str, tensor: Tensor, input: Tensor) -> None:
    """Raises RuntimeError if `tensor` is not of input's device and, unless autocast will cast them, dtype."""
    device = input.device
    if tensor.device == device and (tensor.dtype is input.dtype or _casts(device.type)):
        return
    raise RuntimeError(
        f"conv2d: Input type ({input.dtype}, {device}) and {name} type ({tensor.dtype}, {tensor.device}) "
        "should be the same"
    )


def _casts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
