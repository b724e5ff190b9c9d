"""Trains a model on a folder of images or a data set, keeps the best epoch, and judges it on the test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cvfast.engine.checkpoint import load_checkpoint
from cvfast.engine.classifier import load_classifier, logits_of
from cvfast.engine.config import TrainConfig
from cvfast.engine.evaluate import judge
from cvfast.engine.recipes.running import run_recipe
from cvfast.engine.run import Run, load_data
from cvfast.engine.train import TrainResult, saved_config

if TYPE_CHECKING:
    from rich.console import Console

Options = TrainConfig


def run(options: TrainConfig, out: Path, console: Console | None) -> None:
    """See `cvfast.engine.recipes`; a checkpoint in ``out`` goes on with its own settings, whatever ``options`` say."""
    last = out / "last.safetensors"
    if last.exists():
        options = saved_config(load_checkpoint(last))
    run_recipe(make, write_report, options, out, console)


def make(config: TrainConfig, device: torch.device) -> Run:
    """The run of a classifier."""
    return Run(config, device, augmentation=None)


def write_report(result: TrainResult) -> list[str]:
    """Judges the best epoch on the test images, in the run's folder; returns the gist for the terminal."""
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
    report.write_report(folder, f"cvfast train: {config.model}", sections)
    return [
        f"best epoch {result.best_epoch}: test accuracy {evaluation.accuracy:.2%}; in {folder}",
        f"next: cvfast eval --checkpoint {folder}",
    ]
