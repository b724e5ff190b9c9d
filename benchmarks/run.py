"""Compares cvfast with torch: python -m benchmarks.run [operator ...]; figures go to benchmarks/results/<operator>.csv.

Providers take turns within one process, so that the machine's drifting speed meets all of them; the minimum and the
median of the repeats are kept. No time is given for a result that is wrong: each provider's result is first compared
with the float64 reference.
"""

from __future__ import annotations

import csv
import importlib
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import cvfast
from cvfast.testing import SPECS, Case, OpSpec, Sample, assert_as_accurate, relative_error

RESULTS = Path(__file__).parent / "results"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Row:
    """One provider's figures on one case, as it stands in the CSV file."""

    operator: str
    group: str
    case: str
    direction: str  # "forward" or "training" (forward and all gradients)
    threads: int
    provider: str
    min_ms: float
    median_ms: float
    gflops: float  # of the minimum; training counts three times the forward's operations
    relative_error: float  # L2, of the forward result against float64


def providers(spec: OpSpec) -> dict[str, tuple[Callable, torch.memory_format]]:
    """Who competes: torch and cvfast, each in both memory formats."""
    functions = {"torch": spec.native, "cvfast": lambda **k: spec.function(**k, backend="ext")}
    return {f"{name} {f}": (function, FORMATS[f]) for name, function in functions.items() for f in FORMATS}


def forward(function: Callable, sample: Sample) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return sample.call(function)

    return run


def training(function: Callable, sample: Sample) -> Callable[[], object]:
    sample = sample.requiring_grad()
    cotangent = torch.ones_like(sample.call(function))
    return lambda: torch.autograd.grad(sample.call(function), sample.tensors(), cotangent)


DIRECTIONS = {"forward": forward, "training": training}


def measure(spec: OpSpec, group: str, case: Case, direction: str, repeats: int, device: str) -> Iterator[Row]:
    """The figures of all providers on one case."""
    exact = case.sample(torch.float32, device=device).to(torch.float64).call(spec.reference)
    native = case.sample(torch.float32, device=device).call(spec.native)
    runs, errors = {}, {}
    for name, (function, memory_format) in providers(spec).items():
        sample = case.sample(torch.float32, memory_format, device)
        result = sample.call(function)
        assert_as_accurate(result, native, exact, f"{name} on {case}", bound=spec.bound(sample, "ext", "output"))
        errors[name] = relative_error(result, exact)
        runs[name] = DIRECTIONS[direction](function, sample)
    times = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            times[name].append(timed(run, device))
    flops = spec.flops(case.sample(torch.float32)) * (1 if direction == "forward" else 3)
    for name, all_times in times.items():
        kept = all_times[2:]  # the first two rounds warm up
        yield Row(
            spec.name, group, case.name, direction, torch.get_num_threads(), name,
            round(min(kept) * 1e3, 4), round(statistics.median(kept) * 1e3, 4),
            round(flops / min(kept) / 1e9, 2), float(f"{errors[name]:.2g}"),
        )  # fmt: skip


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(rows: list[Row]) -> float:
    """torch's best time over cvfast's best, of one case's minima: above 1 cvfast is faster."""
    best = {who: min(r.min_ms for r in rows if r.provider.startswith(who)) for who in ("torch", "cvfast")}
    return best["torch"] / best["cvfast"]


def geomean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def show(console: Console, rows: list[Row]) -> None:
    """One line per case and direction, one per group."""
    table = Table("group", "case", "direction", *(f"{n}, ms" for n in dict.fromkeys(r.provider for r in rows)), "ratio")
    by_case: dict[tuple, list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.group, row.direction, row.case), []).append(row)
    groups: dict[tuple, list[float]] = {}
    for (group, direction, case), of_case in by_case.items():
        groups.setdefault((group, direction), []).append(ratio(of_case))
        table.add_row(group, case, direction, *(f"{r.min_ms:.3f}" for r in of_case), f"{ratio(of_case):.2f}")
    console.print(table)
    summary = Table("group", "direction", "geomean of torch's best / cvfast's best", "least")
    for (group, direction), ratios in groups.items():
        summary.add_row(group, direction, f"{geomean(ratios):.2f}", f"{min(ratios):.2f}")
    console.print(summary)


def write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def main(
    operators: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(SPECS)}; all if none is named")] = None,
    group: Annotated[list[str] | None, typer.Option(help="only these groups of cases")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, training; both if none is named")] = None,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="timed calls of each provider")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Times cvfast against torch on every case, in turns, and keeps the figures as CSV."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(threads)
    console.print(
        f"cvfast {cvfast.__version__}, torch {torch.__version__}, {platform.processor()}, {threads} thread(s)"
    )
    for name in operators or list(SPECS):
        spec, groups = SPECS[name], importlib.import_module(f"benchmarks.cases.{name}").GROUPS
        wanted = [
            (g, c, d) for g in group or groups for d in direction or DIRECTIONS for c in groups[g]
        ]  # fmt: skip
        rows = []
        for g, c, d in track(wanted, description=name, console=console):
            rows += measure(spec, g, c, d, repeats, device)
        show(console, rows)
        write(rows, RESULTS / f"{name}{'' if threads == 1 else f'-{threads}-threads'}.csv")


if __name__ == "__main__":
    typer.run(main)
