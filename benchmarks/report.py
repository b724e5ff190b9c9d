"""Figures as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.table import Table

from benchmarks.goals import Goal, judge
from benchmarks.results import CVFAST, TORCH, WINOGRAD_PEERS, Row, best, by_case, geomean, ratio

COLUMNS = {  # one column of times per entry, each the best of its providers
    "cvfast": CVFAST,
    "torch": TORCH,
    "torch.compile": ("torch.compile",),
    "onnxruntime": ("onnxruntime",),
    "OpenVINO": ("OpenVINO",),
    "MNN": ("MNN",),
    "ncnn": ("ncnn",),
}
WITH_ERROR = ("cvfast", *WINOGRAD_PEERS)


def group_tables(rows: Iterable[Row]) -> list[Table]:
    """A table per group and direction: a line per case, the group's geometric means and worst ratios below."""
    tables: dict[tuple[str, str], Table] = {}
    ratios: dict[tuple[str, str], list[tuple[float | None, float | None]]] = {}
    for (group, direction, case), of_case in by_case(rows).items():
        key = group, direction
        if key not in tables:
            tables[key] = Table(
                "case", *(f"{column}, ms" for column in COLUMNS), "torch/cvfast", "MNN, ncnn/cvfast", "peak share",
                "of the limit",
                title=f"{group}, {direction}, {of_case[0].threads} thread(s)", title_justify="left",
            )  # fmt: skip
        pair = ratio(of_case), ratio(of_case, WINOGRAD_PEERS)
        ratios.setdefault(key, []).append(pair)
        own = best(of_case, CVFAST)
        shares = (None, None) if own is None else (own.peak_share, own.limit_share)
        tables[key].add_row(
            case, *(_time(best(of_case, who), name in WITH_ERROR) for name, who in COLUMNS.items()),
            *map(_number, pair), *map(_number, shares),
        )  # fmt: skip
    for key, table in tables.items():
        if len(ratios[key]) == 1:
            continue
        table.add_section()
        columns = [[value for value in column if value is not None] for column in zip(*ratios[key], strict=True)]
        for name, reduce in (("geometric mean", geomean), ("worst", min)):
            table.add_row(name, *[""] * len(COLUMNS), *(_number(reduce(c) if c else None) for c in columns), "", "")
    return list(tables.values())


def notes(rows: Iterable[Row]) -> list[str]:
    """Who was not measured, why, and in how many cases."""
    counts = Counter((row.provider, row.direction, row.note) for row in rows if row.note)
    return [f"{who}, {direction}: {note} ({n} case(s))" for (who, direction, note), n in counts.items()]


def goals_table(goals: tuple[Goal, ...], rows: list[Row]) -> Table:
    """Which lines of the goals hold; groups of which nothing was measured are left out."""
    measured = {(row.group, row.direction) for row in rows}
    table = Table("goal", "group", "holds", "seen", title="goals", title_justify="left")
    for verdict in judge(goals, rows):
        if all((group, verdict.goal.direction) in measured for group in verdict.groups):
            holds = {True: "yes", False: "NO", None: "open"}[verdict.holds]
            group = "all together" if verdict.goal.together else verdict.groups[0]
            table.add_row(verdict.goal.text, group, holds, verdict.seen)
    return table


def scaling_table(rows: list[Row]) -> Table:
    """Time with the fewest threads over time with each other number, cvfast's and torch's best, per case."""
    fewest, *others = sorted({row.threads for row in rows})
    heads = [f"{who} {fewest}→{n}" for n in others for who in ("cvfast", "torch")]
    table = Table("group", "direction", "case", *heads, title="threads: times faster", title_justify="left")
    cases = {n: by_case(row for row in rows if row.threads == n) for n in (fewest, *others)}
    for (group, direction, case), base in cases[fewest].items():
        cells = []
        for n in others:
            for who in (CVFAST, TORCH):
                pair = best(base, who), best(cases[n].get((group, direction, case), []), who)
                cells.append(_number(None if None in pair else pair[0].min_ms / pair[1].min_ms))
        table.add_row(group, direction, case, *cells)
    return table


def _time(row: Row | None, with_error: bool) -> str:
    if row is None:
        return "–"
    return f"{row.min_ms:.3f}" + (f" ({row.relative_error:.1g})" if with_error else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
