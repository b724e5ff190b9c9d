"""Compares cvfast with torch and other engines: python -m benchmarks.run [subject ...]; see docs/benchmarks.md.

Providers take turns within one process, so that the machine's drifting speed meets all of them; the minimum and the
median of the repeats are kept. No time is given for a result that is wrong: each provider's result is first compared
with the float64 reference. Figures go to benchmarks/results/<subject>.csv.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

import cvfast
from benchmarks import memory, overhead, report, results
from benchmarks.providers import PROVIDERS, Prepared, Provider
from benchmarks.results import Row
from benchmarks.subject import Subject, Unable, Work, load
from benchmarks.timing import QUICK, Effort, take_turns
from cvfast import _library, _peak
from cvfast.testing import SPECS, relative_error

DIRECTIONS = ("forward", "training")
BURSTS = 10  # of multiply-adds before each round: slow calls have few rounds, and a core is not always at its best
INACCURATE = "less accurate than torch"  # fails the run, once all figures are kept
WRONG = 1e-2  # a relative error from here on is no rounding error
SUBJECTS = [*SPECS, "model", "accelerate"]  # operators, and whole models
OTHERS = {"memory": memory.main, "overhead": overhead.main}


def prepare(provider: Provider, work: Work) -> tuple[Prepared | None, float | None, str]:
    """(what to time, its relative error, why not). Other engines fail in their own ways; each failure is told."""
    try:
        provider.check(work)
        prepared = provider.prepare(work)
        result = work.judged(prepared.output())
    except Unable as reason:
        return None, None, str(reason)
    except Exception as error:
        if provider.name in results.CVFAST + results.TORCH:
            raise
        return None, None, f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
    if result.shape != work.exact.shape:
        return None, None, f"wrong result: shape {list(result.shape)}, expected {list(work.exact.shape)}"
    error = relative_error(result, work.exact)
    if provider.name in results.CVFAST:
        try:
            work.check(result, provider.name)
        except AssertionError as inaccurate:
            return None, error, f"{INACCURATE}: {inaccurate}"
    if not error < WRONG:
        return None, error, f"wrong result: relative error {error:.1e}"
    return prepared, error, ""


def measure(work: Work, group: str, effort: Effort, providers: tuple[Provider, ...] = PROVIDERS) -> list[Row]:
    """The figures of all providers on one case."""
    outcomes = {provider.name: prepare(provider, work) for provider in providers}
    on_cpu = work.device == "cpu"
    turns = take_turns(
        {name: prepared.run for name, (prepared, _, _) in outcomes.items() if prepared is not None},
        effort,
        between=(lambda: max(_peak.burst(_library.C.active_isa()) for _ in range(BURSTS))) if on_cpu else None,
        synchronize=None if on_cpu else torch.cuda.synchronize,
    )
    peak = max(turns.between, default=None)
    least = None if peak is None or work.threads > 1 else work.least_ms(peak)
    rows = []
    for name, (_, error, note) in outcomes.items():
        row = Row(work.subject.name, group, work.case.name, work.direction, work.threads, name, note=note)
        if name in turns.seconds:
            seconds = turns.seconds[name]
            gflops = work.flops / min(seconds) / 1e9
            row = replace(
                row, repeats=len(seconds), min_ms=round(min(seconds) * 1e3, 4),
                median_ms=round(statistics.median(seconds) * 1e3, 4), gflops=round(gflops, 2),
                peak_share=None if peak is None else round(gflops / peak / work.threads, 3),
                limit_share=None if least is None else round(least / min(seconds) / 1e3, 3),
            )  # fmt: skip
        rows.append(row if error is None else replace(row, relative_error=float(f"{error:.2g}")))
    return rows


def measure_subject(
    subject: Subject, groups: list[str], directions: list[str], threads: int, effort: Effort,
    providers: tuple[Provider, ...], device: str, console: Console,
) -> list[Row]:  # fmt: skip
    """The figures of all cases, with a bar that shows how far it is."""
    torch.set_num_threads(threads)
    providers = tuple(p for p in providers if subject.competitors is None or p.name in subject.competitors)
    wanted = [(g, c, d) for g in groups for d in directions for c in subject.cases(d).get(g, ())]
    rows: list[Row] = []
    for group, case, direction in track(wanted, f"{subject.name}, {threads} thread(s)", console=console):
        rows += measure(subject.work(case, direction, threads, device), group, effort, providers)
    return rows


def chosen(what: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """The wanted names, all known ones if none is wanted; a usage error for a name that is not known."""
    for name in wanted or ():
        if name not in known:
            raise typer.BadParameter(f"unknown {what} {name!r}; there are {', '.join(known)}")
    return wanted or known


def thread_counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"threads {text!r}: expected numbers from 1 on, such as 1 or 1,2")
    return [int(part) for part in parts]


def main(
    subjects: Annotated[list[str] | None, typer.Argument(
        help=f"of {', '.join([*SUBJECTS, *OTHERS])}; all operators if none is named")] = None,
    group: Annotated[list[str] | None, typer.Option(help="only these groups of cases")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, training; both if none is named")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="only these providers; all if none is named")] = None,
    threads: Annotated[str, typer.Option(help="threads of every provider; 1,2: both, and their ratio")] = "1",
    repeats: Annotated[int | None, typer.Option(
        min=1, help="timed calls of each provider; default: as many as fit into 0.4 s, 4 to 60")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="few repeats: a look, not a measurement")] = False,
    peak: Annotated[bool, typer.Option("--peak", help="only what one core does at most")] = False,
) -> None:  # fmt: skip
    """Times cvfast against torch and other engines on every case, in turns, and keeps the figures as CSV."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    if peak:
        console.print(_peak.table(_peak.measure()))
        return
    names = chosen("subject", subjects, [*SUBJECTS, *OTHERS]) if subjects else list(SPECS)
    directions = chosen("direction", direction, list(DIRECTIONS))
    providers = tuple(p for p in PROVIDERS if p.name in chosen("provider", provider, [p.name for p in PROVIDERS]))
    effort = Effort(0, repeats, repeats) if repeats else QUICK if quick else Effort()
    counts = thread_counts(threads)
    console.print(f"cvfast {cvfast.__version__}, torch {torch.__version__}, {_library.C.active_isa()}")
    loaded = {name: load(name) for name in names if name in SUBJECTS}
    known = dict.fromkeys(g for s in loaded.values() for d in directions for g in s.cases(d))
    wanted_groups = chosen("group", group, list(known))
    if device == "cuda":  # torch's default rounds operands of convolutions to 10 bits
        torch.backends.cudnn.allow_tf32 = False
    inaccurate = False
    for name in names:
        if name in OTHERS:
            OTHERS[name](console, quick)
            continue
        subject, rows = loaded[name], []
        groups = [g for g in wanted_groups if any(g in subject.cases(d) for d in directions)]
        if not groups:
            continue
        for count in counts:
            of_count = measure_subject(subject, groups, directions, count, effort, providers, device, console)
            results.update(of_count, results.FOLDER / f"{name}{'' if count == 1 else f'-{count}-threads'}.csv")
            for table in (*report.group_tables(of_count), report.goals_table(subject.goals, of_count)):
                console.print(table)
            rows += of_count
        if len(counts) > 1:
            console.print(report.scaling_table(rows))
        for note in report.notes(rows):
            console.print(note, markup=False)
        inaccurate |= any(row.note.startswith(INACCURATE) for row in rows)
    if inaccurate:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
