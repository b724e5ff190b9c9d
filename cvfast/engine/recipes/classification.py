"""Trains a model on a folder of images or a data set, keeps the best epoch, and judges it on the test images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cvfast.engine import distributed
from cvfast.engine.classifier import load_classifier, logits_of
from cvfast.engine.config import TrainConfig
from cvfast.engine.evaluate import judge
from cvfast.engine.run import load_data
from cvfast.engine.train import TrainResult, resume, train

if TYPE_CHECKING:
    from rich.console import Console

Options = TrainConfig


def run(options: TrainConfig, out: Path, console: Console | None) -> None:
    """See `cvfast.engine.recipes`; a checkpoint in ``out`` goes on with its own settings, whatever ``options`` say."""
    if (out / "last.safetensors").exists():
        result = resume(out, console=console)
    else:
        result = train(replace(options, out=str(out)), console=console)
    if distributed.rank() == 0:
        _report(result, console)


def _report(result: TrainResult, console: Console | None) -> None:
    from cvfast.engine import report

    folder, config = result.folder, result.config
    classifier = load_classifier(folder)
    test = load_data(config.data, classifier.image_shape[1:]).test
    logits = logits_of(classifier, test)
    evaluation = judge(logits, test.labels, classifier.classes)
    report.learning_curves(folder / "learning_curves.png", {config.model: result.history})
    sections = [
        report.Section(
            "What was done",
            f"{config.model} was trained on {config.data}; epoch {result.best_epoch} of {len(result.history)} is the "
            f"best on the images held out. Test accuracy: {evaluation.accuracy:.2%} of {len(test):,} images.",
        ),
        report.Section("Learning curves", picture="learning_curves.png"),
        *report.judgement(folder, evaluation, test, logits),
        report.settings(config),
        report.machine(),
    ]
    report.write_report(folder, f"cvfast train classification: {config.model}", sections)
    if console is not None:
        summary = (
            f"best epoch {result.best_epoch}: test accuracy {evaluation.accuracy:.2%}; in {folder}",
            f"report: {folder / 'report.html'} (and report.md)",
            f"next: cvfast eval --checkpoint {folder}",
        )
        for line in summary:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
