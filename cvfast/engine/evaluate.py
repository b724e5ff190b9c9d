"""Judging a classifier: accuracy, and precision, recall and F1 of each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from cvfast.data import ImageData
from cvfast.engine.classifier import Classifier, logits_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Evaluation:
    """How well predictions fit K classes. Scores lie in [0, 1]; a class that is never predicted has precision 0.

    Attributes:
        classes: the K class names.
        loss: mean cross-entropy per image, in nats.
        accuracy: part of the images whose most likely class is the right one.
        precision, recall, f1: one score per class, float32 [K].
        confusion: int64 [K, K]; row: true class, column: predicted class, entry: number of images.
    """

    classes: list[str]
    loss: float
    accuracy: float
    precision: Tensor
    recall: Tensor
    f1: Tensor
    confusion: Tensor

    @property
    def macro(self) -> dict[str, float]:
        """Precision, recall and F1, each the plain mean over the classes."""
        return {name: getattr(self, name).mean().item() for name in ("precision", "recall", "f1")}

    def to_dict(self) -> dict[str, Any]:
        """All figures in JSON types."""
        scores = {name: getattr(self, name).tolist() for name in ("precision", "recall", "f1", "confusion")}
        return {"classes": self.classes, "loss": self.loss, "accuracy": self.accuracy, "macro": self.macro, **scores}

    def table(self) -> Table:
        """The scores as a table for the terminal: one line per class, then the macro average."""
        from rich.table import Table

        table = Table(title=f"accuracy {self.accuracy:.2%}, loss {self.loss:.4f}, {self.confusion.sum()} images")
        table.add_column("class")
        for name in ("precision", "recall", "F1", "images"):
            table.add_column(name, justify="right")
        images = self.confusion.sum(dim=1)
        for k, name in enumerate(self.classes):
            table.add_row(name, *(f"{s[k]:.3f}" for s in (self.precision, self.recall, self.f1)), str(images[k].item()))
        table.add_section()
        table.add_row("macro average", *(f"{score:.3f}" for score in self.macro.values()), str(images.sum().item()))
        return table


def evaluate(classifier: Classifier, data: ImageData, batch_size: int = 500) -> Evaluation:
    """Judges ``classifier`` on ``data`` with torchmetrics, on the device where the classifier is.

    Raises:
        ValueError: if the data's classes are not the classifier's, in number, name or order.
    """
    if list(data.classes) != classifier.classes:
        raise ValueError(
            f"the classifier knows {len(classifier.classes)} classes ({_short(classifier.classes)}), "
            f"the data has {len(data.classes)} ({_short(data.classes)})"
        )
    return judge(logits_of(classifier, data, batch_size), data.labels, classifier.classes)


def judge(logits: Tensor, labels: Tensor, classes: list[str]) -> Evaluation:
    """The evaluation of logits [N, K] against labels int64 [N]."""
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_confusion_matrix,
        multiclass_f1_score,
        multiclass_precision,
        multiclass_recall,
    )

    k = len(classes)
    predicted = logits.argmax(dim=1)
    return Evaluation(
        classes=list(classes),
        loss=F.cross_entropy(logits, labels).item(),
        accuracy=multiclass_accuracy(predicted, labels, k, average="micro").item(),
        precision=multiclass_precision(predicted, labels, k, average="none"),
        recall=multiclass_recall(predicted, labels, k, average="none"),
        f1=multiclass_f1_score(predicted, labels, k, average="none"),
        confusion=multiclass_confusion_matrix(predicted, labels, k),
    )


def _short(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
