"""cvfast's public functions: torch.nn.functional's names and signatures, run by the fastest backend able to.

Each function checks what its caller can get wrong, normalises the arguments and hands them to the chosen backend. The
mathematics is in cvfast/reference, the kernels are in csrc and cvfast/backends/triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from cvfast import backend as _backend
from cvfast._functional.additive_attention import additive_attention
from cvfast._functional.attention import scaled_dot_product_attention
from cvfast._functional.attention_lstm import attention_lstm, attention_lstm_cell
from cvfast._functional.attention_statistics import AttentionStatistics, attention_statistics
from cvfast._functional.encoder import Half as Half  # accelerate's, as the next one
from cvfast._functional.encoder import prepared_encoder as prepared_encoder
from cvfast._functional.encoder import self_attention as self_attention  # cvfast.nn's
from cvfast._functional.packed_attention import packed_attention
from cvfast._functional.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from cvfast._functional.recurrent import prepared_cell as prepared_cell  # cvfast.nn's
from cvfast._functional.recurrent import prepared_layers as prepared_layers

__all__ = [
    "AttentionStatistics",
    "additive_attention",
    "attention_lstm",
    "attention_lstm_cell",
    "attention_statistics",
    "conv2d",
    "conv_transpose2d",
    "gru",
    "gru_cell",
    "linear",
    "lstm",
    "lstm_cell",
    "packed_attention",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]


_ext_conv2d = _backend.BACKENDS["conv2d"]["ext"]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    pooling: str = "none",
    backend: str | None = None,
) -> Tensor:
    """2-D convolution (cross-correlation), with torch.nn.functional.conv2d's meaning and arguments, and an epilogue.

    activation(conv2d(input, weight, bias) + residual), pooled if asked for: on the CPU sum and activation and, without
    gradients and a residual, pooling are computed while the results are in the cache, and bfloat16 and float16 are
    rounded after them. Where gradients are asked for this holds for "none", "relu", "relu6", "leaky_relu" (slope >= 0),
    "sigmoid" and "tanh", whose results tell their derivatives; all else is left to torch's operators.

    Args:
        input: [N, C, H, W] or [C, H, W]; contiguous and channels_last are both read in place.
        weight: [K, C/groups, R, S], of input's dtype.
        bias: [K] or None.
        stride, dilation: >= 1, one number or (height, width).
        padding: >= 0, one number or (height, width); "valid" (none) or "same" (output as large as the input; stride 1).
        groups: divides C and K.
        activation: "none", "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh" (gelu's approximation by tanh),
            "sigmoid", "tanh", "hardswish" or "hardsigmoid".
        negative_slope: leaky_relu's factor of negative numbers.
        residual: of the result's shape before pooling, of its dtype and device; added before the activation.
        pooling: "none", "max" or "average" of 2x2 pixels with stride 2, after the activation, as
            torch.nn.functional.max_pool2d and avg_pool2d; a line or column that is left over is dropped.
        backend: "auto", "ext", "triton" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        [N, K, P, Q] (or [K, P, Q]) with P = floor((H + 2*padding - dilation*(R - 1) - 1) / stride) + 1, Q likewise;
        with pooling half of that, rounded down; channels_last if input or weight is.
        dtypes: float32, float64, bfloat16, float16 on the CPU; others are torch's.

    Raises:
        RuntimeError: as torch's, for shapes, dtypes or options that do not fit; or where the named backend cannot run.
        TypeError, ValueError: arguments of another type, an unknown backend.
    """
    plain = activation == "none" and pooling == "none" and residual is None
    if plain and _backend.is_certain("ext", backend):
        output = _ext_conv2d.run_unasked(input, weight, bias, stride, padding, dilation, groups)
        if output is not None:
            return output
    dims = input.dim()
    if dims not in (3, 4) or weight.dim() != 4:
        _wrong_dimensions("conv2d", "weight is [K, C/groups, R, S]", input, weight)
    batched = input if dims == 4 else input.unsqueeze(0)
    stride, dilation = _pair("conv2d", "stride", stride), _pair("conv2d", "dilation", dilation)
    if isinstance(padding, str):
        batched, padding = _string_padding(batched, weight, padding, stride, dilation)
    else:
        padding = _pair("conv2d", "padding", padding)
    _check_conv2d(batched, weight, bias, stride, padding, dilation, groups)
    args = (batched, weight, bias, stride, padding, dilation, groups)
    chosen = _backend.select("conv2d", backend, *args)
    if residual is None and activation == "none" and pooling == "none":
        output = chosen.run(*args)
    else:
        size = conv2d_size(batched, weight, stride, padding, dilation)
        if dims == 3 and residual is not None:
            residual = residual.unsqueeze(0)
        output = _with_epilogue("conv2d", chosen, size, residual, activation, negative_slope, pooling, args)
    return output if dims == 4 else output.squeeze(0)


def gelu(input: Tensor, *, backend: str | None = None) -> Tensor:
    """torch.nn.functional.gelu, not approximated, of any shape and dtype; on the CPU by a kernel where that is faster.

    backend: "auto", "ext" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.
    """
    return _backend.select("gelu", backend, input).run(input)


ACTIVATIONS = {
    "none": lambda x, slope: x,
    "relu": lambda x, slope: torch.relu(x),
    "relu6": lambda x, slope: torch.nn.functional.relu6(x),
    "leaky_relu": torch.nn.functional.leaky_relu,
    "silu": lambda x, slope: torch.nn.functional.silu(x),
    "gelu": lambda x, slope: gelu(x),
    "gelu_tanh": lambda x, slope: torch.nn.functional.gelu(x, approximate="tanh"),
    "sigmoid": lambda x, slope: torch.sigmoid(x),
    "tanh": lambda x, slope: torch.tanh(x),
    "hardswish": lambda x, slope: torch.nn.functional.hardswish(x),
    "hardsigmoid": lambda x, slope: torch.nn.functional.hardsigmoid(x),
}


POOLINGS = {  # of 2x2 pixels
    "none": lambda x: x,
    "max": lambda x: torch.nn.functional.max_pool2d(x, 2),
    "average": lambda x: torch.nn.functional.avg_pool2d(x, 2),
}


def _with_epilogue(
    operator: str,
    chosen: ModuleType,
    size: tuple[int, int, int, int],
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    pooling: str,
    args: tuple,
) -> Tensor:
    """A backend's operator with its epilogue: in one pass if the backend has that, else by torch's operators.

    size: of the result before pooling. args: the operator's, normalised.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operator}: unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if pooling not in POOLINGS:
        raise ValueError(f"{operator}: unknown pooling {pooling!r}; allowed: {', '.join(POOLINGS)}")
    if pooling != "none" and min(size[2:]) < 2:
        raise RuntimeError(f"{operator}: the result's size {list(size)} is too small to pool 2x2 pixels")
    if residual is not None:
        _check_same(operator, "residual", residual, args[0])
        if tuple(residual.shape) != size:
            raise RuntimeError(
                f"{operator}: residual has size {list(residual.shape)}, but the result has size {list(size)}"
            )
    if hasattr(chosen, "run_with_epilogue"):
        pooled = pooling if residual is None else "none"
        output = chosen.run_with_epilogue(residual, activation, negative_slope, pooled, *args)
        if output is not None:
            return output if pooled == pooling else POOLINGS[pooling](output)
    if hasattr(chosen, "run_with_differentiable_epilogue") and (activation != "none" or residual is not None):
        output = chosen.run_with_differentiable_epilogue(residual, activation, negative_slope, *args)
        if output is not None:
            return POOLINGS[pooling](output)
    output = chosen.run(*args)
    output = ACTIVATIONS[activation](output if residual is None else output + residual, negative_slope)
    return POOLINGS[pooling](output)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    negative_slope: float = 1.0,
    pooled: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in training and what follows it, in one pass on the CPU, where the images are float32.

    Args:
        input: [N, C, H, W] with two pixels per channel or more; weight, bias: [C] or None.
        residual: as the input; added before the activation.
        negative_slope: of the activation, y where y > 0, else negative_slope * y: 0 is relu, 1 is none.
        pooled: whether the maximum of 2x2 pixels follows.
        backend: "auto", "ext" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        The result, and each channel's mean and variance (of a sample: over N H W - 1), which have no derivative.
    """
    args = (input, residual, weight, bias, eps, negative_slope, pooled)
    output, statistics = _backend.select("batch_norm", backend, *args).run(*args)
    return output, statistics[0], statistics[2]


def prepared_conv2d(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    pooling: str = "none",
) -> Callable[[Tensor, Tensor | None], Tensor | None] | None:
    """conv2d for one weight and many inputs, for layers that know that their weight and options are as they were.

    Returns a function of input and residual that does what conv2d does with all of these, in a third of the time that
    a call takes beside the kernel; or that returns None for what conv2d itself has to be asked for (other dtypes or
    dimensions, gradients, tracers, another backend, errors). None where every call would be so.
    """
    if isinstance(padding, str):
        return None
    call = _ext_conv2d.prepare(activation, negative_slope, pooling, weight, bias, stride, padding, dilation, groups)
    if call is None:
        return None
    return lambda input, residual=None: call(input, residual) if _backend.is_certain("ext") else None


class Step(NamedTuple):
    """A convolution in a row of them: the arguments of `prepared_conv2d`, and the numbers of the values that it reads.

    Values are the row's inputs and then the results. residual: -1 where there is none. kind: "conv2d"; "max_pooling"
    or, with ceil_mode, "max_pooling_ceil", without weight, whose options are stride, padding, the square window's
    length and 1; "averaged_linear", a linear layer of the average of an image's pixels; or "linear", of flattened
    images or of rows. All but conv2d are for float32. own_weight: nobody else has the weight.
    """

    input: int
    residual: int
    activation: str
    negative_slope: float
    pooling: str
    weight: Tensor | None
    bias: Tensor | None
    options: tuple
    kind: str = "conv2d"
    own_weight: bool = False


def prepared_conv2d_sequence(
    steps: Sequence[Step], inputs: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], Tensor | None] | None:
    """Several calls that `prepared_conv2d` takes as one, for inputs of the same shapes and strides as these.

    Returns a function of the inputs; it returns None as prepared_conv2d's does, and raises LookupError where it has to
    be prepared anew. None where there is none for these inputs.
    """
    ext = _backend.BACKENDS["conv2d"]["ext"]
    if not all(ext.takes_prepared(input, inputs[0].dtype) and input.dim() == 4 for input in inputs):
        return None
    try:
        call = ext.PreparedSequence(steps, inputs)
    except RuntimeError:  # sizes that do not fit: the calls one by one find better words
        return None
    return lambda inputs: call(inputs) if _backend.is_certain("ext") else None


def prepared_linear(
    weight: Tensor, bias: Tensor | None, *, activation: str = "none", negative_slope: float = 0.01
) -> Callable[[Tensor, Tensor | None], Tensor | None] | None:
    """linear for one weight and many inputs, as prepared_conv2d; a residual only without an activation."""
    call = _ext_linear.prepare(activation, negative_slope, weight, bias)
    if call is None:
        return None

    def prepared(input: Tensor, residual: Tensor | None = None) -> Tensor | None:
        if not (_backend.is_free() and _backend.is_certain("ext")):
            return None
        if _ext_linear.is_torchs(input, weight) or _ext_linear.why_slower(input, weight, bias):
            output = ACTIVATIONS[activation](torch.nn.functional.linear(input, weight, bias), negative_slope)
            return output if residual is None else output + residual
        return call(input, residual)

    return prepared


_ext_linear = _backend.BACKENDS["linear"]["ext"]


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """activation(input weight^T + bias), with torch.nn.functional.linear's meaning and arguments.

    Args:
        input: [*, I]; weight: [O, I] (or [I], which is torch's); bias: [O] or None.
        activation, negative_slope: as conv2d's.
        backend: "auto" (cvfast's kernel where it was measured to be faster), "ext", "triton" or "native"; None: what
            `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        [*, O], contiguous. dtypes: float32, float64, bfloat16, float16 on the CPU; others are torch's.

    Raises:
        RuntimeError: as torch's, for shapes or dtypes that do not fit; or where the named backend cannot run.
        ValueError: unknown activation or backend.
    """
    if backend is None and _backend.is_free():
        if not _ext_linear.is_torchs(input, weight):
            unasked = _backend.is_certain("ext") and activation in ACTIVATIONS
            output = _ext_linear.run_unasked(input, weight, bias, activation, negative_slope) if unasked else None
            if output is not None:
                return output
        elif activation == "none":
            return torch.nn.functional.linear(input, weight, bias)
    if activation != "none":
        return _linear_with_activation(input, weight, bias, activation, negative_slope, backend)
    return _choose_linear(input, weight, bias, backend).run(input, weight, bias)


def _choose_linear(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> ModuleType:
    fits = (
        input.dim() > 0
        and weight.dim() == 2
        and input.shape[-1] == weight.shape[1]
        and weight.dtype is input.dtype
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype is input.dtype))
    )
    # What is wrong, or known to torch alone, torch says or does.
    asked = backend if fits or backend is not None else "native"
    return _backend.select("linear", asked, input, weight, bias)


def _linear_with_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, negative_slope: float, backend: str | None
) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    chosen = _choose_linear(input, weight, bias, backend)
    if hasattr(chosen, "run_with_activation"):
        output = chosen.run_with_activation(activation, negative_slope, input, weight, bias)
        if output is not None:
            return output
    return ACTIVATIONS[activation](linear(input, weight, bias, backend=backend), negative_slope)


def conv2d_size(
    input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The size (N, K, P, Q) of conv2d's result for an input of 4 dimensions."""
    height, width = (
        (input.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return (input.shape[0], weight.shape[0], height, width)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """2-D transposed convolution, with torch.nn.functional.conv_transpose2d's meaning and arguments (and their order).

    activation(conv_transpose2d(input, weight, bias) + residual), in one pass where conv2d does that.

    Args:
        input: [N, C, H, W] or [C, H, W] with H, W >= 1; contiguous and channels_last are both read in place.
        weight: [C, K/groups, R, S], of input's dtype.
        bias: [K] or None.
        stride, dilation: >= 1, one number or (height, width).
        padding: >= 0, one number or (height, width); so many lines of the result are left out on each side.
        output_padding: >= 0, one number or (height, width), smaller than stride or dilation; so many lines are added
            below and on the right.
        groups: divides C and K.
        activation, negative_slope, residual: as conv2d's.
        backend: "auto", "ext", "triton" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        [N, K, P, Q] (or [K, P, Q]) with P = (H - 1)*stride - 2*padding + dilation*(R - 1) + output_padding + 1 >= 1, Q
        likewise; channels_last if input or weight is. dtypes: as conv2d.

    Raises:
        RuntimeError: as torch's, for shapes, dtypes or options that do not fit; or where the named backend cannot run.
        TypeError, ValueError: arguments of another type, an unknown backend.
    """
    dims = input.dim()
    if dims not in (3, 4) or weight.dim() != 4:
        _wrong_dimensions("conv_transpose2d", "weight is [C, K/groups, R, S]", input, weight)
    batched = input if dims == 4 else input.unsqueeze(0)
    stride, padding = _pair("conv_transpose2d", "stride", stride), _pair("conv_transpose2d", "padding", padding)
    output_padding = _pair("conv_transpose2d", "output_padding", output_padding)
    dilation = _pair("conv_transpose2d", "dilation", dilation)
    args = (batched, weight, bias, stride, padding, output_padding, groups, dilation)
    _check_conv_transpose2d(*args)
    chosen = _backend.select("conv_transpose2d", backend, *args)
    if residual is None and activation == "none":
        output = chosen.run(*args)
    else:
        size = conv_transpose2d_size(batched, weight, stride, padding, output_padding, groups, dilation)
        if dims == 3 and residual is not None:
            residual = residual.unsqueeze(0)
        output = _with_epilogue("conv_transpose2d", chosen, size, residual, activation, negative_slope, "none", args)
    return output if dims == 4 else output.squeeze(0)


def conv_transpose2d_size(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    groups: int,
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """The size (N, K, P, Q) of conv_transpose2d's result for an input of 4 dimensions."""
    height, width = (
        (input.shape[i + 2] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (weight.shape[i + 2] - 1)
        + output_padding[i]
        + 1
        for i in range(2)
    )
    return (input.shape[0], weight.shape[1] * groups, height, width)


def _pair(operator: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a number, or a sequence of one or two numbers."""
    if type(value) is int:
        return (value, value)
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, (str, bool)) or not isinstance(value, Sequence):
        raise TypeError(f"{operator}: {name} must be an int or a pair of ints, got {value!r}")
    if len(value) not in (1, 2):
        raise RuntimeError(f"{operator}: {name} takes one number or two (height, width), got {tuple(value)}")
    if not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in value):
        raise TypeError(f"{operator}: {name} must be an int or a pair of ints, got {value!r}")
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


def _wrong_dimensions(operator: str, weight_layout: str, input: Tensor, weight: Tensor) -> None:
    raise RuntimeError(
        f"{operator}: Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight "
        f"{list(weight.shape)}, but got {input.dim()}-dimensional input of size {list(input.shape)} instead; "
        f"input is [N, C, H, W] or [C, H, W], {weight_layout}"
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
    size, kernel = _check_convolution(False, input, weight, bias, stride, padding, dilation, groups)
    for i in (0, 1):
        padded, extent = size[i] + 2 * padding[i], dilation[i] * (kernel[i] - 1) + 1
        if kernel[i] < 1 or padded < extent:
            raise RuntimeError(
                "conv2d: Kernel size can't be greater than actual input size (or empty): "
                f"{('height', 'width')[i]} {size[i]} padded to {padded}, kernel {kernel[i]} covering {extent}"
            )


def _check_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    groups: int,
    dilation: tuple[int, int],
) -> None:
    """Raises RuntimeError, in torch's words where torch has some, for what does not fit together."""
    size, kernel = _check_convolution(True, input, weight, bias, stride, padding, dilation, groups)
    for i, axis in enumerate(("height", "width")):
        extra = output_padding[i]
        if extra < 0:
            raise RuntimeError(f"conv_transpose2d: negative output_padding is not supported, got {output_padding}")
        if extra >= stride[i] and extra >= dilation[i]:
            raise RuntimeError(
                "conv_transpose2d: output padding must be smaller than either stride or dilation, but got "
                f"{axis} output_padding {extra}, stride {stride[i]}, dilation {dilation[i]}"
            )
        if size[i] < 1 or kernel[i] < 1:
            raise RuntimeError(
                f"conv_transpose2d: the {axis} of input and kernel must be positive, got {size[i]} and {kernel[i]}"
            )
        output = (size[i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + extra + 1
        if output < 1:
            raise RuntimeError(
                f"conv_transpose2d: Output size is too small: {axis} {size[i]}, kernel {kernel[i]} and "
                f"padding {padding[i]} give {output}"
            )


def _check_convolution(
    transposed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[list[int], list[int]]:
    """What both convolutions ask of their arguments; returns (H, W) of the input and (R, S) of the kernel."""
    operator = "conv_transpose2d" if transposed else "conv2d"
    if groups < 1:
        raise RuntimeError(f"{operator}: non-positive groups is not supported, got groups={groups}")
    if stride[0] < 1 or stride[1] < 1:
        raise RuntimeError(f"{operator}: non-positive stride is not supported, got {stride}")
    if padding[0] < 0 or padding[1] < 0:
        raise RuntimeError(f"{operator}: negative padding is not supported, got {padding}")
    if dilation[0] < 1 or dilation[1] < 1:
        raise RuntimeError(f"{operator}: dilation should be greater than zero, got {dilation}")
    _check_same(operator, "weight", weight, input)
    first, second, *kernel = weight.shape
    _, channels, *size = input.shape
    in_channels, out_channels = (first, second * groups) if transposed else (second * groups, first)
    if first < groups or first % groups:
        raise RuntimeError(
            f"{operator}: Given groups={groups}, expected weight to be at least {groups} at dimension 0 and divisible "
            f"by it, but got weight of size {list(weight.shape)} instead"
        )
    if channels != in_channels:
        raise RuntimeError(
            f"{operator}: Given groups={groups}, weight of size {list(weight.shape)}, expected "
            f"input{list(input.shape)} to have {in_channels} channels, but got {channels} channels instead"
        )
    if bias is not None:
        _check_same(operator, "bias", bias, input)
        if bias.shape != (out_channels,):
            raise RuntimeError(
                f"{operator}: Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with "
                f"{out_channels} elements, but got bias of size {list(bias.shape)} instead"
            )
    return size, kernel


def _check_same(operator: str, name: str, tensor: Tensor, input: Tensor) -> None:
    """Raises RuntimeError if `tensor` is not of input's device and, unless autocast will cast them, dtype."""
    device = input.device
    if tensor.dtype is input.dtype and tensor.device == device:
        return
    if tensor.device == device and _backend.autocasts(device.type):
        return
    raise RuntimeError(
        f"{operator}: Input type ({input.dtype}, {device}) and {name} type ({tensor.dtype}, {tensor.device}) "
        "should be the same"
    )
