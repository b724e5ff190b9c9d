"""Where a run's figures go: a CSV file always, TensorBoard on request, the terminal if the caller gives a console."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


@dataclass(frozen=True)
class Panel:
    """A picture of some figures over the epochs.

    lines: field -> what the legend calls it; the first is drawn as a line, others dashed. scale: factor for the axis.
    """

    title: str
    unit: str
    lines: dict[str, str]
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EpochFigures:
    """What every epoch's figures have; a subclass adds its own, and says in ``PANELS`` how to draw them.

    ``lr`` is the learning rate of the epoch's last step. ``seconds`` is the wall time of training, without the
    epoch's judgement; an interrupted epoch counts from its resumption.
    """

    PANELS: ClassVar[tuple[Panel, ...]] = ()

    epoch: int
    lr: float
    seconds: float

    @property
    def score(self) -> float:
        """The figure that chooses the best epoch: the larger, the better."""
        raise NotImplementedError

    def summary(self) -> str:
        """The epoch in a few words, for the terminal."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class EpochLog(EpochFigures):
    """A classifier's epoch: accuracies in [0, 1], losses are mean cross-entropy per image, in nats."""

    PANELS = (
        Panel("Loss", "cross-entropy (nats per image)", {"validation_loss": "validation", "train_loss": "train"}),
        Panel("Accuracy", "right answers (%)", {"validation_accuracy": "validation", "train_accuracy": "train"}, 100),
    )

    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float

    @property
    def score(self) -> float:
        return self.validation_accuracy

    def summary(self) -> str:
        return (
            f"loss {self.train_loss:.4f}"
            f"  validation: loss {self.validation_loss:.4f}, accuracy {self.validation_accuracy:.1%}"
        )


def write_csv(path: Path, history: Sequence[EpochFigures]) -> None:
    """Writes the whole history, so that a resumed run's file has neither gaps nor repeated lines."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(history[0])])
        writer.writeheader()
        writer.writerows(asdict(entry) for entry in history)


class RunLog:
    """Writes each epoch to ``<folder>/log.csv`` and, if asked, to TensorBoard and a terminal."""

    def __init__(self, folder: Path, epochs: int, tensorboard: bool, console: Console | None) -> None:
        self.path = folder / "log.csv"
        self.epochs = epochs
        self.console = console
        self.tensorboard = _tensorboard_writer(folder) if tensorboard else None

    def add(self, history: Sequence[EpochFigures]) -> None:
        """Records ``history``, whose last entry is new."""
        write_csv(self.path, history)
        entry = history[-1]
        if self.tensorboard is not None:
            for name, value in asdict(entry).items():
                if name != "epoch":
                    self.tensorboard.add_scalar(name, value, entry.epoch)
            self.tensorboard.flush()
        if self.console is not None:
            self.console.print(
                f"epoch {entry.epoch:>3}/{self.epochs}  {entry.summary()}  {entry.seconds:.1f} s",
                highlight=False,
                soft_wrap=True,
            )

    def progress(self, batches: Iterable[T], epoch: int, total: int) -> Iterable[T]:
        """``batches`` with a progress bar, if the console is a terminal; the bar goes when the epoch ends."""
        if self.console is None or not self.console.is_terminal:
            return batches
        from rich.progress import track

        return track(batches, f"epoch {epoch + 1:>3}/{self.epochs}", total, console=self.console, transient=True)

    def close(self) -> None:
        """Closes the TensorBoard file, if there is one."""
        if self.tensorboard is not None:
            self.tensorboard.close()


def _tensorboard_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("a TensorBoard log needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"))
