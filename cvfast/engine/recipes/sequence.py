"""Trains an LSTM that reads an image row by row, and judges it on the test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cvfast.engine.config import TrainConfig
from cvfast.engine.recipes import classification
from cvfast.engine.recipes.running import run_recipe

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig):
    """A classifier's settings, with defaults for row_lstm on the embedded images."""

    model: str = "row_lstm"
    epochs: int = 25
    batch_size: int = 32
    weight_decay: float = 0.05
    rotation: float = 3.0
    scaling: float = 0.05
    translation: float = 0.05


def run(options: Options, out: Path, console: Console | None) -> None:
    """See `cvfast.engine.recipes`."""
    run_recipe(classification.make, classification.write_report, options, out, console)
