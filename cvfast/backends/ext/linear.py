"""linear by cvfast's C++ kernels (CPU): a 1x1 convolution of one image whose pixels are the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from cvfast import _library
from cvfast._packed import packed
from cvfast.backends.ext import conv2d
from cvfast.ops.card import autocast_dtype, derives, watched
from cvfast.ops.conv2d import (
    ONE_BY_ONE,
    conv2d_how,
    linear,
    linear_kernel,
    pack_kernel,
    packed_form_kernel,
    rows_as_pixels,
    trained_linear,
)

# torch multiplies float32 by MKL, which on other processors than Intel's makes no use of AVX-512. On Intel's it is as
# fast where weights change at each step, not where they are kept packed and what follows is done in the cache. With
# AVX2 alone, it is the faster one for gradients to weights. Where AVX-512 is not wider than AVX2, cvfast gains less by
# its product, and not where little is computed or, in training, on few rows.
_ISA = _library.C.best_isa() if _library.C is not None else "none"
_INFERS_ON_MKL = _ISA not in ("avx2", "avx512")
_TRAINS_ON_MKL = _INFERS_ON_MKL or _library.C.made_by_intel
_WEIGHT_GRADS_ON_MKL = _ISA != "avx512"
_GAINS_LESS = _library.C is not None and _library.C.halves_avx512
_LEAST_ROWS = 16
_LEAST_ROWS_TO_TRAIN = 1024 if _GAINS_LESS else _LEAST_ROWS
_LEAST_PRODUCTS = 8_000_000 if _GAINS_LESS else 2_000_000
# Where torch makes the weights' gradients: the rest gains a tenth at most, and weights are packed twice a step.
_LEAST_ROWS_BESIDE_MKL = 1536
_LEAST_PRODUCTS_BESIDE_MKL = 32_000_000
_MOST_WEIGHTS_BESIDE_MKL = 1 << 19


def why_not(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Reasons why the compiled kernels cannot run this call."""
    if not input.is_cpu:
        return [f"no kernel of linear for device {input.device.type!r} (there is one for the CPU)"]
    if input.dim() == 0 or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        return ["a weight without rows, or a bias for all outputs, is torch's"]
    if input.is_nested or weight.is_quantized:
        return ["nested and quantized tensors are torch's"]
    return conv2d.why_not(input, weight, bias)


def why_slower(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Where torch's own operator is taken although the kernels could run; figures in docs/benchmarks.md."""
    if torch.compiler.is_exporting():
        return ["a graph that is exported has torch's product"]
    as_parts = torch.is_grad_enabled() and _WEIGHT_GRADS_ON_MKL  # else `run_unasked` would have taken it
    if as_parts or _mkl_is_as_fast() or autocast_dtype(input, "cpu") is not torch.float32:
        return [
            "torch's product is as fast: in training on Intel's processors or where calls are watched; not in float32"
        ]
    if _computes_little(input, weight):
        return [f"few rows or products ({list(input.shape)} by {list(weight.shape)}): torch's takes less time"]
    return []


def _mkl_is_as_fast() -> bool:
    return _TRAINS_ON_MKL if torch.is_grad_enabled() else _INFERS_ON_MKL


def _computes_little(input: Tensor, weight: Tensor) -> bool:
    rows = input.numel() // max(1, weight.shape[-1])
    least = _LEAST_ROWS_TO_TRAIN if torch.is_grad_enabled() else _LEAST_ROWS
    return rows < least or rows * weight.numel() < _LEAST_PRODUCTS


def _gains_beside_mkl(input: Tensor, weight: Tensor) -> bool:
    rows, weights = input.numel() // max(1, weight.shape[-1]), weight.numel()
    enough = rows >= _LEAST_ROWS_BESIDE_MKL and rows * weights >= _LEAST_PRODUCTS_BESIDE_MKL
    return enough and weights <= _MOST_WEIGHTS_BESIDE_MKL


def is_torchs(input: Tensor, weight: Tensor) -> bool:
    """Whether `why_slower` has a reason that is known at once: small products must not wait for a choice."""
    if _mkl_is_as_fast() or torch.compiler.is_exporting() or _computes_little(input, weight):
        return True
    return torch.is_grad_enabled() and _WEIGHT_GRADS_ON_MKL and not _gains_beside_mkl(input, weight)


_operator = torch.ops.cvfast.conv2d.default


def run(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes and meaning as in cvfast.functional.linear."""
    output = run_with_activation("none", 0.0, input, weight, bias)
    return linear(_operator, input, weight, bias) if output is None else output


def run_with_activation(
    activation: str, negative_slope: float, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """activation(linear(...)) in one pass; None where derivatives or tracers see the parts, or nothing is there."""
    if input.numel() * weight.numel() == 0 or not conv2d.runs_with_epilogue(input, weight, bias):
        return None
    how = conv2d_how(*ONE_BY_ONE, activation, "none")
    return linear_kernel(input, weight, bias, how, packed_weight(input, weight, how), negative_slope)


def packed_weight(input: Tensor, weight: Tensor, how: int = conv2d_how(*ONE_BY_ONE)) -> Tensor | None:
    """As conv2d.packed_weight has it, for rows as pixels."""

    def operands() -> tuple[Tensor, Tensor, int]:
        return rows_as_pixels(input), weight[:, :, None, None], how

    if weight.numel() < conv2d.LEAST_TO_PACK:
        return None
    call = (input.shape, input.stride(), how)
    return packed(call, lambda: packed_form_kernel(*operands()), lambda: pack_kernel(*operands()), weight)


def prepare(
    activation: str, negative_slope: float, weight: Tensor, bias: Tensor | None
) -> Callable[[Tensor, Tensor | None], Tensor | None] | None:
    """`run_with_activation` for one weight and many inputs of some rows and residuals, as conv2d.prepare."""
    if why_not(weight, weight, bias) or not conv2d.may_prepare(weight, bias):
        return None
    how, dtype = conv2d_how(*ONE_BY_ONE, activation, "none"), weight.dtype

    def prepared(input: Tensor, residual: Tensor | None) -> Tensor | None:
        if not conv2d.takes_prepared(input, dtype):
            return None
        if residual is not None:
            if type(residual) is not Tensor or residual.shape != (*input.shape[:-1], weight.shape[0]):
                return None
            residual = residual.contiguous()
        try:
            return linear_kernel(input, weight, bias, how, packed_weight(input, weight, how), negative_slope, residual)
        except RuntimeError:  # what does not fit
            return None

    return prepared


def run_unasked(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, negative_slope: float
) -> Tensor | None:
    """A call that is not `is_torchs`, checked by the kernel alone; None for what needs another look."""
    plain = type(input) is Tensor and type(weight) in (Tensor, Parameter) and input.is_cpu
    if not plain or input.dtype is not torch.float32 or watched(input) or forward_ad._current_level >= 0:
        return None
    how = conv2d_how(*ONE_BY_ONE, activation, "none")
    try:
        if derives((input, weight, bias)):
            fits = _WEIGHT_GRADS_ON_MKL and activation == "none"
            return trained_linear(input, weight, bias, how) if fits else None
        return linear_kernel(input, weight, bias, how, packed_weight(input, weight, how), negative_slope)
    except RuntimeError:  # what does not fit: the checks of every call find better words
        return None
