"""What the zoo knows of a model besides its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A line of the zoo's table.

    Attributes:
        make: makes the model; its keyword arguments (``num_classes``, ``in_chans``, ...) are those of ``create_model``.
        input_size: (height, width) of the images that the model takes or makes, by default.
        task: "classification" (images -> logits [N, num_classes]), "segmentation" (images -> logits
            [N, num_classes, H, W]) or another word for a model that does neither.
        inputs: inputs by name, in the order of ``forward``, for a batch of so many; default: RGB images.
    """

    make: Callable[..., nn.Module]
    input_size: tuple[int, int]
    task: str = "classification"
    inputs: Callable[[int], dict[str, Tensor]] | None = None

    def example(self, batch: int) -> dict[str, Tensor]:
        return self.inputs(batch) if self.inputs else {"images": torch.rand(batch, 3, *self.input_size)}
