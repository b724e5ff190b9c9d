"""Figures: a row per provider and case, kept as CSV, and the numbers that are formed of several rows."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
CVFAST = ("cvfast contiguous", "cvfast channels_last")
TORCH = ("torch contiguous", "torch channels_last")
WINOGRAD_PEERS = ("MNN", "ncnn")


@dataclass(frozen=True)
class Row:
    """One provider's figures on one case, as they stand in the CSV file. None (empty): not measured, see `note`."""

    operator: str
    group: str
    case: str
    direction: str  # "forward" or "training" (forward and the gradients to all operands)
    threads: int
    provider: str
    repeats: int | None = None
    min_ms: float | None = None
    median_ms: float | None = None
    gflops: float | None = None  # of the minimum, by the definition's operations; training counts them three times
    peak_share: float | None = None  # gflops over the peak of `threads` cores measured between the calls; CPU only
    limit_share: float | None = None  # the least time that the case takes on one core over min_ms; one thread, CPU only
    relative_error: float | None = None  # L2, of the forward result against float64
    note: str = ""  # why there are no figures

    @property
    def key(self) -> tuple[str, str, str]:
        """(group, direction, case)."""
        return self.group, self.direction, self.case


_PARSERS = {"threads": int, "repeats": int} | dict.fromkeys(
    ("min_ms", "median_ms", "gflops", "peak_share", "limit_share", "relative_error"), float
)


def update(rows: list[Row], path: Path) -> None:
    """Keeps the rows in the file, beside those of cases that were not measured this time."""
    measured = {row.key for row in rows}
    before = read(path) if path.exists() else []
    write([*(row for row in before if row.key not in measured), *rows], path)


def write(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [Row(**{name: _parse(name, text) for name, text in line.items()}) for line in csv.DictReader(file)]


def _parse(name: str, text: str) -> object:
    parser = _PARSERS.get(name)
    return text if parser is None else parser(text) if text else None


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by (group, direction, case), in their order."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault(row.key, []).append(row)
    return cases


def best(rows: Iterable[Row], providers: Iterable[str]) -> Row | None:
    """The fastest of the named providers in one case; None if none of them was measured."""
    measured = [row for row in rows if row.provider in providers and row.min_ms is not None]
    return min(measured, key=lambda row: row.min_ms, default=None)


def ratio(rows: list[Row], rivals: Iterable[str] = TORCH) -> float | None:
    """The rivals' best time over cvfast's best in one case: above 1 cvfast is faster. None if either is missing."""
    rival, own = best(rows, rivals), best(rows, CVFAST)
    return None if rival is None or own is None else rival.min_ms / own.min_ms


def geomean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
