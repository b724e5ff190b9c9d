"""What all recipes do alike: begin or go on, and train twins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cvfast.engine import distributed
from cvfast.engine.checkpoint import load_checkpoint
from cvfast.engine.config import RunConfig
from cvfast.engine.logs import EpochFigures
from cvfast.engine.loop import LAST, Loop
from cvfast.engine.train import TrainResult, run_loop

if TYPE_CHECKING:
    from rich.console import Console

TWINS = {"native": "native", "cvfast": "auto"}  # folder of a twin -> its backend

Make = Callable[[RunConfig, torch.device], Loop]
Report = Callable[[TrainResult], list[str]]  # writes the report into the run's folder; returns lines for the terminal


def run_recipe(make: Make, report: Report, options: RunConfig, out: Path, console: Console | None) -> None:
    """Trains in ``out``, or goes on where an earlier call stopped, and reports; with ``options.twin``, two runs."""
    if options.twin:
        results = {}
        for name, backend in TWINS.items():
            _say(console, f"training, backend {backend}")
            twin = replace(options, backend=backend, twin=False)
            results[name] = {"": _run(make, report, twin, out / name, console)}
        if distributed.rank() == 0:
            for line in compare(options, results, out):
                _say(console, line)
    else:
        _run(make, report, options, out, console)


def _run(make: Make, report: Report, options: RunConfig, out: Path, console: Console | None) -> TrainResult:
    last = out / f"{LAST}.safetensors"
    checkpoint = load_checkpoint(last) if last.exists() else None
    config = replace(options, out=str(out))
    result = run_loop(config, lambda device: make(config, device), checkpoint, console)
    if result.first_process:
        for line in (*report(result), f"report: {out / 'report.html'} (and report.md)"):
            _say(console, line)
    return result


def _say(console: Console | None, line: str) -> None:
    if console is not None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Gap:
    """How far apart two runs are in one figure: after their first epoch, and in the mean of the last quarter.

    ``first``: None for a figure of the end alone. ``allowed``: what runs that differ in rounding only may differ by at
    the end.
    """

    figure: str
    first: float | None
    last: float
    allowed: float

    @property
    def is_noise(self) -> bool:
        return self.last <= self.allowed


def gaps(one: list[EpochFigures], other: list[EpochFigures], noise: dict[str, float]) -> list[Gap]:
    """The gaps between two runs in the figures that ``noise`` names, with what it allows."""
    quarter = max(1, min(len(one), len(other)) // 4)

    def mean(history: list[EpochFigures], figure: str) -> float:
        return sum(getattr(entry, figure) for entry in history[-quarter:]) / quarter

    return [
        Gap(
            figure,
            abs(getattr(one[0], figure) - getattr(other[0], figure)),
            abs(mean(one, figure) - mean(other, figure)),
            allowed,
        )
        for figure, allowed in noise.items()
    ]


def compare(
    options: RunConfig, results: dict[str, dict[str, TrainResult]], out: Path, judged: Iterable[Gap] = ()
) -> list[str]:
    """Writes the report of twins, by their name, into ``out``; returns the gist for the terminal.

    Each twin is its trainings by name, "" where there is but one. judged: gaps in what their histories do not have.
    """
    from cvfast.engine import report

    table = [["figure", "apart after epoch 1", "apart at the end", "noise up to", "within noise"]]
    lines, pictures, found = [], [], []
    for training, ours in results["cvfast"].items():
        histories = {name: twin[training].history for name, twin in results.items()}
        start, ending = (f"{training}: ", f"_{training}") if training else ("", "")
        for gap in gaps(histories["native"], histories["cvfast"], ours.noise):
            found.append(replace(gap, figure=f"{start}{gap.figure}"))
        for title, draw in {"Learning curves": report.learning_curves, "Time per epoch": report.epoch_times}.items():
            picture = f"{draw.__name__}{ending}.png"
            draw(out / picture, histories)
            pictures.append(report.Section(f"{start}{title}", picture=picture))
    for gap in (*found, *judged):
        first, verdict = "" if gap.first is None else f"{gap.first:.2g}", "yes" if gap.is_noise else "NO"
        table.append([gap.figure, first, f"{gap.last:.3g}", f"{gap.allowed:.3g}", verdict])
        lines.append(
            f"{gap.figure}: {gap.last:.3g} apart at the end, noise up to {gap.allowed:.3g}"
            f"{'' if gap.is_noise else ' (MORE THAN NOISE)'}"
        )
    sections = [
        report.Section(
            "What was done",
            "The recipe ran twice from the same seed: with torch's own operators (native) and with cvfast's. The end "
            "is the mean of the last quarter of the epochs. Each run's own report is in the folder of its name.",
            table,
        ),
        *pictures,
        report.settings(options),
        report.machine(),
    ]
    report.write_report(out, f"Twins: {options.name}", sections)
    return [*lines, f"twins' report: {out / 'report.html'} (and report.md)"]
