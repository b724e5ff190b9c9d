"""The CIFAR-10 network of PyTorch's tutorial "Training a Classifier", with the tutorial's parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvfast.models.blocks import check_positive
from cvfast.models.entry import Entry
from cvfast.nn import Conv2d, Linear


class CNN(nn.Module):
    """Two convolutions and three linear layers, 62,006 parameters for ten classes of RGB images.

    The structure is LeNet-5's (LeCun et al. 1998) with ReLU and max pooling; the names (``conv1``, ``pool``, ``conv2``,
    ``fc1``, ``fc2``, ``fc3``) are the tutorial's, so its ``state_dict`` loads as it is.

    Args:
        num_classes: logits per image, default 10.
        in_chans: channels of the input, default 3.

    Raises:
        ValueError: if ``num_classes`` or ``in_chans`` is not positive.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans)
        self.conv1 = Conv2d(in_chans, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = Conv2d(6, 16, 5)
        self.fc1 = Linear(16 * 5 * 5, 120)
        self.fc2 = Linear(120, 84)
        self.fc3 = Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_chans, 32, 32]``."""
        x = self.pool(torch.relu(self.conv1(x)))  # [N, 6, 14, 14]
        x = self.pool(torch.relu(self.conv2(x)))  # [N, 16, 5, 5]
        x = torch.flatten(x, 1)
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)


MODELS = {"cnn": Entry(CNN, (32, 32))}
