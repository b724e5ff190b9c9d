"""Class names for image files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from cvfast.data import decode_image
from cvfast.engine.classifier import Classifier, load_classifier


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image file, best first, each with its probability in [0, 1]."""

    file: Path
    top: list[tuple[str, float]]


def predict(checkpoint: str | Path | Classifier, files: Iterable[str | Path], top_k: int = 5) -> list[Prediction]:
    """Classifies image files of any size; each is resized to what the model takes.

    Args:
        checkpoint: a checkpoint file, a run's folder, or a classifier in eval mode.
        files: image files in any format that Pillow reads.
        top_k: how many classes to return per image, at most all of them.

    Raises:
        FileNotFoundError: if the checkpoint or an image is missing.
        CheckpointError: if the checkpoint is not a usable one.
        ValueError: if a file is no image or a damaged one, or ``top_k`` is not positive.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be positive, got {top_k}")
    classifier = checkpoint if isinstance(checkpoint, Classifier) else load_classifier(checkpoint)
    return [_predict_one(classifier, Path(file), min(top_k, len(classifier.classes))) for file in files]


@torch.inference_mode()
def _predict_one(classifier: Classifier, file: Path, top_k: int) -> Prediction:
    image = decode_image(file, classifier.image_shape[0])  # uint8 [C, H, W]
    probabilities, indices = classifier(image.unsqueeze(0)).softmax(dim=1)[0].topk(top_k)
    names = [classifier.classes[i] for i in indices]
    return Prediction(file, list(zip(names, probabilities.tolist(), strict=True)))
