"""Draws the ratios of a CSV file: python -m benchmarks.plot benchmarks/results/conv2d.csv [picture.png]."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.report import COLUMNS
from benchmarks.results import Row, by_case, geomean, ratio, read

RIVALS = {name: who for name, who in COLUMNS.items() if name != "cvfast"}


def group_ratios(rows: list[Row], direction: str) -> dict[str, dict[str, float]]:
    """By rival and group: the geometric mean of the rival's best time over cvfast's best."""
    values: dict[str, dict[str, list[float]]] = {}
    for (group, of, _), case in by_case(rows).items():
        for rival, providers in RIVALS.items():
            if of == direction and (value := ratio(case, providers)) is not None:
                values.setdefault(rival, {}).setdefault(group, []).append(value)
    return {rival: {group: geomean(v) for group, v in groups.items()} for rival, groups in values.items()}


def draw(rows: list[Row], picture: Path) -> None:
    """A panel of bars per direction; 1 is as fast as cvfast, more is slower."""
    panels = {d: group_ratios(rows, d) for d in dict.fromkeys(row.direction for row in rows)}
    figure, all_axes = pyplot.subplots(len(panels), squeeze=False, figsize=(11, 4 * len(panels)), layout="constrained")
    for axes, (direction, by_rival) in zip(all_axes[:, 0], panels.items(), strict=True):
        groups = list(dict.fromkeys(row.group for row in rows))
        width = 0.8 / max(1, len(by_rival))
        for i, (rival, of_group) in enumerate(by_rival.items()):
            known = [(g + (i + 0.5) * width - 0.4, of_group[n]) for g, n in enumerate(groups) if n in of_group]
            axes.bar(*zip(*known, strict=True), width, label=rival)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xticks(range(len(groups)), groups)
        axes.set(title=direction, ylabel="time / cvfast's, geometric mean")
        axes.legend(ncols=3)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def main(
    csv_file: Annotated[Path, typer.Argument(exists=True, help="a file that benchmarks.run left")],
    picture: Annotated[Path | None, typer.Argument(help="default: beside the CSV file, .png")] = None,
) -> None:
    """Draws a picture of the ratios per group."""
    target = picture or csv_file.with_suffix(".png")
    draw(read(csv_file), target)
    typer.echo(f"wrote {target}")


if __name__ == "__main__":
    typer.run(main)
