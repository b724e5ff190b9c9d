"""VGG networks: Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition"."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from cvfast.models.blocks import check_positive, initialize
from cvfast.models.entry import Entry
from cvfast.nn import Conv2d, Linear

CHANNELS = (64, 128, 256, 512, 512)  # of the five stages, each of which ends in pooling
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def _features(depth: int, in_chans: int, batch_norm: bool) -> nn.Sequential:
    """[N, in_chans, H, W] -> [N, 512, H / 32, W / 32]."""
    if depth not in CONVOLUTIONS:
        raise ValueError(f"a VGG has {', '.join(map(str, CONVOLUTIONS))} layers, got {depth}")
    layers: list[nn.Module] = []
    for channels, count in zip(CHANNELS, CONVOLUTIONS[depth], strict=True):
        for _ in range(count):
            layers.append(Conv2d(in_chans, channels, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU(inplace=True))
            in_chans = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """The ImageNet networks, with torchvision's names, so its state_dicts load.

    Args:
        depth: 11, 13, 16 or 19 layers with weights.
        batch_norm: after every convolution; not in the paper.
        num_classes: logits per image, default 1000.
        in_chans: channels of the input, default 3.
        dropout: probability, before the second and the third linear layer.

    Raises:
        ValueError: if ``depth`` is another, or a size is not positive.
    """

    def __init__(
        self, depth: int, batch_norm: bool, num_classes: int = 1000, in_chans: int = 3, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans)
        self.features = _features(depth, in_chans, batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            Linear(CHANNELS[-1] * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Linear(4096, num_classes),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, H, W]``, 224x224 in the paper, 32x32 or more."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class CifarVGG(nn.Module):
    """A VGG for small images: the convolutions of VGG-13 (ten) or another, batch-norm, one linear layer.

    Args:
        num_classes: logits per image, default 10.
        in_chans: channels of the input, default 3.
        depth: of the VGG whose convolutions these are, default 13.

    Raises:
        ValueError: if ``depth`` is not a VGG's, or a size is not positive.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, depth: int = 13) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans)
        self.features = _features(depth, in_chans, batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = Linear(CHANNELS[-1], num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, H, W]`` of 32x32 or more."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


MODELS = {
    f"vgg{depth}{'_bn' if batch_norm else ''}": Entry(partial(VGG, depth, batch_norm), (224, 224))
    for depth in CONVOLUTIONS
    for batch_norm in (False, True)
} | {"vgg_cifar": Entry(CifarVGG, (32, 32))}
