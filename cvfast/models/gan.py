"""Generators and discriminators: DCGAN (Radford et al. 2016), with labels (Mirza and Osindero 2014), WGAN-GP's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvfast.models.blocks import check_positive
from cvfast.models.entry import Entry, image_inputs
from cvfast.nn import Conv2d, ConvTranspose2d

NORMS = ("batch", "layer", "none")
LARGEST_START = 7  # side of the first feature map: 4 for 32 and 64 pixels as in the paper, 7 for 28


class DCGANGenerator(nn.Module):
    """Random numbers in, images in [-1, 1] out, through transposed convolutions that double the size.

    Args:
        num_classes: 0, or the number of labels that choose what to draw; they join the random numbers as one-hot codes.
        in_chans: channels of the images, default 3.
        image_size: height and width, default 64: a start of 4 to 7 pixels times a power of two, such as 28, 32, 64.
        latent: how many random numbers, default 100.
        width: channels before the image; each layer before has twice as many. Default 128, the paper's.

    Raises:
        ValueError: for a size that cannot be, or labels that are missing or not wanted.
    """

    def __init__(
        self, num_classes: int = 0, in_chans: int = 3, image_size: int = 64, latent: int = 100, width: int = 128
    ) -> None:
        super().__init__()
        check_positive(in_chans=in_chans, latent=latent, width=width)
        self.num_classes, self.latent, self.image_size = _check_classes(num_classes), latent, image_size
        start, doublings = _start(image_size)
        channels = width * 2 ** (doublings - 1)
        layers = _up(latent + num_classes, channels, start, 1, 0)
        for _ in range(doublings - 1):
            layers += _up(channels, channels // 2, 4, 2, 1)
            channels //= 2
        layers += [ConvTranspose2d(channels, in_chans, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(_init)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images [N, C, S, S] of z [N, latent] (normal) and, with classes, labels int64 [N]."""
        if _wants(self, labels):
            z = torch.cat((z, F.one_hot(labels, self.num_classes).to(z.dtype)), 1)
        return self.layers(z[:, :, None, None])

    def sample(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """``count`` images of random numbers drawn from ``generator``, a CPU generator."""
        weight = next(self.parameters())
        return self(torch.randn(count, self.latent, generator=generator).to(weight), labels)


class DCGANDiscriminator(nn.Module):
    """Images in, one score each out (logit of being real, or a critic's value): strided convolutions, LeakyReLU 0.2.

    Args:
        num_classes: 0, or the number of labels; they join the image as one-hot planes.
        in_chans, image_size: as the generator's.
        width: channels after the first layer; each layer that follows has twice as many. Default 128, the paper's.
        norm: "batch" as in the paper; "layer" or "none" for WGAN-GP, whose penalty is per sample, so that samples must
            not meet in a norm (Gulrajani et al. 2017).

    Raises:
        ValueError: for a size that cannot be, another norm, or labels that are missing or not wanted.
    """

    def __init__(
        self, num_classes: int = 0, in_chans: int = 3, image_size: int = 64, width: int = 128, norm: str = "batch"
    ) -> None:
        super().__init__()
        check_positive(in_chans=in_chans, width=width)
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; choose one of {', '.join(NORMS)}")
        self.num_classes, self.image_size = _check_classes(num_classes), image_size
        start, halvings = _start(image_size)
        layers: list[nn.Module] = [Conv2d(in_chans + num_classes, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(halvings - 1):
            layers.append(Conv2d(width, 2 * width, 4, 2, 1, bias=norm != "batch"))
            width *= 2
            if norm != "none":
                layers.append(nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(Conv2d(width, 1, start))
        self.layers = nn.Sequential(*layers)
        self.apply(_init)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores [N] of images [N, C, S, S] in [-1, 1] and, with classes, labels int64 [N]."""
        if _wants(self, labels):
            planes = F.one_hot(labels, self.num_classes).to(images.dtype)[:, :, None, None]
            images = torch.cat((images, planes.expand(-1, -1, *images.shape[2:])), 1)
        return self.layers(images).flatten()


def _up(in_channels: int, out_channels: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    layer = ConvTranspose2d(in_channels, out_channels, kernel, stride, padding, bias=False)
    return [layer, nn.BatchNorm2d(out_channels), nn.ReLU()]


def _start(image_size: int) -> tuple[int, int]:
    """(side of the smallest feature map, how many times it doubles) for an image of that size."""
    start, doublings = image_size, 0
    while start > LARGEST_START and start % 2 == 0:
        start, doublings = start // 2, doublings + 1
    if not 4 <= start <= LARGEST_START or doublings == 0:
        raise ValueError(f"image_size must be 4, 5, 6 or 7 times a power of two from 2 on, got {image_size}")
    return start, doublings


def _check_classes(num_classes: int) -> int:
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    return num_classes


def _wants(model: nn.Module, labels: Tensor | None) -> bool:
    """Whether the model takes labels; ValueError unless that is what it got."""
    if (labels is not None) != (model.num_classes > 0):
        raise ValueError(f"labels must {'' if model.num_classes else 'not '}be given: {model.num_classes} classes")
    return labels is not None


def _init(layer: nn.Module) -> None:
    """The paper's: convolutions from N(0, 0.02), factors of a norm from N(1, 0.02)."""
    if isinstance(layer, (Conv2d, ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


def _numbers(batch: int, _, latent: int = 100, num_classes: int = 0, **__) -> dict[str, Tensor]:
    return {"z": torch.randn(batch, latent)} | _labels(batch, num_classes)


def _images(batch: int, size: Sequence[int], num_classes: int = 0, **options) -> dict[str, Tensor]:
    return image_inputs(batch, size, **options) | _labels(batch, num_classes)


def _labels(batch: int, num_classes: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(num_classes, (batch,))} if num_classes else {}


MODELS = {
    "dcgan_generator": Entry(DCGANGenerator, (64, 64), "generation", _numbers),
    "dcgan_discriminator": Entry(DCGANDiscriminator, (64, 64), "discrimination", _images),
}
