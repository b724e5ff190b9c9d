"""Networks of the zoo under names of their own, which a checkpoint rebuilds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvfast.engine.checkpoint import CheckpointError, load_checkpoint
from cvfast.models import create_model, example_inputs


class Networks(nn.ModuleDict):
    """The networks that train together in one run.

    Args:
        made: part (such as "generator") -> the zoo's name of its network and create_model's other arguments. The
            first part is what the run is for.
        low: if the first part takes images: what a black pixel is to it. A white one is 1.
        example: what :func:`~cvfast.models.example_inputs` needs besides for inputs as the first part was trained on.
    """

    def __init__(
        self, made: dict[str, tuple[str, dict[str, Any]]], low: float | None = None, **example: int | list[int]
    ) -> None:
        super().__init__({part: create_model(name, **options) for part, (name, options) in made.items()})
        self.made, self.low, self.example = made, low, example

    def description(self) -> dict[str, Any]:
        """What :func:`load_network` and :func:`load_deployable` need besides the tensors, in JSON types."""
        networks = {part: [name, options] for part, (name, options) in self.made.items()}
        return {"networks": networks, "low": self.low, "example": self.example}


class FromPixels(nn.Module):
    """A network behind the preparation of its images, uint8 [N, C, H, W], whose 0 to 255 become ``low`` to 1."""

    def __init__(self, network: nn.Module, low: float) -> None:
        super().__init__()
        self.network, self.low = network, low

    def forward(self, images: Tensor, sentences: Tensor | None = None) -> Any:
        """What the network returns for the prepared images and, if it is a captioner, sentences."""
        images = (1 - self.low) * (images / 255) + self.low
        return self.network(images) if sentences is None else self.network(images, sentences)


def load_network(path: str | Path, part: str) -> nn.Module:
    """A network of a recipe's run, in eval mode on the CPU: "generator", "discriminator", "captioner" or "upscaler".

    Args:
        path: a checkpoint, or the folder of a run, whose best epoch is taken.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is no checkpoint of cvfast, is damaged, or has no such part.
    """
    checkpoint = load_checkpoint(path)
    parts = checkpoint.meta.get("networks", {})
    if part not in parts:
        raise CheckpointError(f"{path} holds no {part!r}; it holds {', '.join(parts) or 'none of a recipe'}")
    try:
        name, options = parts[part]
        network = create_model(name, **options)
        network.load_state_dict(checkpoint.part(f"model.{part}"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold a usable {part}: {error}") from error
    return network.eval()


def load_deployable(path: str | Path, batch: int = 2) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    """What a recipe's run is for, ready for :func:`~cvfast.engine.export_network`.

    Args:
        path: as :func:`load_network`'s.

    Returns:
        The generator, captioner or upscaler in eval mode on the CPU; if it takes images, they are uint8, and their
        preparation is a part of it. Random inputs by name, a batch of that many. Words to travel along: a captioner's
        "vocabulary", a JSON list.

    Raises:
        FileNotFoundError, CheckpointError: as :func:`load_network`.
    """
    meta = load_checkpoint(path).meta
    part = next(iter(meta.get("networks", {})), "network")
    network = load_network(path, part)
    name, options = meta["networks"][part]
    inputs = example_inputs(name, batch, **options, **meta.get("example", {}))
    low = meta.get("low")
    if low is not None:
        network = FromPixels(network, low).eval()
        inputs["images"] = torch.randint(256, inputs["images"].shape, dtype=torch.uint8)
    return network, inputs, {"vocabulary": json.dumps(meta["vocabulary"])} if "vocabulary" in meta else {}
