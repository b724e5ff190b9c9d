"""The strict interpreter catches planted mistakes, lets sound kernels pass and rounds as the hardware does."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def copy(source, target, count, BLOCK: tl.constexpr):
    """The sound kernel."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < count).to(target.dtype.element_ty), mask=i < count)


@triton.jit
def fill(target, first, step, BLOCK: tl.constexpr):
    """Program p stores BLOCK elements from first + p * step on."""
    i = first + tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(target + i, tl.zeros((BLOCK,), target.dtype.element_ty))


@triton.jit
def pass_on(data):
    """Program p moves element p to p + 1."""
    p = tl.program_id(0)
    tl.store(data + p + 1, tl.load(data + p))


@triton.jit
def pull_back(data):
    """Program p moves element p + 1 to p."""
    p = tl.program_id(0)
    tl.store(data + p, tl.load(data + p + 1))


@triton.jit
def store_all_to_one(target, BLOCK: tl.constexpr):
    tl.store(target + tl.arange(0, BLOCK) * 0, tl.arange(0, BLOCK))


@triton.jit
def count_up(target, BLOCK: tl.constexpr):
    tl.atomic_add(target + tl.arange(0, BLOCK) * 0, 1)


@triton.jit
def read_tile(source, row):
    source.load([row, 0])


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def total(source, target, BLOCK: tl.constexpr):
    tl.store(target, tl.sum(tl.load(source + tl.arange(0, BLOCK)).to(target.dtype.element_ty)))


@triton.jit
def double(source, target, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(source + i)
    tl.store(target + i, x + x)


def test_a_sound_kernel_passes():
    source, target = torch.randn(50), torch.zeros(50)
    copy[(4,)](source, target, 50, BLOCK=16)
    assert torch.equal(target, source)


def test_load_past_the_end():
    with pytest.raises(InterpreterError, match="program 3: load of 14 elements outside"):
        copy[(4,)](torch.randn(50), torch.zeros(64), 64, BLOCK=16)


def test_store_past_the_end():
    with pytest.raises(InterpreterError, match="program 3: store of 14 elements outside"):
        copy[(4,)](torch.randn(64), torch.zeros(50), 64, BLOCK=16)


def test_store_before_the_start():
    with pytest.raises(InterpreterError, match="program 0: store of 1 elements outside"):
        fill[(1,)](torch.zeros(20)[4:], -1, 0, BLOCK=16)


def test_store_between_the_elements_of_a_strided_tensor():
    """The storage has that address, the tensor has not."""
    with pytest.raises(InterpreterError, match="store of 8 elements outside"):
        fill[(1,)](torch.zeros(32)[::2], 0, 0, BLOCK=16)


def test_access_through_a_descriptor():
    tiles = TensorDescriptor.from_tensor(torch.zeros(8, 4), [4, 4])
    read_tile[(1,)](tiles, 6)  # rows 8 and 9 are masked by the descriptor
    tiles.shape = [10, 4]
    with pytest.raises(InterpreterError, match="load of 8 elements outside"):
        read_tile[(1,)](tiles, 6)


def test_two_programs_store_to_one_element():
    fill[(2,)](torch.zeros(32), 0, 16, BLOCK=16)
    with pytest.raises(InterpreterError, match="race: program 1 stores what program 0 stores"):
        fill[(2,)](torch.zeros(32), 0, 15, BLOCK=16)


def test_a_program_loads_what_another_stores():
    with pytest.raises(InterpreterError, match="race: program 1 loads what program 0 stores"):
        pass_on[(2,)](torch.zeros(3))


def test_a_program_stores_what_another_loads():
    with pytest.raises(InterpreterError, match="race: program 1 stores what program 0 loads"):
        pull_back[(2,)](torch.zeros(3))


def test_one_store_hits_an_element_twice():
    with pytest.raises(InterpreterError, match="stores one element twice"):
        store_all_to_one[(1,)](torch.zeros(1, dtype=torch.int32), BLOCK=4)


def test_atomics_may_meet_but_stay_inside():
    target = torch.zeros(1, dtype=torch.int32)
    count_up[(3,)](target, BLOCK=4)
    assert target.item() == 12
    with pytest.raises(InterpreterError, match="update of 4 elements outside"):
        count_up[(1,)](torch.zeros(0, dtype=torch.int32), BLOCK=4)


@pytest.mark.parametrize("precision", ["ieee", "tf32", None])
def test_product_in_float32(precision):
    """Only "ieee" is exact to float32; tf32, the default, shows the rounding of its operands."""
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    c = torch.empty(32, 32)
    product[(1,)](a, b, c, PRECISION=precision, SIZE=32)
    error = (c - a.double() @ b.double()).abs().max()
    assert error < 1e-5 if precision == "ieee" else 1e-3 < error < 2e-2


def test_tf32_rounds_to_nearest_and_ties_away_from_zero():
    ulp = 2.0**-10  # of TF32 at 1
    values = [1 + ulp / 2, -1 - ulp / 2, 1 + ulp * 0.49, 1 + ulp * 1.5, 3.0, 0.0, float("inf")]
    rounded = [1 + ulp, -1 - ulp, 1.0, 1 + ulp * 2, 3.0, 0.0, float("inf")]
    a, c = torch.zeros(16, 16), torch.empty(16, 16)
    a[: len(values), 0] = torch.tensor(values)
    unit = torch.zeros(16, 16)
    unit[0] = 1
    product[(1,)](a, unit, c, PRECISION="tf32", SIZE=16)
    assert c[: len(values), 0].tolist() == rounded


SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40, -1e-40, 1.00390625, 1.01171875]


def test_float32_to_bfloat16():
    """Bit for bit torch's conversion: ties to even, subnormals, overflow to infinity, NaN."""
    source = torch.cat([torch.tensor(SPECIAL), torch.randn(1000)])
    target = torch.empty(source.numel(), dtype=torch.bfloat16)
    copy[(1,)](source, target, source.numel(), BLOCK=1024)
    torch.testing.assert_close(target, source.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    assert target[1].view(torch.int16) == torch.tensor(-0.0).bfloat16().view(torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_bfloat16_to_others(dtype):
    source = torch.cat([torch.tensor(SPECIAL), torch.randn(100)]).to(torch.bfloat16)
    target = torch.empty(source.numel(), dtype=dtype)
    copy[(1,)](source, target, source.numel(), BLOCK=128)
    torch.testing.assert_close(target, source.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_product_in_bfloat16():
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    c = torch.empty(32, 32)
    product[(1,)](a, b, c, PRECISION=None, SIZE=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-5)


def test_arithmetic_in_bfloat16_is_refused():
    source = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="arithmetic in bfloat16"):
        double[(1,)](source, torch.empty_like(source), BLOCK=16)
    with pytest.raises(InterpreterError, match="arithmetic in bfloat16"):
        total[(1,)](source, torch.empty(1, dtype=torch.bfloat16), BLOCK=16)
    target = torch.empty(1)
    total[(1,)](source, target, BLOCK=16)
    assert target.item() == 16
