"""What several families share."""

from __future__ import annotations

from torch import nn

from cvfast.nn import Conv2d


def check_positive(**sizes: int) -> None:
    """ValueError, naming all of them, unless every size is 1 or more."""
    if any(size < 1 for size in sizes.values()):
        values = " and ".join(map(str, sizes.values()))
        raise ValueError(f"{' and '.join(sizes)} must be positive, got {values}")


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> Conv2d:
    """A padded 3x3 convolution without bias, as stands before a batch-norm."""
    return Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv_norm_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """3x3 convolution, batch-norm, ReLU; [N, C, H, W] -> [N, K, H, W]."""
    return [conv3x3(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def initialize(model: nn.Module) -> None:
    """He et al. 2015 for convolutions (by the size of the output), 1 and 0 for batch-norm; linear layers stay."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
