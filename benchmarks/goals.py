"""Goals: what a benchmark's figures have to show. Each operator's stand in its cases file and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.limits import NEAR
from benchmarks.results import CVFAST, TORCH, Row, best, by_case, geomean, ratio


@dataclass(frozen=True)
class Goal:
    """One line, in one direction, asked of each group or of their cases together. What is None is not asked.

    geomean, each: at least this ratio of the rivals' best time to cvfast's best; a case near its limit (limits.py)
    counts as one that reaches it.
    peak_share: at least this share of the peak in each case.
    error: at most this relative L2 error of cvfast in each case.
    less_error_than: a provider whose relative L2 error is no smaller in any case.
    """

    text: str
    groups: tuple[str, ...]
    direction: str
    rivals: tuple[str, ...] = TORCH
    geomean: float | None = None
    each: float | None = None
    peak_share: float | None = None
    error: float | None = None
    less_error_than: str | None = None
    together: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the figures of one group, or several together, say. holds: None where there are none or too few to judge by.

    A rival that competes and cannot do the case has a row that says so; one without a row was not asked.
    """

    goal: Goal
    groups: tuple[str, ...]
    holds: bool | None
    seen: str


def judge(goals: tuple[Goal, ...], rows: list[Row]) -> list[Verdict]:
    """A verdict per goal and group; one for all groups of a goal that takes them together."""
    return [
        _judge(goal, groups, rows)
        for goal in goals
        for groups in ([goal.groups] if goal.together else [(group,) for group in goal.groups])
    ]


def _judge(goal: Goal, groups: tuple[str, ...], rows: list[Row]) -> Verdict:
    cases = list(by_case(r for r in rows if r.group in groups and r.direction == goal.direction).values())
    checks = [
        _check("geomean", goal.geomean, _ratios(cases, goal.rivals, goal.geomean), geomean),
        _check("least", goal.each, _ratios(cases, goal.rivals, goal.each), min),
        _check("least share of peak", goal.peak_share, _of_cvfast(cases, "peak_share"), min),
        _check("largest error", goal.error, _of_cvfast(cases, "relative_error"), max, at_most=True),
        _check(
            f"error over {goal.less_error_than}'s", None if goal.less_error_than is None else 1.0,
            [_error_ratio(case, goal.less_error_than) for case in cases], max, at_most=True,
        ),
    ]  # fmt: skip
    asked = [check for check in checks if check is not None]
    states = [holds for holds, _ in asked]
    holds = False if False in states else None if None in states else True
    seen = "; ".join(text for _, text in asked)
    present = {row.provider for case in cases for row in case}
    if holds and (absent := [rival for rival in goal.rivals if rival not in present]):
        return Verdict(goal, groups, None, f"{seen}; {', '.join(absent)} did not compete")
    return Verdict(goal, groups, holds, seen)


def _ratios(cases: list[list[Row]], rivals: tuple[str, ...], asked: float | None) -> list[float | None]:
    """Each case's ratio; not below what is asked where cvfast is near the case's limit."""
    ratios = [ratio(case, rivals) for case in cases]
    shares = _of_cvfast(cases, "limit_share")
    return [
        max(value, asked) if None not in (value, share, asked) and share >= NEAR else value
        for value, share in zip(ratios, shares, strict=True)
    ]


def _of_cvfast(cases: list[list[Row]], figure: str) -> list[float | None]:
    rows = [best(case, CVFAST) for case in cases]
    return [None if row is None else getattr(row, figure) for row in rows]


def _error_ratio(case: list[Row], rival: str | None) -> float | None:
    own, other = best(case, CVFAST), best(case, (rival,))
    return None if own is None or other is None else own.relative_error / other.relative_error


def _check(
    name: str, bound: float | None, values: list[float | None], reduce: Callable, at_most: bool = False
) -> tuple[bool | None, str] | None:
    """(whether it holds, in words); None if nothing is asked. One missing figure leaves open what the others hold."""
    if bound is None:
        return None
    known = [value for value in values if value is not None]
    if not known:
        return None, f"{name}: not measured"
    seen = reduce(known)
    holds = seen <= bound if at_most else seen >= bound
    missing = len(values) - len(known)
    text = f"{name} {seen:.3g} ({'at most' if at_most else 'at least'} {bound:g})"
    return (None if holds and missing else holds), text + (f", {missing} not measured" if missing else "")
