"""`cvfast demo`: the whole job on embedded images, with promises that are checked."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from cvfast.data import DataSplits, load
from cvfast.engine.classifier import Classifier, load_classifier, logits_of
from cvfast.engine.config import TrainConfig
from cvfast.engine.evaluate import Evaluation, judge
from cvfast.engine.export import ExportCheck, check_export, export
from cvfast.engine.train import TrainResult, train

if TYPE_CHECKING:
    from rich.console import Console

DATA = "fashion-mnist"
RUNS = {"native": "native", "cvfast": "auto"}  # name of a run -> backend
# Small images of centred clothes want smaller changes, and 5,000 of them more steps, than the defaults give.
RECIPE = {"batch_size": 32, "weight_decay": 0.05, "rotation": 3.0, "scaling": 0.05, "translation": 0.05}


@dataclass(frozen=True)
class Plan:
    """How long to train, and the accuracy in [0, 1] to promise for it."""

    epochs: int
    accuracy: float


FULL = Plan(epochs=25, accuracy=0.85)
QUICK = Plan(epochs=2, accuracy=0.50)
LARGEST_ACCURACY_GAP = 0.01


@dataclass(frozen=True)
class Promise:
    """Something that the demo claims, with the figures that show whether it holds."""

    text: str
    figures: str
    kept: bool


def run_demo(folder: Path, *, seed: int, threads: int | None, quick: bool, console: Console) -> bool:
    """Trains twice from one seed (torch's operators, cvfast's), judges, exports, checks, and writes the report.

    ``folder`` gets report.md, report.html, the pictures, model.onnx and one folder per run; those of an earlier demo
    are replaced.

    Returns:
        Whether every promise was kept.
    """
    plan = QUICK if quick else FULL
    data = load(DATA)
    results = {name: _train(folder / name, backend, plan, seed, threads, console) for name, backend in RUNS.items()}
    classifiers = {name: load_classifier(result.folder) for name, result in results.items()}
    logits = {name: logits_of(classifier, data.test) for name, classifier in classifiers.items()}
    judged = {name: judge(values, data.test.labels, data.classes) for name, values in logits.items()}
    console.print(judged["cvfast"].table())

    console.print("exporting to ONNX, and running it with onnxruntime …", highlight=False)
    check = check_export(export(classifiers["cvfast"], folder / "model.onnx"), classifiers["cvfast"], data.test)
    promises = _promises(plan, judged, check)
    _write_report(folder, results, judged, data, classifiers["cvfast"], logits["cvfast"], promises)

    for promise in promises:
        mark = "[green]kept[/]  " if promise.kept else "[bold red]BROKEN[/]"
        console.print(f"{mark} {promise.text}: {promise.figures}", highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'report.html'} (and report.md)", highlight=False)
    return all(promise.kept for promise in promises)


def _train(folder: Path, backend: str, plan: Plan, seed: int, threads: int | None, console: Console) -> TrainResult:
    shutil.rmtree(folder, ignore_errors=True)
    console.rule(f"training, backend {backend}")
    config = TrainConfig(
        data=DATA, epochs=plan.epochs, seed=seed, threads=threads, backend=backend, out=str(folder), **RECIPE
    )
    return train(config, console=console)


def _promises(plan: Plan, judged: dict[str, Evaluation], check: ExportCheck) -> list[Promise]:
    accuracies = [evaluation.accuracy for evaluation in judged.values()]
    gap = max(accuracies) - min(accuracies)
    figures = ", ".join(f"{name} {evaluation.accuracy:.1%}" for name, evaluation in judged.items())
    return [
        Promise(f"test accuracy of at least {plan.accuracy:.0%}", figures, min(accuracies) >= plan.accuracy),
        Promise("both within one point", f"{100 * gap:.1f} points apart", gap <= LARGEST_ACCURACY_GAP + 1e-9),
        Promise("the ONNX export computes the same in onnxruntime", str(check), check.passed),
    ]


def _write_report(
    folder: Path,
    results: dict[str, TrainResult],
    judged: dict[str, Evaluation],
    data: DataSplits,
    classifier: Classifier,
    logits: torch.Tensor,
    promises: Sequence[Promise],
) -> None:
    from cvfast.engine import report
    from cvfast.engine.report import Section

    histories = {name: result.history for name, result in results.items()}
    report.learning_curves(folder / "learning_curves.png", histories)
    report.epoch_times(folder / "epoch_times.png", histories)
    parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
    runs = [
        [name, f"{judged[name].accuracy:.1%}", str(result.best_epoch), f"{_seconds_per_epoch(result):.2f}"]
        for name, result in results.items()
    ]
    sections = [
        Section(
            "What was promised",
            table=[["promise", "figures", "kept"], *([p.text, p.figures, "yes" if p.kept else "NO"] for p in promises)],
        ),
        Section(
            "What was done",
            f"The CNN of PyTorch's tutorial ({parameters:,} parameters) was trained on {len(data.train):,} images of "
            f"Fashion-MNIST, of which a part was held out to choose the best epoch, and judged on {len(data.test):,} "
            "test images: once with torch's own operators (native), once with cvfast's, from the same seed.",
            [["run", "test accuracy", "best epoch", "seconds per epoch (median)"], *runs],
        ),
        Section("Learning curves", picture="learning_curves.png"),
        Section("Time per epoch", picture="epoch_times.png"),
        *report.judgement(folder, judged["cvfast"], data.test, logits),
        report.machine(),
    ]
    report.write_report(folder, "cvfast demo", sections)


def _seconds_per_epoch(result: TrainResult) -> float:
    return median(entry.seconds for entry in result.history)
