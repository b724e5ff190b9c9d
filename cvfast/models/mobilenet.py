"""MobileNet-V2: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvfast.models.blocks import check_positive, initialize
from cvfast.models.entry import Entry
from cvfast.nn import Conv2d, Linear

# The paper's table 2: expansion, channels, blocks, stride of the first block.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _conv_norm_relu6(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
    return nn.Sequential(
        Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 depthwise, 1x1 to few, without an activation at the end; plus the input where it fits.

    [N, C, H, W] -> [N, out_channels, H / stride, W / stride].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        expand = [_conv_norm_relu6(in_channels, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_norm_relu6(hidden, hidden, 3, stride, groups=hidden),
            Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """The network of the paper's table 2, with torchvision's names, so its state_dicts load.

    Args:
        num_classes: logits per image, default 1000.
        in_chans: channels of the input, default 3.
        width: factor of all channels, rounded to multiples of 8 (and to no less than 90 %), default 1.
        dropout: probability, before the linear layer.

    Raises:
        ValueError: if a size or ``width`` is not positive.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, width: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans)
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        channels = _multiple_of_8(32 * width)
        features: list[nn.Module] = [_conv_norm_relu6(in_chans, channels, 3, stride=2)]
        for expansion, stage_channels, blocks, stride in STAGES:
            out_channels = _multiple_of_8(stage_channels * width)
            for block in range(blocks):
                features.append(InvertedResidual(channels, out_channels, stride if block == 0 else 1, expansion))
                channels = out_channels
        last = _multiple_of_8(1280 * max(1.0, width))
        self.features = nn.Sequential(*features, _conv_norm_relu6(channels, last, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), Linear(last, num_classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, H, W]``, 224x224 in the paper."""
        x = self.features(x)  # [N, 1280, H / 32, W / 32] of the width 1
        return self.classifier(torch.flatten(self.avgpool(x), 1))


def _multiple_of_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


MODELS = {"mobilenet_v2": Entry(MobileNetV2, (224, 224))}
