"""conv2d's gradient to the bias where nobody differentiates it; test_operators.py has the others."""

from __future__ import annotations

import pytest
import torch

import cvfast
from tests.conftest import isas

SIZES = ((1, 8, 8, 8), (3, 5, 7, 9), (2, 140, 19, 37), (2, 3, 1, 1), (0, 4, 3, 3))


def bias_grad(grad: torch.Tensor) -> torch.Tensor:
    channels = grad.shape[1]
    input, weight = torch.zeros(grad.shape, dtype=grad.dtype), torch.zeros(channels, channels, 1, 1, dtype=grad.dtype)
    bias = torch.zeros(channels, dtype=grad.dtype, requires_grad=True)
    return torch.autograd.grad(cvfast.functional.conv2d(input, weight, bias, backend="ext"), bias, grad)[0]


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_bits_however_the_gradient_lies_in_memory(size, dtype, isa, threads):
    threads(1)
    grad = torch.randn(size, dtype=dtype)
    expected, result = grad.double().sum((0, 2, 3)), bias_grad(grad)
    assert (result - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
    spaced = torch.stack([grad, grad], -1)[..., 0]
    for other in (grad.to(memory_format=torch.channels_last), grad.mT.contiguous().mT, spaced):
        assert torch.equal(bias_grad(other), result)
    threads(2)
    assert torch.equal(bias_grad(grad), result)


def test_a_gradient_that_is_one_number_everywhere():
    assert torch.equal(bias_grad(torch.ones(1, 1, 1, 1).expand(2, 3, 4, 5)), torch.full((3,), 40.0))
