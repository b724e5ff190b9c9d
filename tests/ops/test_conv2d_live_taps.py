"""conv2d on maps so small that outer taps of the kernel meet nothing but padding; test_operators.py has more."""

from __future__ import annotations

import pytest
import torch

from cvfast import functional

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_taps_on_padding_do_not_count(memory_format):
    input, weight = torch.randn(2, 20, 1, 1), torch.full((40, 20, 3, 3), torch.inf)
    weight[:, :, 1, 1] = torch.randn(40, 20)
    weight = weight.contiguous(memory_format=memory_format).requires_grad_()
    result = functional.conv2d(input, weight, padding=1, backend="ext")
    torch.testing.assert_close(result, torch.nn.functional.conv2d(input, weight[:, :, 1:2, 1:2]))
    result.sum().backward()
    assert weight.grad.stride() == weight.stride()
    live = torch.zeros(3, 3, dtype=torch.bool)
    live[1, 1] = True
    assert (weight.grad[:, :, ~live] == 0).all() and (weight.grad[:, :, live] != 0).all()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_kept_weight_serves_maps_of_all_sizes(memory_format):
    weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=memory_format)
    with torch.no_grad():
        for size in (1, 1, 8, 8, 1, 2, 2, 1, 8):
            input = torch.randn(2, 64, size, size)
            exact = torch.nn.functional.conv2d(input.double(), weight.double(), padding=1)
            result = functional.conv2d(input, weight, padding=1, backend="ext")
            assert (result - exact).norm() <= 4e-6 * exact.norm()  # Winograd's bound
