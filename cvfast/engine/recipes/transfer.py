"""Trains a model on one data set, fine-tunes it on few images of another, and compares that with random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from cvfast.data import DataSplits
from cvfast.engine import distributed
from cvfast.engine.checkpoint import replace_file
from cvfast.engine.classifier import Classifier, load_classifier, logits_of
from cvfast.engine.config import RunConfig, TrainConfig
from cvfast.engine.evaluate import Evaluation, judge
from cvfast.engine.loop import BEST, LAST
from cvfast.engine.recipes.running import TWINS, Gap, compare
from cvfast.engine.run import Run, load_data
from cvfast.engine.train import TrainResult, resume, train
from cvfast.models import input_size

if TYPE_CHECKING:
    from rich.console import Console

SOURCE, SCRATCH, TUNED = "source", "scratch", "fine-tuned"  # folders of the runs; the latter two with a seed


@dataclass(frozen=True, kw_only=True)
class Options(RunConfig):
    """What the recipe is told besides what every run is; epochs, lr, warm-up and batches are those on the few images.

    Attributes:
        data: the data set of which few images are used, as :func:`cvfast.data.load` takes it; its test images judge.
        per_class: how many of its training images of each class, a tenth of which is not trained on but watched.
        seeds: how many times to choose other images and random weights.
        source: the data set to learn from first.
        source_epochs: passes over it.
        source_lr: the largest learning rate there.
        model: a classifier among :func:`cvfast.models.list_models`.
        freeze: name of the last of the modules that do not learn on the few images, with all before it, or None.
        unfreeze_every: let one more stage of the frozen ones learn every so many epochs, or None to keep them frozen.
        layer_decay: on the few images, each stage's learning rate is so many times that of the stage behind it.
    """

    data: str = "cifar10"
    epochs: int = 20
    batch_size: int = 32
    lr: float = 0.05
    per_class: int = 50
    seeds: int = 3
    source: str = "fashion-mnist"
    source_epochs: int = 12
    source_lr: float = 0.1
    model: str = "resnet20_cifar"
    freeze: str | None = None
    unfreeze_every: int | None = None
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("seeds")
        self.source_config()
        self.few_config(self.seed, tuned=True)

    @property
    def name(self) -> str:
        return "transfer"

    def source_config(self) -> TrainConfig:
        """The run on the large data set."""
        changes = {"data": self.source, "epochs": self.source_epochs, "lr": self.source_lr, "batch_size": 64}
        return self._config(rotation=10.0, scaling=0.25, **changes)

    def few_config(self, seed: int, tuned: bool, weights: str | None = None) -> TrainConfig:
        """A run on the few images: from ``weights`` if ``tuned``, else the same images and random weights."""
        common = self._config(data=self.data, seed=seed, rotation=0.0, per_class=self.per_class)
        if not tuned:
            return common
        return replace(
            common,
            weights=weights,
            freeze=self.freeze,
            unfreeze_every=self.unfreeze_every,
            layer_decay=self.layer_decay,
        )

    def _config(self, **changes) -> TrainConfig:
        shared = {name: getattr(self, name) for name in RunConfig.__dataclass_fields__ if name not in ("twin", "out")}
        fixed = {"model": self.model, "channels": 3, "optimizer": "sgd", "weight_decay": 5e-4}
        return TrainConfig(**(shared | fixed | changes))


@dataclass(frozen=True)
class Comparison:
    """Test accuracies in [0, 1] of two trainings on the same few images."""

    seed: int
    scratch: float
    tuned: float

    @property
    def gain(self) -> float:
        """In points."""
        return 100 * (self.tuned - self.scratch)


def run(options: Options, out: Path, console: Console | None) -> None:
    """See `cvfast.engine.recipes`. Each training has a folder in ``out``, and goes on where it stopped.

    The checkpoint of ``out`` itself is the fine-tuned classifier of the first seed.
    """
    target = load_data(options.data, input_size(options.model), options.download)  # missing data is missed at once
    if not options.twin:
        _run(options, target, out, console)
        return
    results = {}
    for name, backend in TWINS.items():
        (out / name).mkdir(exist_ok=True)
        results[name] = _run(replace(options, backend=backend, twin=False), target, out / name, console)
    if distributed.rank() == 0:
        for line in compare(options, results, out, _gaps_on_test_images(results, target)):
            _say(console, line)


def _run(options: Options, target: DataSplits, out: Path, console: Console | None) -> dict[str, TrainResult]:
    """All trainings, by the name of their folder, and their report."""
    source = _train(options.source_config(), out / SOURCE, console)
    weights = str(out / SOURCE / f"{LAST}.safetensors")
    results = {}
    for seed in range(options.seed, options.seed + options.seeds):
        for start in (SCRATCH, TUNED):
            config = options.few_config(seed, start == TUNED, weights)
            results[start, seed] = _train(config, out / f"{start}-{seed}", console)
    if distributed.rank() == 0:
        for line in _report(options, target, source, results, out):
            _say(console, line)
    return {SOURCE: source} | {f"{start}-{seed}": result for (start, seed), result in results.items()}


def _gaps_on_test_images(results: dict[str, dict[str, TrainResult]], target: DataSplits) -> list[Gap]:
    """Between twins, in what the recipe is about; held-out images are too few to tell."""
    native, ours = (
        {name: _judged(result, target).accuracy for name, result in results[twin].items() if name != SOURCE}
        for twin in TWINS
    )
    allowed = Run.NOISE["validation_accuracy"]
    return [Gap(f"{name}: test_accuracy", None, abs(native[name] - ours[name]), allowed) for name in native]


def _train(config: TrainConfig, folder: Path, console: Console | None) -> TrainResult:
    if console is not None:
        console.rule(folder.name)
    if (folder / f"{LAST}.safetensors").exists():
        return resume(folder, console=console)
    return train(replace(config, out=str(folder)), console=console)


def _say(console: Console | None, line: str) -> None:
    if console is not None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _last(result: TrainResult) -> Classifier:
    """The last epoch's: choosing the best would take more images than the few."""
    return load_classifier(result.folder / f"{LAST}.safetensors")


def _judged(result: TrainResult, target: DataSplits) -> Evaluation:
    classifier = _last(result)
    return judge(logits_of(classifier, target.test), target.test.labels, classifier.classes)


def _report(
    options: Options,
    target: DataSplits,
    source: TrainResult,
    results: dict[tuple[str, int], TrainResult],
    out: Path,
) -> list[str]:
    from cvfast.engine import report

    seeds = range(options.seed, options.seed + options.seeds)
    comparisons = [
        Comparison(seed, *(_judged(results[start, seed], target).accuracy for start in (SCRATCH, TUNED)))
        for seed in seeds
    ]
    gain = mean(comparison.gain for comparison in comparisons)
    tuned = results[TUNED, options.seed]
    replace_file(out / f"{BEST}.safetensors", (tuned.folder / f"{LAST}.safetensors").read_bytes())
    report.learning_curves(out / "source.png", {options.source: source.history})
    report.learning_curves(
        out / "learning_curves.png", {start: results[start, options.seed].history for start in (SCRATCH, TUNED)}
    )
    bars = {SCRATCH: [c.scratch for c in comparisons], TUNED: [c.tuned for c in comparisons]}
    report.accuracy_bars(out / "accuracies.png", [f"seed {seed}" for seed in seeds], bars)
    table = [["seed", "from random weights", "fine-tuned", "gain (points)"]]
    table += [[str(c.seed), f"{c.scratch:.2%}", f"{c.tuned:.2%}", f"{c.gain:+.1f}"] for c in comparisons]
    table.append(["mean", *(f"{mean(values):.2%}" for values in bars.values()), f"{gain:+.1f}"])
    logits = logits_of(_last(tuned), target.test)
    sections = [
        report.Section(
            "What was done",
            f"{options.model} was trained on {options.source}, then fine-tuned on {options.per_class} training images "
            f"per class of {options.data}, and, for comparison, trained on the same images from random weights with "
            f"the same settings. Accuracy is that of the last epoch's weights on {len(target.test):,} test images, "
            "which had no influence on anything. Each seed has other images and other random weights.",
            table,
        ),
        report.Section("Accuracy", picture="accuracies.png"),
        report.Section(f"Learning curves on the few images, seed {options.seed}", picture="learning_curves.png"),
        report.Section(f"Learning curves on {options.source}", picture="source.png"),
        *report.judgement(out, _judged(tuned, target), target.test, logits),
        report.settings(options),
        report.machine(),
    ]
    report.write_report(out, "cvfast train transfer", sections)
    return [
        *(f"seed {c.seed}: from random weights {c.scratch:.2%}, fine-tuned {c.tuned:.2%}" for c in comparisons),
        f"fine-tuning gains {gain:+.1f} points on average",
        f"report: {out / 'report.html'} (and report.md)",
    ]
