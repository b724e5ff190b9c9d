"""gelu in training, beside the same in float64 and torch's float32."""

from __future__ import annotations

import pytest
import torch

from cvfast import functional
from cvfast.testing import assert_as_accurate
from tests.conftest import isas

SIZES = {"empty": (0,), "one": (1,), "odd": (3, 67), "pieces": (2, 3, 4099), "large": (5, 20011)}
BACKENDS = [("ext", isa) for isa in isas()] + [("native", None)]


def operands(size):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(size, generator=generator)).requires_grad_(), torch.randn(size, generator=generator)


def results(gelu, input, grad):
    output = gelu(input)
    return [output.detach(), *torch.autograd.grad(output, input, grad)]


@pytest.mark.parametrize("backend, isa", BACKENDS, indirect=["isa"], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_result_and_gradient(size, backend, isa, poisoned):
    input, grad = operands(size)
    found = results(lambda x: functional.gelu(x, backend=backend), input, grad)
    torchs = results(torch.nn.functional.gelu, input, grad)
    exact = results(torch.nn.functional.gelu, input.detach().double().requires_grad_(), grad.double())
    for what, one, native, reference in zip(("result", "gradient"), found, torchs, exact, strict=True):
        assert_as_accurate(one, native, reference, what)


@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_far_from_0_and_not_finite(isa):
    values = [0.0, -0.0, 1e-30, 13.0, -13.0, 15.0, -15.0, 1e10, -1e10, float("inf"), float("-inf"), float("nan")]
    input = torch.tensor(values, requires_grad=True)
    found = results(lambda x: functional.gelu(x, backend="ext"), input, torch.ones(len(values)))
    exact = input.detach().double().requires_grad_()  # torch's float32 has NaN for inf
    expected = results(torch.nn.functional.gelu, exact, torch.ones(len(values)).double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-30, equal_nan=True)


def test_same_bits_for_any_threads(threads):
    input, grad = operands((7, 20011))
    threads(1)
    expected = results(functional.gelu, input, grad)
    for count in (2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(results(functional.gelu, input, grad), expected, strict=True))


def test_second_derivatives_and_transforms_are_torchs():
    input, grad = operands((2, 20011))
    output = functional.gelu(input)
    (first,) = torch.autograd.grad(output, input, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), input)
    exact = input.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(torch.nn.functional.gelu(exact), exact, grad.double(), create_graph=True)
    torch.testing.assert_close(second.double(), torch.autograd.grad(first.sum(), exact)[0], rtol=1e-4, atol=1e-4)
    mapped = torch.func.vmap(functional.gelu)(input)
    torch.testing.assert_close(mapped, torch.nn.functional.gelu(input))
    compiled = torch.compile(functional.gelu, fullgraph=True, backend="eager")(input)
    torch.testing.assert_close(compiled, torch.nn.functional.gelu(input))


def test_the_kernel_is_taken_for_large_contiguous_float32():
    input, _ = operands((2, 20011))
    taken = [
        "_Gelu" in str(functional.gelu(x).grad_fn) for x in (input, input[:, ::2], input[:1, :100], input.double())
    ]
    assert taken == [True, False, False, False]
