"""Preparation of images for a model, and random changes of training images (augmentation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey: ITU-R BT.601, as Pillow's mode "L"


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [N, C, H, W], uint8 or floating point, at `size` (height, width): antialiased, bilinear."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


class Preparation(nn.Module):
    """From pixels to a model's input: fixed size, values in [0, 1], the model's channels, normalised.

    size: (height, width), or one number for both, that images are resized to (bilinear, antialiased, as torch's
        interpolate); None keeps the size of the images.
    mean, std: per channel, of pixels in [0, 1]; one value serves all channels.
    channels: 1 (grey) or 3 (red, green, blue), what the model takes; as many as `mean` has unless given. Grey
        images become coloured by repeating their channel; coloured ones become grey with ITU-R BT.601's weights.

    The input is [N, C, H, W]: uint8, or floating point that is in [0, 1] already. The output is [N, channels, height,
    width] in the dtype of floating input, in float32 for uint8 (autocast does not change it).

    It holds no parameters, and its buffers are not in the state_dict: `to_config()` holds all of it, as JSON can.
    In front of a model (`nn.Sequential(preparation, model)`) it goes along into torch.export and ONNX, as standard
    operators. Fix height and width of the input there: a resize is exported for the size of the example.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int | Sequence[int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.size = checked_size(size)
        self.channels = len(mean) if channels is None else channels
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (red, green, blue), got {self.channels}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, got {list(std)}")
        self._statistics = {"mean": self._per_channel("mean", mean), "std": self._per_channel("std", std)}
        for name, values in self._statistics.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def _per_channel(self, name: str, values: Sequence[float]) -> list[float]:
        """As many values as there are channels."""
        if len(values) not in (1, self.channels):
            raise ValueError(f"{name} must have 1 or {self.channels} values, one per channel, got {list(values)}")
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} must be finite, got {list(values)}")
        return [float(value) for value in values] * (self.channels // len(values))

    def forward(self, images: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Images [N, C, H, W] -> the model's input.

        augment: called between pixels() and normalize(), with a float batch in [0, 1] that it must return in the same
            shape: an `Augmentation`, or a transform of torchvision or kornia.
        """
        pixels = self.pixels(images)
        if augment is not None:
            pixels = _augmented(pixels, augment)
        return self.normalize(pixels)

    def pixels(self, images: Tensor) -> Tensor:
        """Resized, in [0, 1], in the model's channels; not normalised."""
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [N, 1 or 3, H, W], got {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise TypeError(f"images must be uint8 (0 to 255) or floating point (0 to 1), got {images.dtype}")
        if images.shape[1] > self.channels:  # here, and the other way round below, so that fewer planes are resized
            red, green, blue = images.split(1, dim=1)
            images = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        if self.size is not None:
            images = resized(images, self.size)
        return images if images.shape[1] == self.channels else images.repeat(1, self.channels, 1, 1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """(pixels - mean) / std."""
        return (pixels - self.mean.to(pixels.dtype)) / self.std.to(pixels.dtype)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """The inverse of normalize(), for pictures of what the model saw."""
        return normalized * self.std.to(normalized.dtype) + self.mean.to(normalized.dtype)

    def to_config(self) -> dict[str, Any]:
        """All arguments, as JSON can hold them. `from_config` makes an equal Preparation."""
        return {
            "size": None if self.size is None else list(self.size),
            **{name: list(values) for name, values in self._statistics.items()},
            "channels": self.channels,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preparation:
        """The Preparation that `to_config` described. ValueError for a config with other keys."""
        expected = {"size", "mean", "std", "channels"}
        if set(config) != expected:
            raise ValueError(f"a Preparation's config has the keys {sorted(expected)}, got {sorted(config)}")
        return cls(**config)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.to_config().items())


def checked_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(height, width), or None. ValueError where it isn't one or two positive whole numbers."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(length, int) and length > 0 for length in pair):
        raise ValueError(f"size must be a positive number of pixels or (height, width), got {size}")
    return pair


def _augmented(pixels: Tensor, augment: Callable[[Tensor], Tensor]) -> Tensor:
    result = augment(pixels)
    if not isinstance(result, Tensor) or result.shape != pixels.shape or not result.is_floating_point():
        got = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"augment must return a floating-point batch of shape {list(pixels.shape)}, got {got}")
    return result


class Augmentation:
    """Random flip, rotation, scaling and translation of a whole batch, on the device where the batch is.

    flip: probability that an image is mirrored left to right, 0 to 1.
    rotation: largest angle in degrees; drawn evenly from [-rotation, rotation]. Positive turns anticlockwise.
    scaling: (smallest, largest) factor of magnification, drawn evenly in its logarithm; above 1 enlarges.
    translation: largest shift as a share of height and of width, drawn evenly for each, 0 to 1.
    padding: what shows where the image ends, "reflection" (default) or "zeros".

    Each image has its own draw. Flipping is exact; the rest is one bilinear resampling (torch's affine_grid and
    grid_sample). With all amounts at their default the batch is returned as it is.
    """

    def __init__(
        self,
        flip: float = 0.0,
        rotation: float = 0.0,
        scaling: tuple[float, float] = (1.0, 1.0),
        translation: float = 0.0,
        padding: str = "reflection",
    ) -> None:
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is a probability from 0 to 1, got {flip}")
        if not 0 <= rotation <= 180:
            raise ValueError(f"rotation is an angle from 0 to 180 degrees, got {rotation}")
        if len(scaling) != 2 or not 0 < scaling[0] <= scaling[1] < math.inf:
            raise ValueError(f"scaling is (smallest, largest) with 0 < smallest <= largest, got {scaling}")
        if not 0 <= translation <= 1:
            raise ValueError(f"translation is a share of the image's size from 0 to 1, got {translation}")
        if padding not in ("reflection", "zeros"):
            raise ValueError(f"padding must be 'reflection' or 'zeros', got {padding!r}")
        self.flip = flip
        self.rotation = rotation
        self.scaling = (float(scaling[0]), float(scaling[1]))
        self.translation = translation
        self.padding = padding

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [N, C, H, W], floating point, -> the same shape, dtype and device.

        generator: where the random numbers come from (on its own device, whatever the images'); the same state gives
            the same changes. torch's own generator unless given.
        """
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(f"images must be floating point [N, C, H, W], got {images.dtype} {list(images.shape)}")
        # Always as many numbers, so that one amount does not change the draw of another.
        device = "cpu" if generator is None else generator.device
        draw = torch.rand(5, len(images), generator=generator, device=device).to(images.device)
        if self.flip > 0:
            images = torch.where((draw[0] < self.flip).reshape(-1, 1, 1, 1), images.flip(-1), images)
        if self.rotation == 0 and self.scaling == (1.0, 1.0) and self.translation == 0:
            return images
        centred = 2 * draw - 1
        smallest, largest = map(math.log, self.scaling)
        with torch.autocast(images.device.type, enabled=False):  # half precision would move places by a pixel
            matrices = affine_matrices(
                angle=self.rotation * centred[1],
                scale=torch.exp(smallest + (largest - smallest) * draw[2]),
                shift=self.translation * centred[3:5].T,
                size=(images.shape[-2], images.shape[-1]),
            )
            return warp(images, matrices, self.padding)

    def __repr__(self) -> str:
        amounts = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"Augmentation({amounts})"


def affine_matrices(angle: Tensor, scale: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
    """For `warp`: matrices [N, 2, 3] that turn, magnify and shift an image about its centre, without shearing.

    angle: [N], degrees anticlockwise. scale: [N], factor of magnification. shift: [N, 2], to the right and down, as a
    share of width and height. size: (height, width).

    A matrix takes a place in the output to the place in the input that shows there (so it is the inverse change), both
    in coordinates from -1 to 1 over the image; a turn needs height and width, as these units differ in length.
    """
    height, width = size
    radians = torch.deg2rad(angle)
    cosine, sine = torch.cos(radians) / scale, torch.sin(radians) / scale
    rows = torch.stack((cosine, -sine * height / width, sine * width / height, cosine), dim=1).reshape(-1, 2, 2)
    # input = rows @ (output - 2 * shift): the image spans 2 units.
    offset = rows @ (-2 * shift).unsqueeze(2)
    return torch.cat((rows, offset), dim=2)


def warp(images: Tensor, matrices: Tensor, padding: str = "reflection") -> Tensor:
    """Resamples images [N, C, H, W] by `affine_matrices` [N, 2, 3], bilinearly, in float32 or better."""
    source = images.to(torch.promote_types(images.dtype, torch.float32))
    grid = F.affine_grid(matrices.to(source.dtype), list(source.shape), align_corners=False)
    moved = F.grid_sample(source, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return moved.to(images.dtype)
