"""What holds of Winograd's F(4x4, 3x3) on data of large dynamic range, for the forward pass and both gradients."""

from __future__ import annotations

import pytest
import torch

import cvfast
from cvfast import reference
from cvfast.testing.conv2d import WINOGRAD_ERROR

CHANNELS, PIXELS = 32, 24


def results(input, weight, grad, conv2d, stride: int = 1) -> tuple[torch.Tensor, ...]:
    """Output, input gradient and weight gradient of a convolution with padding 1."""
    input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()
    output = conv2d(input, weight, stride=stride, padding=1)
    return output.detach(), *torch.autograd.grad(output, (input, weight), grad)


def fast_and_exact(input, weight, grad) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (cvfast's in float32, the reference's in float64) of the three results."""
    with cvfast.use_backend("ext"):
        fast = results(input, weight, grad, cvfast.functional.conv2d)
    return list(zip(fast, results(input.double(), weight.double(), grad.double(), reference.conv2d), strict=True))


def operands() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, CHANNELS, PIXELS, PIXELS), (CHANNELS, CHANNELS, 3, 3), (2, CHANNELS, PIXELS, PIXELS)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_channels_of_very_different_scale():
    """Channels scaled over 1e-3 to 1e3 don't disturb one another: the bound holds for each output channel by itself,
    each input channel of the input's gradient, and each pair of channels of the weights' gradient."""
    input, weight, grad = operands()
    scale = torch.logspace(-3, 3, CHANNELS)[:, None, None]
    input, weight, grad = input * scale, weight * scale * scale.flip(0)[..., None], grad * scale
    for (fast, exact), dims in zip(fast_and_exact(input, weight, grad), ((0, 2, 3), (0, 2, 3), (2, 3)), strict=True):
        norm = torch.linalg.vector_norm
        error = norm(fast.double() - exact, dim=dims) / norm(exact, dim=dims)
        assert error.max() <= WINOGRAD_ERROR


def test_one_large_pixel():
    """A pixel of 1e6 among pixels of about 1: results of tiles (4x4) whose patches (6x6) lack it keep their bits; in
    the others the error is relative to the large pixel, not to each result. The same for a large output gradient."""
    input, weight, grad = operands()
    y, x, large = 9, 14, 1e6
    calm = fast_and_exact(input, weight, grad)
    factors = weight.abs().max(), weight.abs().max(), max(input.abs().max(), grad.abs().max())
    input[1, 3, y, x] = grad[0, 5, y, x] = large
    wild = fast_and_exact(input, weight, grad)
    for (fast, exact), factor in zip(wild, factors, strict=True):
        assert (fast.double() - exact).abs().max() <= WINOGRAD_ERROR * large * factor

    tiles = torch.arange(PIXELS) // 4 * 4
    near_y, near_x = ((tiles - 1 <= at) & (at < tiles + 5) for at in (y, x))
    for image, (before, _), (after, _) in zip((1, 0), calm, wild, strict=False):
        touched = torch.zeros(2, 1, PIXELS, PIXELS, dtype=torch.bool)
        touched[image, 0] = near_y[:, None] & near_x
        assert torch.equal(after.masked_fill(touched, 0), before.masked_fill(touched, 0))
    # Every weight of input channel 3 and of output channel 5 sums over a large number, and no other does.
    touched = torch.zeros(CHANNELS, CHANNELS, 1, 1, dtype=torch.bool)
    touched[5] = touched[:, 3] = True
    assert torch.equal(wild[2][0].masked_fill(touched, 0), calm[2][0].masked_fill(touched, 0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_weight_gradient_with_a_bad_pixel_is_the_exact_algorithms(value, memory_format, stride):
    """One NaN or Inf in the input or in the output's gradient: the weights' gradient is what strict precision gives."""
    for which in (0, 2):
        tensors = [t.contiguous(memory_format=memory_format) for t in operands()]
        tensors[2] = tensors[2][..., ::stride, ::stride].contiguous(memory_format=memory_format)
        tensors[which][1, 3, 6, 5] = value
        with cvfast.use_backend("ext"):
            fast = results(*tensors, cvfast.functional.conv2d, stride)[2]
            cvfast.set_precision("strict")
            try:
                exact = results(*tensors, cvfast.functional.conv2d, stride)[2]
            finally:
                cvfast.set_precision("fast")
        touched = torch.zeros(CHANNELS, CHANNELS, 3, 3, dtype=torch.bool)
        if which == 0:  # with stride 2 the pixel (6, 5) meets the middle line's outer taps alone
            touched[(slice(None), 3) if stride == 1 else (slice(None), 3, 1, slice(0, 3, 2))] = True
        else:
            touched[3] = True
        assert torch.equal(fast.isfinite(), ~touched)
        torch.testing.assert_close(fast, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", [3, 4])
def test_phases_on_channels_of_very_different_scale(kernel):
    """F(4x4, 2x2) on the phases of stride 2: the bound holds for each channel of either result."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, CHANNELS)
    image = torch.randn(2, CHANNELS, 32, 32, generator=generator) * scale[:, None, None]
    weight = torch.randn(CHANNELS, CHANNELS, kernel, kernel, generator=generator) / scale[:, None, None]
    weight = weight.flip(0) * scale[:, None, None, None]
    for name, operand in (("conv2d", weight.transpose(0, 1)), ("conv_transpose2d", weight)):
        with cvfast.use_backend("ext"):
            fast = getattr(cvfast.functional, name)(image, operand, stride=2, padding=1)
        exact = getattr(reference, name)(image.double(), operand.double(), stride=2, padding=1)
        norm = torch.linalg.vector_norm
        error = norm(fast.double() - exact, dim=(0, 2, 3)) / norm(exact, dim=(0, 2, 3))
        assert error.max() <= WINOGRAD_ERROR


@pytest.mark.parametrize("kernel", [3, 4])
def test_weight_gradient_by_phases_on_channels_of_very_different_scale(kernel):
    """The bound holds for each pair of channels by itself."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, CHANNELS)[:, None, None]
    input, grad = (torch.randn(2, CHANNELS, size, size, generator=generator) * scale for size in (32, 16))
    weight = torch.zeros(CHANNELS, CHANNELS, kernel, kernel)
    with cvfast.use_backend("ext"):
        fast = results(input, weight, grad, cvfast.functional.conv2d, stride=2)[2]
    exact = results(input.double(), weight.double(), grad.double(), reference.conv2d, stride=2)[2]
    norm = torch.linalg.vector_norm
    assert (norm(fast.double() - exact, dim=(2, 3)) / norm(exact, dim=(2, 3))).max() <= WINOGRAD_ERROR


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bad_pixel_within_phases_reaches_its_taps_alone(value, memory_format):
    """A NaN or Inf in a transposed convolution's input: not finite where the definition says, close to it elsewhere."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, CHANNELS, 16, 15, generator=generator).contiguous(memory_format=memory_format)
    weight = torch.randn(CHANNELS, CHANNELS, 4, 4, generator=generator)
    image[0, 3, 6, 5] = value
    with cvfast.use_backend("ext"):
        fast = cvfast.functional.conv_transpose2d(image, weight, stride=2, padding=1)
    exact = reference.conv_transpose2d(image.double(), weight.double(), stride=2, padding=1)
    assert (~exact.isfinite()).sum() == CHANNELS * 4 * 4
    torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)
