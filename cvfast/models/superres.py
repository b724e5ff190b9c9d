"""Super-resolution by four."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cvfast.models.blocks import check_positive
from cvfast.models.entry import Entry
from cvfast.nn import Conv2d

SCALE = 4


class SRResNet(nn.Module):
    """SRGAN's generator (Ledig et al. 2017), four times the height and width; it adds detail to the bicubic image.

    The paper's network makes the whole image; here it makes what bicubic interpolation lacks, so that an untrained
    one is no worse than that.

    Args:
        in_chans: channels of the images, default 3.
        width: channels of the features, default 64, the paper's.
        blocks: residual blocks, default 16, the paper's.

    Raises:
        ValueError: if one of them is not positive.
    """

    def __init__(self, in_chans: int = 3, width: int = 64, blocks: int = 16) -> None:
        super().__init__()
        check_positive(in_chans=in_chans, width=width, blocks=blocks)
        self.head = nn.Sequential(Conv2d(in_chans, width, 9, padding=4), nn.PReLU())
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.joint = nn.Sequential(Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.up = nn.Sequential(*_doubling(width), *_doubling(width))
        self.tail = Conv2d(width, in_chans, 9, padding=4)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, 4 H, 4 W] of images [N, C, H, W], both of pixels around [0, 1]."""
        features = self.head(images)
        features = features + self.joint(self.blocks(features))
        return bicubic(images) + self.tail(self.up(features))


def bicubic(images: Tensor) -> Tensor:
    """Bicubic interpolation to four times the size, what SRResNet starts from and is measured against."""
    return F.interpolate(images, scale_factor=SCALE, mode="bicubic", align_corners=False)


class _Block(nn.Module):
    """Convolution, norm, PReLU, convolution, norm, and the input added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation = nn.PReLU()
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))


def _doubling(width: int) -> list[nn.Module]:
    """Sub-pixel convolution (Shi et al. 2016)."""
    return [Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()]


MODELS = {"srresnet": Entry(SRResNet, (8, 8), "super-resolution")}
