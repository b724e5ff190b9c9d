"""The zoo: models that train, export and run on cvfast's layers, made by name with :func:`create_model`."""

from __future__ import annotations

from torch import nn

from cvfast.models.cnn import CNN

__all__ = ["CNN", "create_model", "input_size", "list_models"]

_MODELS: dict[str, type[nn.Module]] = {"cnn": CNN}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, sorted."""
    return sorted(_MODELS)


def input_size(name: str) -> tuple[int, int]:
    """(height, width) of the images that the model called ``name`` takes; ValueError if ``name`` is unknown."""
    return _find(name).input_size


def create_model(name: str, *, num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """A freshly initialised model.

    Args:
        name: one of :func:`list_models`.
        num_classes: number of logits the model returns per image.
        in_chans: channels of the input images (1 for grey, 3 for RGB).

    Raises:
        ValueError: if ``name`` is unknown, or a size is not positive.
    """
    return _find(name)(num_classes=num_classes, in_chans=in_chans)


def _find(name: str) -> type[nn.Module]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(list_models())}")
    return _MODELS[name]
