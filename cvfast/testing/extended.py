"""Torch's operators and autograd in extended precision: what results in float64 are measured against.

An `Extended` passes for a float64 tensor, so that the references run on it as they are, forwards and backwards. Its
elements are numpy's longdoubles: 64 bits of mantissa on x86 where float64 has 53, 113 under Linux on Arm.
"""

from __future__ import annotations

from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten

# Not on Windows and on Apple's Arm, where a longdouble is a float64. Carriers (see Extended) have 16 bytes.
AVAILABLE = np.finfo(np.longdouble).eps <= 2.0**-63 and np.dtype(np.longdouble).itemsize == 16


class Extended(Tensor):
    """A tensor of longdoubles, which lie in the 16 bytes of the elements of `carrier`, a complex128 tensor.

    What only moves elements torch does with the carrier (`MOVES`); arithmetic is numpy's, on the same memory
    (`ARITHMETIC`). An operator that neither lists is refused, so nothing is computed in float64 unnoticed.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, carrier: Tensor) -> Extended:
        place = {"strides": carrier.stride(), "storage_offset": carrier.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, carrier.shape, **place, dtype=torch.float64)

    def __init__(self, carrier: Tensor):
        self.carrier = carrier

    def __repr__(self) -> str:
        return f"Extended({_numbers(self)})"

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        function, representation = (operator, _carrier) if operator in MOVES else (ARITHMETIC.get(operator), _numbers)
        if function is None:
            raise NotImplementedError(f"{operator} is not implemented in extended precision")
        mutable = operator._schema.is_mutable
        if mutable and not isinstance(args[0], Extended):
            raise TypeError(f"{operator} would round to {args[0].dtype}")
        result = function(*tree_map(representation, args), **tree_map(representation, kwargs or {}))
        return args[0] if mutable else tree_map(_wrapped, result)


def extended(tensor: Tensor) -> Extended:
    """The same values. Skips the test where numpy has no type that is wider than float64."""
    if not AVAILABLE:
        raise SkipTest("numpy's longdouble is no wider than float64 here: nothing to measure float64 against")
    return _wrapped(_numbers(tensor.detach()))


def widened(tensor: Tensor) -> Tensor:
    """The same values in a type whose rounding is small beside the tensor's own: extended for float64, else float64."""
    return extended(tensor) if tensor.dtype == torch.float64 else tensor.detach().to(torch.float64)


def rounded(tensor: Tensor) -> Tensor:
    """The nearest float64 tensor; one that is not extended stays as it is."""
    return torch.from_numpy(np.asarray(_numbers(tensor), np.float64)) if isinstance(tensor, Extended) else tensor


def _numbers(arg):
    """A tensor as an array, of longdoubles unless it has integers or bools; anything else as it is."""
    if isinstance(arg, Extended):
        return arg.carrier.numpy().view(np.longdouble)
    if isinstance(arg, Tensor):
        return arg.numpy().astype(np.longdouble) if arg.is_floating_point() else arg.numpy()
    return arg


def _carrier(arg):
    """The carrier of a tensor with a fraction, and a carrier's dtype; anything else as it is."""
    if arg is torch.float64:
        return torch.complex128
    if isinstance(arg, Extended):
        return arg.carrier
    return extended(arg).carrier if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def _wrapped(result):
    """The tensor that an array or a carrier stands for; anything else as it is."""
    if isinstance(result, (np.ndarray, np.generic)):
        array = np.asarray(result)
        if array.dtype != np.longdouble:
            return torch.from_numpy(array)
        result = torch.from_numpy(array.view(np.complex128))
    return Extended(result) if isinstance(result, Tensor) and result.dtype == torch.complex128 else result


MOVES = {
    aten._unsafe_view.default,
    aten.alias.default,
    aten.as_strided.default,
    aten.cat.default,
    aten.clone.default,
    aten.copy_.default,
    aten.detach.default,
    aten.expand.default,
    aten.new_empty_strided.default,
    aten.new_zeros.default,
    aten.permute.default,
    aten.select.int,
    aten.select_backward.default,
    aten.slice.Tensor,
    aten.slice_backward.default,
    aten.split.Tensor,
    aten.squeeze.dim,
    aten.stack.default,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.where.self,
    aten.zeros_like.default,
}


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """numpy has no BLAS for longdoubles; dot products of contiguous rows take a third of its matmul's time."""
    rows, columns = np.ascontiguousarray(a), np.ascontiguousarray(b.swapaxes(-1, -2))
    return np.einsum("...ik,...jk->...ij", rows, columns)


def _pad(a: np.ndarray, widths: list[int], value: float = 0) -> np.ndarray:
    """torch counts from the last dimension; its gradient's widths are negative and crop."""
    pairs = [(0, 0)] * (a.ndim - len(widths) // 2) + list(zip(widths[-2::-2], widths[::-2], strict=True))
    kept = tuple(slice(max(0, -b), size + min(0, e)) for size, (b, e) in zip(a.shape, pairs, strict=True))
    return np.pad(a[kept], np.maximum(pairs, 0), constant_values=value)


def _sum(a: np.ndarray, dim=(), keepdim: bool = False) -> np.ndarray:
    return a.sum(tuple(dim) or None, keepdims=keepdim)


def _softmax(a: np.ndarray, dim: int, half_to_float: bool) -> np.ndarray:
    powers = np.exp(a - a.max(dim, keepdims=True, initial=-np.inf))
    return powers / powers.sum(dim, keepdims=True)


def _softmax_backward(grad: np.ndarray, output: np.ndarray, dim: int, input_dtype: torch.dtype) -> np.ndarray:
    return output * (grad - (grad * output).sum(dim, keepdims=True))


ARITHMETIC = {
    aten._softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.add.Tensor: np.add,
    aten.add_.Tensor: lambda a, b: np.add(a, b, out=a),
    aten.bmm.default: _product,
    aten.constant_pad_nd.default: _pad,
    aten.eq.Scalar: np.equal,
    aten.masked_fill.Scalar: lambda a, mask, value: np.where(mask, value, a),
    aten.mm.default: _product,
    aten.mul.Tensor: np.multiply,
    aten.mv.default: lambda a, b: (a * b).sum(-1),
    aten.ne.Scalar: np.not_equal,
    aten.neg.default: np.negative,
    aten.ones_like.default: lambda a, *, pin_memory, memory_format: np.ones_like(a),
    aten.relu.default: lambda a: np.maximum(a, 0),
    aten.rsub.Scalar: lambda a, b: b - a,
    aten.sigmoid.default: lambda a: 1 / (1 + np.exp(-a)),
    aten.sigmoid_backward.default: lambda grad, output: grad * (1 - output) * output,
    aten.sub.Tensor: np.subtract,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.tanh.default: np.tanh,
    aten.tanh_backward.default: lambda grad, output: grad * (1 - output * output),
    aten.threshold_backward.default: lambda grad, a, threshold: np.where(a > threshold, grad, 0),
}
