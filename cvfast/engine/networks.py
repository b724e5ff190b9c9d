"""Networks of the zoo under names of their own, which a checkpoint rebuilds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cvfast.engine.checkpoint import CheckpointError, load_checkpoint
from cvfast.models import create_model


class Networks(nn.ModuleDict):
    """The networks that train together in one run.

    Args:
        made: part (such as "generator") -> the zoo's name of its network and create_model's other arguments.
    """

    def __init__(self, made: dict[str, tuple[str, dict[str, Any]]]) -> None:
        super().__init__({part: create_model(name, **options) for part, (name, options) in made.items()})
        self.made = made

    def description(self) -> dict[str, Any]:
        """What :func:`load_network` needs besides the tensors, in JSON types."""
        return {"networks": {part: [name, options] for part, (name, options) in self.made.items()}}


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
