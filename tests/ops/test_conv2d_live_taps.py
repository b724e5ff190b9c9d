"""conv2d on maps so small that outer taps of the kernel meet nothing but padding; test_operators.py has more."""

from __future__ import annotations

import pytest
import torch

from cvfast import functional
from cvfast.testing.conv2d import WINOGRAD_ERROR

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_infinite_numbers_make_nan_of_padding(memory_format):
    """As with more pixels; packed weights, which are kept from the second call on, know it as well."""
    input, weight = torch.randn(2, 64, 1, 1), torch.randn(64, 64, 3, 3).contiguous(memory_format=memory_format)
    weight[3, 5, 0, 1] = torch.inf
    with torch.no_grad():
        for _ in range(3):
            result = functional.conv2d(input, weight, padding=1, backend="ext")
            assert result[:, 3].isnan().all() and result[:, :3].isfinite().all() and result[:, 4:].isfinite().all()
    grad = torch.randn(2, 64, 1, 1)
    for value in (1.0, torch.nan):
        grad[1, 7] = value
        gradient = torch.ops.cvfast.conv2d_weight_grad(grad, input, weight.shape, (1, 1), (1, 1), (1, 1), 1)
        assert gradient[7].isnan().all() == (value != value) and gradient[:7].isfinite().all()
        assert (gradient[:7, :, 0] == 0).all() and (gradient[:7, :, 1, 1] != 0).all()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_kept_weight_serves_maps_of_all_sizes(memory_format):
    weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=memory_format)
    with torch.no_grad():
        for size in (1, 1, 8, 8, 1, 2, 2, 1, 8):
            input = torch.randn(2, 64, size, size)
            exact = torch.nn.functional.conv2d(input.double(), weight.double(), padding=1)
            result = functional.conv2d(input, weight, padding=1, backend="ext")
            assert (result.double() - exact).norm() < WINOGRAD_ERROR * exact.norm()
