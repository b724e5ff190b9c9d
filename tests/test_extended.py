"""Extended precision is what it says: against fractions and decimals, which have as many digits as one asks for."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from unittest import SkipTest

import pytest
import torch
from torch import Tensor

from cvfast.testing import SPECS, assert_as_accurate, extended, relative_error
from cvfast.testing.extended import Extended, rounded, widened
from tests.ops.test_operators import derivatives

pytestmark = pytest.mark.skipif(not extended.AVAILABLE, reason="numpy's longdouble is no wider than float64 here")

TINY = 2.0**-60  # beside 1, beyond float64
VALUES = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fractions(tensor: Tensor) -> list[Fraction]:
    """The exact values, each of them a sum of two float64 numbers."""
    high = rounded(tensor)
    low = rounded(tensor - high)
    return [Fraction(h) + Fraction(x) for h, x in zip(high.flatten().tolist(), low.flatten().tolist(), strict=True)]


def assert_near(actual: Tensor, exact: list[Fraction | Decimal]) -> None:
    """Within a few units in the last place of 64 bits; numbers rounded to float64 would not be."""
    exact = [Fraction(e) for e in exact]
    largest = max(map(abs, exact))
    assert max(abs(a - e) for a, e in zip(fractions(actual), exact, strict=True)) < largest * Fraction(2) ** -60
    assert max(abs(Fraction(float(e)) - e) for e in exact) > largest * Fraction(2) ** -56


def test_values_make_the_round_trip():
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 5e-324, 1.7e308], dtype=torch.float64)
    for values in (VALUES, special, VALUES.t(), VALUES[0, 0], VALUES[:0]):
        torch.testing.assert_close(rounded(widened(values)), values, rtol=0, atol=0, equal_nan=True)


def test_widened_is_wider_than_the_tensor():
    assert isinstance(widened(VALUES), Extended)
    narrow = VALUES.float()
    assert type(widened(narrow)) is Tensor and torch.equal(widened(narrow), narrow.double())


def test_small_terms_survive_cancellation_and_movement():
    x = widened(torch.ones(2, 3, dtype=torch.float64)) + TINY
    moved = torch.cat([x.t()[1:], x[:, :2]], 1)
    assert torch.equal(rounded(moved - 1), torch.full((2, 4), TINY, dtype=torch.float64))
    total = x.new_zeros(3)
    total[1:] += x[0, 1:]
    assert rounded(total - 1).tolist() == [-1, TINY, TINY]


def test_padding_and_its_gradient():
    pad = torch.nn.functional.pad
    x, cotangent = widened(VALUES).requires_grad_(), torch.arange(48, dtype=torch.float64).view(6, 8)
    padded = pad(x, (1, 0, 3, -2), value=2.5)
    (grad,) = torch.autograd.grad(padded, x, widened(cotangent))
    assert torch.equal(rounded(padded), pad(VALUES, (1, 0, 3, -2), value=2.5))
    assert torch.equal(rounded(grad), pad(cotangent, (-1, 0, -3, 2)))


def test_products_and_their_gradients():
    a, b, cotangent = widened(VALUES).requires_grad_(), widened(VALUES.flip(1)), widened(VALUES @ VALUES.t())
    product = a @ b.t()
    (grad,) = torch.autograd.grad(product, a, cotangent)
    x, y, g = (rounded(tensor).tolist() for tensor in (a, b, cotangent))
    dot = lambda u, v: sum(Fraction(s) * Fraction(t) for s, t in zip(u, v, strict=True))  # noqa: E731
    assert_near(product, [dot(row, column) for row in x for column in y])
    assert_near(grad, [dot(row, column) for row in g for column in zip(*y, strict=True)])


def tanh(x: Decimal) -> tuple[Decimal, Decimal]:
    value = ((2 * x).exp() - 1) / ((2 * x).exp() + 1)
    return value, 1 - value**2


def sigmoid(x: Decimal) -> tuple[Decimal, Decimal]:
    value = 1 / (1 + (-x).exp())
    return value, value * (1 - value)


@pytest.mark.parametrize("function", [tanh, sigmoid], ids=lambda f: f.__name__)
def test_functions_and_their_gradients(function):
    x = widened(VALUES).requires_grad_()
    value = getattr(torch, function.__name__)(x)
    (grad,) = torch.autograd.grad(value.sum(), x)
    with localcontext(prec=60):
        values, slopes = zip(*(function(Decimal(v)) for v in VALUES.flatten().tolist()), strict=True)
    assert_near(value, values)
    assert_near(grad, slopes)


def test_softmax_and_its_gradient():
    x = widened(VALUES[0]).requires_grad_()
    weights = x.softmax(-1)
    (grad,) = torch.autograd.grad(weights[2], x)
    with localcontext(prec=60):
        powers = [Decimal(v).exp() for v in VALUES[0].tolist()]
        exact = [p / sum(powers) for p in powers]
        slopes = [exact[2] * ((i == 2) - w) for i, w in enumerate(exact)]
    assert_near(weights, exact)
    assert_near(grad, slopes)


def test_softmax_of_minus_infinity():
    x = widened(VALUES[0]).requires_grad_()
    weights = x.masked_fill(VALUES[0] < 0, -torch.inf).softmax(-1)
    (grad,) = torch.autograd.grad(weights[3], x)
    assert torch.equal(rounded(weights) == 0, VALUES[0] < 0)
    assert rounded(grad).isfinite().all()


@pytest.mark.parametrize("name", SPECS)
def test_references_give_float64s_results(name):
    """But for float64's error: no operator is mistaken for another."""
    spec = SPECS[name]
    sample = spec.plain().sample(torch.float64)
    results, cotangents, grads = derivatives(spec.reference, sample)
    wide, _, wide_grads = derivatives(spec.reference, sample.map(widened), tuple(map(widened, cotangents)))
    errors = [relative_error(*pair) for pair in zip((*results, *grads), (*wide, *wide_grads), strict=True)]
    assert 0 < max(errors) < 20 * torch.finfo(torch.float64).eps


def test_errors_below_float64s_precision_are_seen():
    exact = widened(VALUES) * (1 + widened(torch.tensor(TINY, dtype=torch.float64)))
    assert relative_error(VALUES, exact) == pytest.approx(TINY)
    assert_as_accurate(VALUES, VALUES, exact)


def test_what_is_not_listed_is_refused():
    with pytest.raises(NotImplementedError, match="aten.erf.default is not implemented in extended precision"):
        torch.erf(widened(VALUES))
    with pytest.raises(TypeError, match="aten.copy_.default would round to torch.float64"):
        VALUES.clone().copy_(widened(VALUES))


def test_tests_are_skipped_where_nothing_is_wider(monkeypatch):
    monkeypatch.setattr(extended, "AVAILABLE", False)
    with pytest.raises(SkipTest, match="no wider than float64"):
        widened(VALUES)
