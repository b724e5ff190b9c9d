"""A CNN that looks where it must: Ilse et al. 2018, "Attention-based Deep Multiple Instance Learning"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvfast.models.blocks import check_positive, conv_norm_relu, initialize
from cvfast.models.entry import Entry
from cvfast.nn import AdditiveAttention, Linear


class AttentionPoolingCNN(nn.Module):
    """Six convolutions, then, for global average pooling, a mean whose weights are learned.

    A position's score is w . tanh(V h + b) of its features h, the paper's equation 8, here with a bias: additive
    attention by a query that is always 1. The weights show which parts of an image decide.

    Args:
        num_classes: logits per image, default 10.
        in_chans: channels of the input, default 3.
        width: channels of the first stage, default 64; the second has twice, the third four times as many.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 64) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans, width=width)
        self.features = nn.Sequential(
            *conv_norm_relu(in_chans, width),
            *conv_norm_relu(width, width),
            nn.MaxPool2d(2),
            *conv_norm_relu(width, 2 * width),
            *conv_norm_relu(2 * width, 2 * width),
            nn.MaxPool2d(2),
            *conv_norm_relu(2 * width, 4 * width),
            *conv_norm_relu(4 * width, 4 * width),
        )
        self.attention = AdditiveAttention(query_size=1, key_size=4 * width, size=2 * width)
        self.head = Linear(4 * width, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, H, W]``, 32x32 or other sizes."""
        return self.explained(x)[0]

    def explained(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[N, num_classes]``, and each position's weight ``[N, H // 4, W // 4]``, which add up to 1."""
        features = self.features(x)  # [N, C, H // 4, W // 4]
        positions = features.flatten(2).transpose(1, 2)
        context, weights = self.attention(torch.ones_like(positions[:, 0, :1]), positions)
        return self.head(context), weights.unflatten(-1, features.shape[2:])


MODELS = {"cnn_attention": Entry(AttentionPoolingCNN, (32, 32))}
