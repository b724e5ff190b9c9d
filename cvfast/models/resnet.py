"""Residual networks: He et al. 2016, "Deep Residual Learning for Image Recognition"."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvfast.models.blocks import check_positive, conv3x3, initialize
from cvfast.models.entry import Entry
from cvfast.nn import Conv2d, Linear


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [N, C, H, W] -> [N, channels, H / stride, W / stride].

    ``downsample`` is the shortcut; None passes the input on as it is.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides, as torchvision's does) and 1x1 convolution beside a shortcut; 4 * channels come out."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = Conv2d(channels, self.expansion * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class PaddedShortcut(nn.Module):
    """The paper's shortcut A, without parameters: every stride-th pixel, new channels are 0 (half on either side)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The paper's shortcut B: a 1x1 convolution and batch-norm."""
    return nn.Sequential(Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, channels: int, blocks: int, stride: int, shortcut
) -> nn.Sequential:
    """``blocks`` blocks, of which the first strides and changes the number of channels through ``shortcut``."""
    out_channels = block.expansion * channels
    changes = stride != 1 or in_channels != out_channels
    first = block(in_channels, channels, stride, shortcut(in_channels, out_channels, stride) if changes else None)
    return nn.Sequential(first, *(block(out_channels, channels, 1, None) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """The ImageNet networks of the paper's table 1, with torchvision's names, so its state_dicts load.

    Args:
        block: BasicBlock (18 and 34 layers) or Bottleneck (50).
        blocks: of each of the four stages.
        num_classes: logits per image, default 1000.
        in_chans: channels of the input, default 3.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: Sequence[int], num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans)
        expansion = block.expansion
        self.conv1 = Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, blocks[0], 1, _projection)
        self.layer2 = _stage(block, 64 * expansion, 128, blocks[1], 2, _projection)
        self.layer3 = _stage(block, 128 * expansion, 256, blocks[2], 2, _projection)
        self.layer4 = _stage(block, 256 * expansion, 512, blocks[3], 2, _projection)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Linear(512 * expansion, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, H, W]``, 224x224 in the paper."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # [N, 64, H / 4, W / 4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [N, 512 * expansion, H / 32, W / 32]
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNet(nn.Module):
    """The CIFAR networks of the paper's section 4.2: 6 * blocks + 2 layers, shortcuts without parameters.

    Args:
        num_classes: logits per image, default 10.
        in_chans: channels of the input, default 3.
        blocks: of each of the three stages; 3, the default, makes ResNet-20.
        width: channels of the first stage, default 16.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans, blocks=blocks, width=width)
        self.conv1 = conv3x3(in_chans, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(BasicBlock, width, width, blocks, 1, PaddedShortcut)
        self.layer2 = _stage(BasicBlock, width, 2 * width, blocks, 2, PaddedShortcut)
        self.layer3 = _stage(BasicBlock, 2 * width, 4 * width, blocks, 2, PaddedShortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Linear(4 * width, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, H, W]``, 32x32 in the paper."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # [N, 4 * width, H / 4, W / 4]
        return self.fc(torch.flatten(self.avgpool(x), 1))


MODELS = {
    "resnet18": Entry(partial(ResNet, BasicBlock, (2, 2, 2, 2)), (224, 224)),
    "resnet34": Entry(partial(ResNet, BasicBlock, (3, 4, 6, 3)), (224, 224)),
    "resnet50": Entry(partial(ResNet, Bottleneck, (3, 4, 6, 3)), (224, 224)),
    "resnet20_cifar": Entry(CifarResNet, (32, 32)),
}
