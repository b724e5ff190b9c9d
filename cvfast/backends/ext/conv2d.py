"""conv2d by cvfast's C++ kernels (CPU) and CUDA C++ kernels (NVIDIA GPUs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from cvfast import _library
from cvfast._packed import packed, when_dropped
from cvfast.ops.card import autocast_dtype, call, derives, watched
from cvfast.ops.conv2d import (
    TOLD_BY_RESULT,
    conv2d_how,
    differentiable_epilogue,
    epilogue_kernel,
    is_channels_last,
    output_size,
    pack_kernel,
    packed_form_kernel,
    plain_kernel,
    result_format,
    rows_as_pixels,
)
from cvfast.ops.sequence import PREPARE_SEQUENCE, SEQUENCE, STEP_KINDS, pooled_size

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # all that autocast knows
CUDA_DTYPES = (torch.float32, torch.float64)
SLOW_ON_CUDA = "the CUDA kernel is a first, simple one: on an H100 cuDNN is up to 90 times as fast"
_AVX2_ALONE = _library.C is not None and _library.C.best_isa() == "avx2"
LARGE_PATCH = 12  # pixels; measured: 12 to 32 with AVX2 and AVX-512. With 8 and less the kernels are faster


def why_not(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    if input.is_cpu:
        library, dtype, dtypes = _library.ops, input.dtype, CPU_DTYPES
    elif input.is_cuda:
        library, dtype, dtypes = _library.cuda, autocast_dtype(input, "cuda"), CUDA_DTYPES
    else:
        return [f"no kernel for device {input.device.type!r} (there are kernels for cpu, cuda)"]
    if library.reason is not None:
        return [library.reason]
    if dtype not in dtypes:
        return [f"no kernel for {dtype} on {input.device.type}"]
    if input.layout is not torch.strided or weight.layout is not torch.strided:
        return ["sparse and other unusual layouts are torch's"]
    return []


def why_slower(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], *options
) -> list[str]:
    """Where torch's own operator is taken although the kernels could run."""
    if input.is_cuda:
        return [SLOW_ON_CUDA]
    large = stride[0] >= LARGE_PATCH and not torch.is_grad_enabled() and _cuts_patches(weight, stride, padding)
    if large and not _is_one_contiguous_image(input):
        return ["without gradients torch is 1.05 to 1.6 times as fast on images cut into large patches"]
    return []


def _is_one_contiguous_image(input: Tensor) -> bool:
    """Of whose patches the kernels are 1.04 times as fast with AVX2, whose weights, kept, torch would lay out anew."""
    return _AVX2_ALONE and input.shape[0] == 1 and input.is_contiguous()


def _cuts_patches(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether this is the first layer of a vision transformer: patches of an image that do not overlap."""
    return tuple(stride) == tuple(weight.shape[2:]) and not any(padding) and weight.shape[1] <= 4


def run_with_epilogue(
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    pooling: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *options,
) -> Tensor | None:
    """pooling(activation(conv2d(...) + residual)) in one pass; None where derivatives or tracers have to see the parts.

    `pooling` must be "none" where a residual is given.
    """
    how = conv2d_how(*options, activation, pooling) if runs_with_epilogue(input, weight, bias, residual) else None
    if how is None:
        return None
    residual = _in_result_format(residual, input, weight)
    kept = packed_weight(input, weight, how)
    return epilogue_kernel(input, weight, bias, how, kept, residual, negative_slope)


def run_with_differentiable_epilogue(
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *options,
) -> Tensor | None:
    """activation(conv2d(...) + residual) in one pass that has derivatives; None where the parts have to be called."""
    told = activation in TOLD_BY_RESULT and not (activation == "leaky_relu" and negative_slope < 0)
    if not told or not _fits_kernel(input, weight, bias, residual) or forward_ad._current_level >= 0:
        return None
    how = conv2d_how(*options, activation, "none")
    if how is None:
        return None
    residual = _in_result_format(residual, input, weight)
    return differentiable_epilogue(input, weight, bias, how, options, activation, residual, negative_slope)


def _in_result_format(residual: Tensor | None, input: Tensor, weight: Tensor) -> Tensor | None:
    return None if residual is None else residual.contiguous(memory_format=result_format(input, weight))


def prepare(
    activation: str, negative_slope: float, pooling: str, weight: Tensor, bias: Tensor | None, *options
) -> Callable[[Tensor, Tensor | None], Tensor | None] | None:
    """`run_with_epilogue` for one weight and many inputs, its checks made once; None where it may not be taken.

    The call (input, residual) returns None for what has to go through the checks of every call.
    """
    how = conv2d_how(*options, activation, pooling)
    if how is None or not may_prepare(weight, bias) or why_not(weight, weight, bias, *options):
        return None
    kernel, dtype = epilogue_kernel, weight.dtype

    def prepared(input: Tensor, residual: Tensor | None) -> Tensor | None:
        if not takes_prepared(input, dtype) or not (residual is None or type(residual) is Tensor):
            return None
        try:
            return kernel(input, weight, bias, how, packed_weight(input, weight, how), residual, negative_slope)
        except RuntimeError:  # what does not fit: other calls convert it, or find better words
            return None

    return prepared


def may_prepare(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are ordinary tensors that the CPU's kernels take."""
    tensors = [t for t in (weight, bias) if t is not None]
    return weight.dtype in CPU_DTYPES and all(
        type(t) in (Tensor, Parameter) and t.is_cpu and t.dtype is weight.dtype for t in tensors
    )


def takes_prepared(input: Tensor, dtype: torch.dtype) -> bool:
    """Whether a prepared call may take this input: nobody watches, and nobody asks for derivatives."""
    return (
        type(input) is Tensor
        and input.dtype is dtype
        and not torch.is_grad_enabled()
        and not watched(input)
        and forward_ad._current_level < 0
    )


class PreparedSequence:
    """Steps in a row for inputs of the shapes and strides given, as one call; `prepare` takes the convolutions.

    steps: cvfast.functional.Step. RuntimeError: they do not fit the inputs, or each other.
    """

    def __init__(self, steps: Sequence[tuple], inputs: Sequence[Tensor]) -> None:
        values, packed, numbers = list(inputs), [], []
        self._dtype = inputs[0].dtype
        for step, in_channels_last in zip(steps, _are_channels_last(steps, inputs), strict=True):
            how = conv2d_how(*step.options, step.activation, step.pooling)
            if how is None or (torch.float32 if step.weight is None else step.weight.dtype) is not self._dtype:
                raise RuntimeError("what the kernels do not know, or several dtypes")
            memory_format = torch.channels_last if in_channels_last else torch.contiguous_format
            packed.append(_packed_for(step, values[step.input], how, memory_format))
            values.append(_result_of(step, values[step.input], memory_format))
            kind = STEP_KINDS.index(step.kind)
            numbers += [step.input, step.residual, kind, how, int(step.own_weight), int(in_channels_last)]
        weights = [_NO_WEIGHT if step.weight is None else step.weight for step in steps]
        biases = [step.bias for step in steps]
        slopes = [step.negative_slope for step in steps]
        # Whoever frees what is kept beside weights frees it here, too.
        self._prepared = [PREPARE_SEQUENCE(weights, biases, packed, numbers, slopes, len(inputs))]
        self._watch = when_dropped(weights, self._prepared.clear)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """As a prepared call. LookupError: packed weights were freed, so that this has to be prepared anew."""
        if not all([takes_prepared(input, self._dtype) for input in inputs]):
            return None
        prepared = [*self._prepared]  # held, whoever frees it meanwhile
        if not prepared:
            raise LookupError("the packed weights are gone")
        try:
            return SEQUENCE(*prepared, inputs)
        except RuntimeError:
            return None


_NO_WEIGHT = torch.empty(0)
_OF_ROWS = ("averaged_linear", "linear")
_LEAST_CHANNELS = 16  # of channels_last: with fewer the contiguous format is as fast or faster


def _are_channels_last(steps: Sequence[tuple], inputs: Sequence[Tensor]) -> list[bool]:
    """Of each step, whether its result is channels_last.

    Results that nobody else sees are, whatever the inputs are: the kernels are faster then. The last one is what the
    calls one by one would give. So are all where a residual, which has its result's format, would not fit else.
    """
    called = [is_channels_last(input) for input in inputs]
    hidden = [*called]
    flattened = {step.input for step in steps if step.kind == "linear"}
    for step in steps:
        weight = step.weight if step.kind == "conv2d" else None
        called.append(called[step.input] or (weight is not None and is_channels_last(weight)))
        many = hidden[step.input] if weight is None else weight.shape[0] >= _LEAST_CHANNELS
        hidden.append((called[-1] or many) and len(hidden) not in flattened)
    hidden[-1] = called[-1]
    results = enumerate(steps, len(inputs))
    fit = all([step.residual < 0 or hidden[step.residual] == hidden[result] for result, step in results])
    return (hidden if fit else called)[len(inputs) :]


def _packed_for(step: tuple, input: Tensor, how: int, memory_format: torch.memory_format) -> Tensor | None:
    """The weight as the kernels read it, where that pays, for a call that is made again and again.

    memory_format: the result's.
    """
    if step.weight is None:
        return None
    # Nobody packs at the first call that is known; there was one, perhaps by torch's operator.
    if step.kind in _OF_ROWS:
        packed_for_rows(input.shape[0], step.weight, how)
        return packed_for_rows(input.shape[0], step.weight, how)
    bands = is_channels_last(input) and memory_format is torch.channels_last
    input = torch.empty_like(input, memory_format=memory_format)  # the form depends on the result's alone
    if not bands or step.weight.numel() > _MOST_TO_PACK_BANDS or step.weight[0, 0].numel() > 1:
        return packed_weight(input, step.weight, how)
    lines = input[:1, :, : max(1, _BAND // input.shape[3])]  # for a part of the image: more pixels take another form
    _packed_weight(lines, step.weight, how)
    return _packed_weight(lines, step.weight, how)


_MOST_TO_PACK_BANDS, _BAND = 1 << 14, 2048  # weights of a 1x1 kernel; pixels


def _result_of(step: tuple, input: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An empty tensor as the step's result will be."""
    if step.kind == "linear" and not (input.is_contiguous() and input[0].numel() == step.weight.shape[1]):
        raise RuntimeError("what is flattened does not fit")
    if step.kind in _OF_ROWS:
        return input.new_empty(input.shape[0], step.weight.shape[0])
    stride, padding, dilation, _ = step.options
    if step.weight is None:
        ceil = step.kind == "max_pooling_ceil"
        size = [pooled_size(input.shape[i + 2], dilation[i], stride[i], padding[i], ceil) for i in (0, 1)]
    else:
        kernel = step.weight.shape[2:]
        size = [output_size(input.shape[i + 2], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    if step.pooling != "none":
        size = [length // 2 for length in size]
    channels = input.shape[1] if step.weight is None else step.weight.shape[0]
    size = (input.shape[0], channels, *size)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)


def runs_with_epilogue(input: Tensor, *operands: Tensor | None) -> bool:
    """Whether a kernel's epilogue may be used: on the CPU, in one dtype, and nobody has to see the parts."""
    return _fits_kernel(input, *operands) and not derives([input, *(t for t in operands if t is not None)])


def _fits_kernel(input: Tensor, *operands: Tensor | None) -> bool:
    tensors = [input, *(t for t in operands if t is not None)]
    return (
        all([t.is_cpu and t.dtype is input.dtype for t in tensors]) and input.dtype in CPU_DTYPES and not watched(input)
    )


LEAST_TO_PACK = 4096  # weights: fewer are packed as fast as the kept ones are looked up


def packed_weight(input: Tensor, weight: Tensor, how: int) -> Tensor | None:
    """The weight in the form in which the kernels read it, where that is kept."""
    return None if weight.numel() < LEAST_TO_PACK else _packed_weight(input, weight, how)


def _packed_weight(input: Tensor, weight: Tensor, how: int) -> Tensor | None:
    return packed(
        (input.shape, input.stride(), how),
        lambda: packed_form_kernel(input, weight, how),
        lambda: pack_kernel(input, weight, how),
        weight,
    )


def packed_for_rows(rows: int, weight: Tensor, how: int) -> Tensor | None:
    """The same of a linear layer's weight, for so many contiguous rows."""

    def operands() -> tuple[Tensor, Tensor, int]:
        return rows_as_pixels(weight.new_empty(rows, weight.shape[1])), weight[:, :, None, None], how

    if weight.numel() < LEAST_TO_PACK:
        return None
    return packed((rows, how), lambda: packed_form_kernel(*operands()), lambda: pack_kernel(*operands()), weight)


def _run_plainly(input: Tensor, weight: Tensor, bias: Tensor | None, how: int) -> Tensor:
    kept = packed_weight(input, weight, how)
    if kept is None:
        return plain_kernel(input, weight, bias, how)
    return epilogue_kernel(input, weight, bias, how, kept)


def run_unasked(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor | None:
    """conv2d of arguments as a caller gave them, checked by the kernel alone; None for what needs another look."""
    plain = type(input) is Tensor and type(weight) in (Tensor, Parameter) and input.is_cpu and input.dim() == 4
    if not plain or watched(input) or forward_ad._current_level >= 0:
        return None
    how = conv2d_how(stride, padding, dilation, groups)
    if how is None or how >= _HOW_LARGE_PATCH:
        return None
    try:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(input, weight, bias):
            return differentiable_epilogue(input, weight, bias, how, (stride, padding, dilation, groups))
        return _run_plainly(input, weight, bias, how)
    except RuntimeError:  # what does not fit: the checks of every call find better words
        return None


_HOW_LARGE_PATCH = conv2d_how((LARGE_PATCH, 1), 0, 1, 1) or 0  # all with larger strides are greater: those come first

_operator = torch.ops.cvfast.conv2d.default


def run(input: Tensor, weight: Tensor, bias: Tensor | None, *options) -> Tensor:
    """Shapes and meaning as in cvfast.functional.conv2d."""
    plain = input.is_cpu and type(input) is Tensor and type(weight) in (Tensor, Parameter)
    if plain and not watched(input) and not derives((input, weight, bias)):
        how = conv2d_how(*options)
        if how is not None:
            return _run_plainly(input, weight, bias, how)
    return call(_operator, input, weight, bias, *options)
