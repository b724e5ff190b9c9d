"""Depthwise convolutions of images so large that the kernels ask for their memory ahead; one sample of them is not."""

from __future__ import annotations

import pytest
import torch

import cvfast
from cvfast.testing import relative_error

SHAPE = (8, 192, 33, 32)  # 6 MiB


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_large_images_give_the_results_of_small_ones(stride, memory_format):
    """Result and gradient to the input bit by bit those of each sample alone; the weight's gradient against float64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SHAPE, generator=generator).contiguous(memory_format=memory_format)
    weight = torch.randn(SHAPE[1], 1, 3, 3, generator=generator)

    def results(images, weight, backend):
        operands = images.clone().requires_grad_(), weight.clone().requires_grad_()
        result = cvfast.functional.conv2d(*operands, stride=stride, padding=1, groups=SHAPE[1], backend=backend)
        return result, *torch.autograd.grad(result, operands, result.detach())

    result, grad_images, grad_weight = results(images, weight, "ext")
    for i in range(len(images)):
        alone, grad_alone, _ = results(images[i : i + 1], weight, "ext")
        assert torch.equal(alone, result[i : i + 1]) and torch.equal(grad_alone, grad_images[i : i + 1])
    *_, exact = results(images.double(), weight.double(), "native")
    assert relative_error(grad_weight, exact) < 2e-6
