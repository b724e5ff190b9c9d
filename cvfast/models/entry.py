"""What the zoo knows of a model besides its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def image_inputs(batch: int, size: Sequence[int], in_chans: int = 3, **_) -> dict[str, Tensor]:
    return {"images": torch.rand(batch, in_chans, *size)}


@dataclass(frozen=True)
class Entry:
    """A line of the zoo's table.

    Attributes:
        make: makes the model; its keyword arguments (``num_classes``, ``in_chans``, ...) are those of ``create_model``.
        input_size: (height, width) of the images that the model takes or makes, by default.
        task: "classification" (images -> logits [N, num_classes]), "segmentation" (images -> logits
            [N, num_classes, H, W]) or another word for a model that does neither.
        inputs: random inputs by name, in the order of ``forward``, for a batch of so many, images of (height, width)
            and the options with which the model was made; default: images.
    """

    make: Callable[..., nn.Module]
    input_size: tuple[int, int]
    task: str = "classification"
    inputs: Callable[..., dict[str, Tensor]] = image_inputs

    def example(self, batch: int, size: Sequence[int] | None = None, **options) -> dict[str, Tensor]:
        if size is None:
            size = (options["image_size"],) * 2 if "image_size" in options else self.input_size
        return self.inputs(batch, size, **options)
