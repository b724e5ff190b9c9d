"""U-Net: Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation"."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from cvfast.models.blocks import check_positive, conv_norm_relu, initialize
from cvfast.models.entry import Entry
from cvfast.nn import Conv2d, ConvTranspose2d


def _twice(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(*conv_norm_relu(in_channels, out_channels), *conv_norm_relu(out_channels, out_channels))


class UNet(nn.Module):
    """A class for each pixel: the paper's network, but padded, so that the output has the input's size, and with
    batch-norm.

    Args:
        num_classes: logits per pixel, default 2 as in the paper.
        in_chans: channels of the input, default 3.
        width: channels of the first level, default 64; each level below has twice as many.
        depth: how often the image is halved, default 4.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, num_classes: int = 2, in_chans: int = 3, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans, width=width, depth=depth)
        channels = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(map(_twice, [in_chans, *channels], channels))
        self.pool = nn.MaxPool2d(2)
        above, below = channels[-2::-1], channels[:0:-1]  # from the bottom to the top
        self.enlarge = nn.ModuleList(ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(above, below, strict=True))
        self.up = nn.ModuleList(_twice(2 * a, a) for a in above)
        self.head = Conv2d(width, num_classes, 1)
        initialize(self)
        self.head.reset_parameters()  # by the number of its outputs, a few classes, logits would begin at tens

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes, H, W]`` of images ``[N, in_chans, H, W]``.

        ValueError unless H and W are multiples of 2**depth.
        """
        multiple = 2 ** len(self.up)
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {list(x.shape)}")
        levels = []
        for block in self.down[:-1]:
            x = block(x)
            levels.append(x)
            x = self.pool(x)
        x = self.down[-1](x)
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            x = block(torch.cat((levels.pop(), enlarge(x)), dim=1))
        return self.head(x)


MODELS = {
    "unet": Entry(UNet, (256, 256), "segmentation"),
    "unet_small": Entry(partial(UNet, width=16, depth=3), (64, 64), "segmentation"),
}
