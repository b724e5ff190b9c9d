"""What the zoo knows of a model besides its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Entry:
    """A line of the zoo's table.

    Attributes:
        make: makes the model; its keyword arguments (``num_classes``, ``in_chans``, ...) are those of ``create_model``.
        input_size: (height, width) of the images that the model takes or makes, by default.
        task: "classification" (images -> logits [N, num_classes]), "segmentation" (images -> logits
            [N, num_classes, H, W]) or another word for a model that does neither.
    """

    make: Callable[..., nn.Module]
    input_size: tuple[int, int]
    task: str = "classification"
