"""The assertion that all tests lean on can fail: each kind of wrong result is refused."""

import pytest
import torch

from cvfast.testing import assert_as_accurate, relative_error, widened

EXACT = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NATIVE = EXACT.to(torch.float32)


def test_torchs_own_result_passes():
    assert_as_accurate(NATIVE, NATIVE, EXACT)


def test_relative_error_is_relative():
    assert relative_error(1.01 * EXACT, EXACT) == pytest.approx(0.01)
    assert relative_error(torch.ones(1), torch.zeros(1, dtype=torch.float64)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_errors_of_ten_units_in_the_last_place_are_refused(dtype):
    native, eps = EXACT.to(dtype), torch.finfo(dtype).eps
    exact, stand_in = (widened(EXACT), (NATIVE, EXACT)) if dtype == torch.float64 else (EXACT, None)
    wrong = (EXACT * (1 + 10 * eps)).to(dtype)
    assert_as_accurate(native, native, exact, stand_in=stand_in)
    with pytest.raises(AssertionError, match="relative_error .*, torch has"):
        assert_as_accurate(wrong, native, exact, stand_in=stand_in)


def test_one_wrong_element_is_refused():
    wrong = NATIVE.clone()
    wrong[17] += 1e-4
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(wrong, NATIVE, EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_must_stand_where_the_references_do(value):
    wrong = NATIVE.clone()
    wrong[17] = value
    with pytest.raises(AssertionError):
        assert_as_accurate(wrong, NATIVE, EXACT)
    exact = EXACT.clone()
    exact[17] = value
    with pytest.raises(AssertionError, match="NaN and Inf in other places"):
        assert_as_accurate(NATIVE, NATIVE, exact)
    assert_as_accurate(wrong, wrong, exact)


def test_shapes_and_dtypes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(NATIVE[:5], NATIVE, EXACT)
    with pytest.raises(AssertionError, match="torch gives torch.float32"):
        assert_as_accurate(EXACT, NATIVE, EXACT)
    with pytest.raises(AssertionError, match="oracle must be float64"):
        assert_as_accurate(NATIVE, NATIVE, NATIVE)
