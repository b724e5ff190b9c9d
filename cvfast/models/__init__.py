"""The zoo: models that train, export and run on cvfast's layers, made by name with :func:`create_model`.

One file per family; its table ``MODELS`` joins the zoo below.
"""

from __future__ import annotations

import inspect
from fnmatch import fnmatchcase

from torch import Tensor, nn

from cvfast.models import (
    attention_pooling,
    captioning,
    cnn,
    gan,
    mobilenet,
    recurrent,
    resnet,
    superres,
    unet,
    vgg,
    vit,
)
from cvfast.models.cnn import CNN
from cvfast.models.entry import Entry

__all__ = ["CNN", "create_model", "example_inputs", "input_size", "list_models"]

_MODELS: dict[str, Entry] = {
    **attention_pooling.MODELS,
    **captioning.MODELS,
    **cnn.MODELS,
    **gan.MODELS,
    **mobilenet.MODELS,
    **recurrent.MODELS,
    **resnet.MODELS,
    **superres.MODELS,
    **unet.MODELS,
    **vgg.MODELS,
    **vit.MODELS,
}


def list_models(pattern: str | None = None, *, task: str | None = None) -> list[str]:
    """Names that :func:`create_model` knows, sorted.

    Args:
        pattern: only names that match it, with ``*``, ``?`` and ``[...]`` as in a shell: ``"resnet*"``.
        task: only models that do this: "classification", "segmentation".
    """
    return sorted(
        name
        for name, entry in _MODELS.items()
        if (pattern is None or fnmatchcase(name, pattern)) and task in (None, entry.task)
    )


def input_size(name: str) -> tuple[int, int]:
    """(height, width) of the images that the model called ``name`` takes; ValueError if ``name`` is unknown."""
    return _find(name).input_size


def example_inputs(name: str, batch: int = 1, **options) -> dict[str, Tensor]:
    """Random inputs by name, in the order of ``forward``, for a batch of that many.

    ``create_model(name, **options)(*example_inputs(name, **options).values())`` runs. ValueError if ``name`` is
    unknown.

    Args:
        options: those of :func:`create_model`; besides, ``size``, the images' (height, width), and ``words``, the
            length of a captioner's sentences.
    """
    return _find(name).example(batch, **options)


def create_model(name: str, *, num_classes: int | None = None, in_chans: int | None = None, **options) -> nn.Module:
    """A freshly initialised model.

    Args:
        name: one of :func:`list_models`.
        num_classes: number of logits the model returns per image (or pixel); default: the model's own, that of its
            paper's data set.
        in_chans: channels of the input images (1 for grey, 3 for RGB); default: the model's own, 3.
        options: further arguments of the model's class, see there.

    Raises:
        TypeError: if the model takes no such option.
        ValueError: if ``name`` is unknown, or a size is not positive.
    """
    make = _find(name).make
    given = {"num_classes": num_classes, "in_chans": in_chans}
    options |= {key: value for key, value in given.items() if value is not None}
    allowed = inspect.signature(make).parameters
    for option in options:
        if option not in allowed:
            raise TypeError(f"{name} takes no option {option!r}; it takes {', '.join(allowed)}")
    return make(**options)


def _find(name: str) -> Entry:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(list_models())}")
    return _MODELS[name]
