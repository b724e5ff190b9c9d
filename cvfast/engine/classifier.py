"""A model together with all it takes to go from pixels to class names."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvfast import _choices
from cvfast.data import ImageData, Preparation, batches
from cvfast.engine.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from cvfast.models import create_model


class Classifier(nn.Module):
    """uint8 images in, logits out: a :class:`~cvfast.data.Preparation` followed by a model of the zoo.

    Args:
        model_name: one of :func:`cvfast.models.list_models`.
        classes: class names; their order is the order of the logits.
        image_shape: (C, H, W) of the data set's images, before the preparation.
        preparation: brings the images to what the model takes.
    """

    def __init__(
        self, model_name: str, classes: list[str], image_shape: tuple[int, int, int], preparation: Preparation
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.classes = list(classes)
        self.image_shape = tuple(image_shape)
        self.preparation = preparation
        self.model = create_model(model_name, num_classes=len(classes), in_chans=preparation.channels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] of uint8 images [N, C, H, W]."""
        return self.model(self.preparation(images))

    def description(self) -> dict[str, Any]:
        """What :meth:`from_checkpoint` needs besides the tensors, in JSON types."""
        return {
            "model": self.model_name,
            "classes": self.classes,
            "image_shape": list(self.image_shape),
            "preparation": self.preparation.to_config(),
        }

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Classifier:
        """Rebuilds the classifier in eval mode; CheckpointError if the parts don't fit together."""
        try:
            description = checkpoint.meta["classifier"]
            classifier = cls(
                description["model"],
                description["classes"],
                description["image_shape"],
                Preparation.from_config(description["preparation"]),
            )
            classifier.model.load_state_dict(checkpoint.part("model"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint does not hold a usable classifier: {error}") from error
        return classifier.eval()


def load_classifier(path: str | Path) -> Classifier:
    """The classifier in a checkpoint file or a run's folder (its best epoch), in eval mode on the CPU.

    Choices that `cvfast tune` left beside it are taken, too, if they were measured on a machine like this.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is not a checkpoint of cvfast, or is damaged.
    """
    classifier = Classifier.from_checkpoint(load_checkpoint(path))
    with suppress(FileNotFoundError, ValueError):
        _choices.load((Path(path) if Path(path).is_dir() else Path(path).parent) / _choices.NAME)
    return classifier


@torch.inference_mode()
def logits_of(classifier: Classifier, data: ImageData, batch_size: int = 500) -> Tensor:
    """Logits [N, K] of all images of ``data``, on the CPU, computed on the device where the classifier is."""
    device = next(classifier.parameters()).device
    return torch.cat([classifier(images).cpu() for images, _ in batches(data, batch_size, device=device)])
