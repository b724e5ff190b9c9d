"""Triton's interpreter, made strict enough to judge kernels.

The stock interpreter reads and writes any address it is given, computes with the bit patterns of bfloat16, takes TF32
products in full float32 and leaves the order of sums to BLAS. `strict()` replaces its two working classes by these:

- every access has to hit an element of a tensor that was passed to the launch (not merely its storage);
- no element may be stored by one program and loaded or stored by another, nor twice by one store: programs have no
  order on a GPU (atomics are exempt);
- float32 products with `input_precision="tf32"`, Triton's default, round their operands as the hardware does;
- products are added one after the other, as a GPU's fused multiply-adds are, wherever in the tile an element lies;
- bfloat16 is stored, converted and multiplied by `tl.dot` exactly; other arithmetic in it is refused, because kernels
  are to compute in float32.

An error comes out as triton's InterpreterError, whose text names the program and what it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

NOBODY, SEVERAL = -1, -2


class Memory:
    """The elements of one tensor of a launch, and which program has loaded and stored each."""

    def __init__(self, tensor: torch.Tensor):
        offsets = np.zeros(1, np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
        self.itemsize = tensor.element_size()
        self.addresses = np.unique(tensor.data_ptr() + offsets * self.itemsize).astype(np.uint64)
        self.loaded_by = np.full(self.addresses.size, NOBODY)
        self.stored_by = np.full(self.addresses.size, NOBODY)

    def index(self, addresses: np.ndarray, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        """Which addresses are elements of this tensor, and the indices of those."""
        index = np.searchsorted(self.addresses, addresses) % self.addresses.size
        inside = (self.addresses[index] == addresses) & (itemsize == self.itemsize)
        return inside, index[inside]

    def load(self, index: np.ndarray, program: int) -> None:
        _refuse_others(self.stored_by[index], program, "loads what program {} stores")
        before = self.loaded_by[index]
        self.loaded_by[index] = np.where((before == NOBODY) | (before == program), program, SEVERAL)

    def store(self, index: np.ndarray, program: int) -> None:
        if np.unique(index).size < index.size:
            raise RuntimeError(f"program {program} stores one element twice at once")
        _refuse_others(self.stored_by[index], program, "stores what program {} stores")
        _refuse_others(self.loaded_by[index], program, "stores what program {} loads")
        self.stored_by[index] = program

    def update(self, index: np.ndarray, program: int) -> None:
        """Atomic: any program, in any order."""


def _refuse_others(owners: np.ndarray, program: int, deed: str) -> None:
    others = owners[(owners != NOBODY) & (owners != program)]
    if others.size:
        other = "several" if others[0] == SEVERAL else others[0]
        raise RuntimeError(f"race: program {program} " + deed.format(other))


class StrictBuilder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with memory watched and the number formats of the hardware."""

    memories: list[Memory] = []

    @property
    def program(self) -> int:
        """Number of the running program, x fastest."""
        (x, y, z), (nx, ny, _) = self.grid_idx, self.grid_dim
        return (z * ny + y) * nx + x

    def watch(self, access: str, pointers: TensorHandle, mask: np.ndarray | bool) -> None:
        """Checks that every address under `mask` may be loaded, stored or updated, and notes who did."""
        itemsize = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        addresses = np.asarray(pointers.data)[np.broadcast_to(mask, np.shape(pointers.data))]
        for memory in self.memories:
            inside, index = memory.index(addresses, itemsize)
            getattr(memory, access)(index, self.program)
            addresses = addresses[~inside]
        if addresses.size:
            raise IndexError(f"program {self.program}: {access} of {addresses.size} elements outside of all tensors")

    def create_masked_load(self, ptrs, mask, *rest, **modifiers):
        self.watch("load", ptrs, mask.data)
        return super().create_masked_load(ptrs, mask, *rest, **modifiers)

    def create_masked_store(self, ptrs, value, mask, *rest, **modifiers):
        self.watch("store", ptrs, mask.data)
        return super().create_masked_store(ptrs, value, mask, *rest, **modifiers)

    def create_atomic_rmw(self, op, ptr, val, mask, *rest):
        self.watch("update", ptr, mask.data)
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr, *rest):
        self.watch("update", ptr, True)
        return super().create_atomic_cas(ptr, *rest)

    def create_dot(self, a, b, d, input_precision, *rest):
        if _is_bfloat16(a):
            a, b = widened(a), widened(b)
        elif a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = tf32(a), tf32(b)
        elif a.dtype.scalar not in (tl.float16, tl.float32, tl.float64):
            return super().create_dot(a, b, d, input_precision, *rest)
        left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data
        for k in range(left.shape[-1]):
            total = (left[..., :, k : k + 1] * right[..., k : k + 1, :] + total).astype(total.dtype)
        return TensorHandle(total, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == tl.bfloat16:
            return super().cast_impl(widened(src), dst_type)
        if target == tl.bfloat16:
            return narrowed(super().cast_impl(src, tl.float32))
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        to_nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if _is_bfloat16(src) or (dst_type.scalar == tl.bfloat16 and to_nearest):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def unary_op(self, arg, op):
        refuse_bfloat16(arg)
        return super().unary_op(arg, op)

    def binary_op(self, lhs, rhs, op):
        refuse_bfloat16(lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def create_fma(self, x, y, z):
        refuse_bfloat16(x, y, z)
        return super().create_fma(x, y, z)


class StrictExecutor(interpreter.GridExecutor):
    """A launch: lets the builder know the tensors that it was given."""

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        self.builder.memories = [Memory(tensor) for tensor in _tensors((*args, *kwargs.values())) if tensor.numel()]
        return args, kwargs

    @property
    def builder(self) -> StrictBuilder:
        return interpreter.interpreter_builder


def _tensors(args: tuple) -> Iterator[torch.Tensor]:
    """All tensors among launch arguments, from tuples and descriptors too."""
    for arg in args:
        arg = getattr(arg, "base", arg)
        if isinstance(arg, tuple):
            yield from _tensors(arg)
        elif isinstance(arg, torch.Tensor):
            yield arg


def _strict_check_tensor(self, input) -> None:
    """Reductions and scans check their operands by this."""
    refuse_bfloat16(*(arg.handle for arg in input))
    _check_tensor(self, input)


_check_tensor = interpreter.ReduceScanOpInterface.check_tensor


@contextmanager
def strict() -> Iterator[None]:
    """Within the block every interpreted launch is a strict one."""
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    before = builder.__class__
    builder.__class__, interpreter.GridExecutor = StrictBuilder, StrictExecutor
    interpreter.ReduceScanOpInterface.check_tensor = _strict_check_tensor
    try:
        yield
    finally:
        builder.__class__, interpreter.GridExecutor = before, executor
        interpreter.ReduceScanOpInterface.check_tensor = _check_tensor


# Number formats. A bfloat16 handle holds the upper 16 bits of the float32 of the same value, as uint16.


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def refuse_bfloat16(*handles: TensorHandle) -> None:
    if any(map(_is_bfloat16, handles)):
        raise TypeError("arithmetic in bfloat16: convert to float32 first")


def widened(handle: TensorHandle) -> TensorHandle:
    """bfloat16 -> float32, exact."""
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(handle: TensorHandle) -> TensorHandle:
    """float32 -> bfloat16, rounded to nearest even, as torch and the hardware do; NaN stays NaN."""
    rounded = torch.from_numpy(np.array(handle.data, np.float32)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def tf32(handle: TensorHandle) -> TensorHandle:
    """float32 with 10 bits of mantissa, rounded to nearest, ties away from zero (PTX cvt.rna.tf32); stays float32."""
    bits = np.array(handle.data, np.float32).view(np.uint32)
    rounded = np.where(np.isfinite(handle.data), (bits + 0x1000) & np.uint32(0xFFFFE000), bits)
    return TensorHandle(rounded.astype(np.uint32).view(np.float32), tl.float32)
