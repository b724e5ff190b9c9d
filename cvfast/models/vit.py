"""Vision transformers: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words".

The sizes Tiny and Small are those of Touvron et al. 2021, "Training data-efficient image transformers".
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cvfast.models.blocks import check_positive
from cvfast.models.entry import Entry
from cvfast.nn import Conv2d, Linear, MultiheadAttention

EPSILON = 1e-6  # of layer norms


class EncoderBlock(nn.Module):
    """Self-attention, then two linear layers, each after a layer norm and beside a shortcut: [N, L, D] -> [N, L, D]."""

    def __init__(self, hidden_dim: int, num_heads: int, mlp_dim: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_dim, EPSILON)
        self.self_attention = MultiheadAttention(hidden_dim, num_heads, attention_dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(hidden_dim, EPSILON)
        self.mlp = nn.Sequential(
            Linear(hidden_dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            Linear(mlp_dim, hidden_dim),
            nn.Dropout(dropout),
        )
        for layer in (self.mlp[0], self.mlp[3]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Learned positions, blocks, and a last layer norm: [N, L, D] -> [N, L, D]."""

    def __init__(self, length: int, hidden_dim: int, dropout: float, blocks: Sequence[EncoderBlock]) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, hidden_dim))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(OrderedDict((f"encoder_layer_{i}", block) for i, block in enumerate(blocks)))
        self.ln = nn.LayerNorm(hidden_dim, EPSILON)
        nn.init.normal_(self.pos_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


class OfSize(nn.Module):
    """Hands on images of a size; ValueError for others. A layer, so that the model around it does the same for all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.size, self.size):
            size = f"{self.size}x{self.size}"
            raise ValueError(f"the model was made for images of {size} pixels, got {list(images.shape)}")
        return images


class VisionTransformer(nn.Module):
    """Patches of an image as a sequence, with torchvision's names and arguments, so its state_dicts load.

    Args:
        image_size: height and width of the images, in pixels.
        patch_size: height and width of a patch; it divides ``image_size``.
        num_layers: of the encoder.
        num_heads: of the attention; it divides ``hidden_dim``.
        hidden_dim: features per patch, D.
        mlp_dim: features between a block's two linear layers.
        num_classes: logits per image, default 1000.
        in_chans: channels of the input, default 3.
        dropout, attention_dropout: probabilities, default 0.

    Raises:
        ValueError: if a size is not positive or does not divide as it must.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans)
        check_positive(image_size=image_size, patch_size=patch_size, num_layers=num_layers, num_heads=num_heads)
        if image_size % patch_size or hidden_dim % num_heads:
            raise ValueError(
                f"patch_size must divide image_size, and num_heads hidden_dim, got {patch_size} and {image_size}, "
                f"{num_heads} and {hidden_dim}"
            )
        self.images = OfSize(image_size)
        self.conv_proj = Conv2d(in_chans, hidden_dim, patch_size, patch_size)
        self.hidden_dim = hidden_dim
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        length = (image_size // patch_size) ** 2 + 1
        blocks = [EncoderBlock(hidden_dim, num_heads, mlp_dim, dropout, attention_dropout) for _ in range(num_layers)]
        self.encoder = Encoder(length, hidden_dim, dropout, blocks)
        self.heads = nn.Sequential(OrderedDict(head=Linear(hidden_dim, num_classes)))
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (in_chans * patch_size**2)))
        nn.init.zeros_(self.conv_proj.bias)
        nn.init.trunc_normal_(self.heads.head.weight, std=0.02)
        nn.init.zeros_(self.heads.head.bias)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.images.size

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, image_size, image_size]``; ValueError for others."""
        patches = self.conv_proj(self.images(x)).flatten(2).transpose(1, 2)  # [N, L - 1, D]
        token = torch.broadcast_to(self.class_token, (x.shape[0], 1, self.hidden_dim))
        tokens = torch.cat((token, patches), dim=1)
        return self.heads(self.encoder(tokens)[:, 0])


_tiny = {"num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
_small = {"num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536}
_cifar = {"image_size": 32, "patch_size": 4, "num_classes": 10}
MODELS = {
    "vit_tiny": Entry(partial(VisionTransformer, image_size=224, patch_size=16, **_tiny), (224, 224)),
    "vit_small": Entry(partial(VisionTransformer, image_size=224, patch_size=16, **_small), (224, 224)),
    "vit_tiny_cifar": Entry(partial(VisionTransformer, **_cifar, **_tiny), (32, 32)),
    "vit_small_cifar": Entry(partial(VisionTransformer, **_cifar, **_small), (32, 32)),
}
