"""Pictures and a report page of a run, for people."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cvfast._info import facts
from cvfast.data import ImageData
from cvfast.engine.evaluate import Evaluation
from cvfast.engine.logs import EpochFigures

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (after the choice of the renderer)

COLORS = ("#5b6770", "#d1495b", "#2e86ab", "#66a182")
DPI = 130
SAMPLES = 18  # images in the picture of predictions
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
}


def learning_curves(path: Path, histories: dict[str, list[EpochFigures]]) -> None:
    """The panels of the runs' figures over the epochs, one colour per run."""
    panels = next(iter(histories.values()))[0].PANELS
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(panels), figsize=(4.75 * len(panels), 3.6), layout="constrained", squeeze=False
        )
        for axes, panel in zip(grid.flat, panels, strict=True):
            for number, (name, history) in enumerate(histories.items()):
                color, width = (
                    COLORS[number],
                    3.5 if number == 0 and len(histories) > 1 else 1.4,
                )  # coinciding runs show
                epochs = [entry.epoch for entry in history]
                for line, (field_name, label) in zip(("-", "--", ":"), panel.lines.items(), strict=False):
                    values = [panel.scale * getattr(entry, field_name) for entry in history]
                    style = {"color": color, "alpha": 0.8, "linestyle": line, "linewidth": width}
                    axes.plot(epochs, values, label=f"{name}, {label}", **style)
            axes.set(title=panel.title, xlabel="epoch", ylabel=panel.unit)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(fontsize=8)
        _save(figure, path)


def confusion_matrix(path: Path, evaluation: Evaluation) -> None:
    """True against predicted classes; colour: share of the true class, figure: number of images."""
    counts = evaluation.confusion.numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    k = len(evaluation.classes)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(1.8 + 0.55 * k, 1.2 + 0.5 * k), layout="constrained")
        image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
        axes.set_xticks(range(k), evaluation.classes, rotation=45, ha="right")
        axes.set_yticks(range(k), evaluation.classes)
        axes.set(title=f"Test accuracy {evaluation.accuracy:.1%}", xlabel="predicted class", ylabel="true class")
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class (%)")
        _save(figure, path)


def sample_predictions(
    path: Path, images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str], columns: int = 6
) -> None:
    """Images uint8 [N, C, H, W] with the predicted class and its probability; a wrong one in red, with the truth."""
    rows = -(-len(images) // columns)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, grid = plt.subplots(
            rows, columns, figsize=(1.65 * columns, 2.1 * rows), layout="constrained", squeeze=False
        )
        for axes in grid.flat:
            axes.axis("off")
        for axes, image, label, scores in zip(grid.flat, images, labels.tolist(), probabilities, strict=False):
            predicted = int(scores.argmax())
            axes.imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", interpolation="nearest")
            title = f"{classes[predicted]} {scores[predicted]:.0%}"
            if predicted != label:
                title += f"\n(is: {classes[label]})"
            axes.set_title(title, fontsize=8.5, color="black" if predicted == label else "#c1121f")
        _save(figure, path)


def image_grid(path: Path, images: Tensor, columns: int, rows: Sequence[str] = ()) -> None:
    """Images [N, C, H, W] in [0, 1], ``columns`` in a row; ``rows`` names the rows."""
    lines = [torch.cat(list(line), 2) for line in images.clamp(0, 1).split(columns)]
    lines = [F.pad(line, (0, lines[0].shape[2] - line.shape[2])) for line in lines]  # the last may be shorter
    picture = torch.cat(lines, 1).permute(1, 2, 0).squeeze(2).numpy()
    size = 0.8 * columns, 0.8 * len(lines) * images.shape[2] / images.shape[3]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        axes.set_xticks([])
        axes.set_yticks([images.shape[2] * (k + 0.5) for k in range(len(rows))], rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _save(figure, path)


def attention_maps(path: Path, image: Tensor, words: Sequence[str], weights: Tensor, columns: int = 6) -> None:
    """Image uint8 [C, H, W] once per word, with the weights [T, h, w] of the places looked at laid over it in red."""
    rows = max(1, -(-len(words) // columns))
    extent = (0, image.shape[2], image.shape[1], 0)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, grid = plt.subplots(
            rows, columns, figsize=(1.5 * columns, 1.75 * rows), layout="constrained", squeeze=False
        )
        for axes in grid.flat:
            axes.axis("off")
        for axes, word, looked in zip(grid.flat, words, weights, strict=False):
            axes.imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", extent=extent)
            share = (looked / looked.max().clamp_min(1e-12)).numpy()
            axes.imshow(share, cmap="Reds", alpha=0.75 * share, extent=extent, interpolation="bilinear", vmin=0, vmax=1)
            axes.set_title(word, fontsize=9)
        _save(figure, path)


def epoch_times(path: Path, histories: dict[str, list[EpochFigures]]) -> None:
    """Median training time per epoch of each run, with the spread from the fastest to the slowest epoch."""
    seconds = {name: np.array([entry.seconds for entry in history]) for name, history in histories.items()}
    medians = np.array([np.median(values) for values in seconds.values()])
    spread = [[median - v.min(), v.max() - median] for median, v in zip(medians, seconds.values(), strict=True)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.5, 0.9 + 0.6 * len(seconds)), layout="constrained")
        bars = axes.barh(
            list(seconds), medians, xerr=np.array(spread).T, height=0.55, color=COLORS[: len(seconds)],
            error_kw={"ecolor": "#999999", "capsize": 3},
        )  # fmt: skip
        labels = [f"{median:.2f} s" for median in medians]
        axes.bar_label(bars, labels, label_type="center", color="white", fontweight="bold")
        axes.invert_yaxis()
        axes.set(title="Training time per epoch (median, fastest to slowest)", xlabel="seconds")
        axes.grid(axis="y", visible=False)
        _save(figure, path)


def accuracy_bars(path: Path, groups: Sequence[str], accuracies: dict[str, Sequence[float]]) -> None:
    """Accuracies in [0, 1] as bars: a group for each of ``groups``, a colour for each of the names."""
    places, width = np.arange(len(groups)), 0.8 / len(accuracies)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(2 + 1.5 * len(groups), 3.6), layout="constrained")
        for number, (name, values) in enumerate(accuracies.items()):
            offset = (number - (len(accuracies) - 1) / 2) * width
            bars = axes.bar(places + offset, [100 * v for v in values], width, color=COLORS[number], label=name)
            axes.bar_label(bars, fmt="%.1f", fontsize=9)
        axes.set_xticks(places, groups)
        axes.set(ylabel="right answers (%)")
        axes.margins(y=0.25)
        axes.legend(loc="upper center", ncols=len(accuracies))
        _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, then text, a table whose first row is its head, and a picture's file name."""

    title: str
    text: str = ""
    table: list[list[str]] = field(default_factory=list)
    picture: str | None = None


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes ``report.md`` and ``report.html``, the same words, beside the pictures in ``folder``."""
    (folder / "report.md").write_text(_markdown(title, sections), encoding="utf-8")
    (folder / "report.html").write_text(_html(title, sections), encoding="utf-8")


def judgement(folder: Path, evaluation: Evaluation, test: ImageData, logits: Tensor) -> list[Section]:
    """Sections, with their pictures in ``folder``, on how well logits [N, K] fit the images of ``test``."""
    confusion_matrix(folder / "confusion_matrix.png", evaluation)
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    samples = test.subset(chosen)
    images = torch.stack([samples.images[i] for i in range(len(samples))])  # those of a folder are read here
    sample_predictions(folder / "samples.png", images, samples.labels, logits[chosen].softmax(dim=1), test.classes)
    scores = zip(evaluation.classes, evaluation.precision, evaluation.recall, evaluation.f1, strict=True)
    table = [
        ["class", "precision", "recall", "F1"],
        *([name, *(f"{score:.3f}" for score in row)] for name, *row in scores),
        ["macro average", *(f"{score:.3f}" for score in evaluation.macro.values())],
    ]
    return [
        Section("Judgement on the test images", table=table),
        Section("Confusion matrix", picture="confusion_matrix.png"),
        Section("Sample predictions", "Wrong ones in red, with the true class.", picture="samples.png"),
    ]


def settings(options: Any) -> Section:
    """The fields of a dataclass as a section."""
    return Section("Settings", table=[["setting", "value"], *([k, str(v)] for k, v in asdict(options).items())])


def machine() -> Section:
    """What `cvfast info` says of this installation as a section."""
    return Section("Machine", table=[["what", "here"], *(list(fact) for fact in facts())])


def _markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        if section.text:
            lines += ["", section.text]
        if section.table:
            head, *rows = section.table
            ruler = ["---"] * len(head)
            lines += ["", *("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))]
        if section.picture:
            lines += ["", f"![{section.title}]({section.picture})"]
    return "\n".join(lines) + "\n"


CSS = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}th,td{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}
img{max-width:100%}h2{margin-top:2.2rem}"""


def _html(title: str, sections: Sequence[Section]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        if section.table:
            tags = ["th"] + ["td"] * (len(section.table) - 1)
            parts.append(f"<table>{''.join(map(_html_row, section.table, tags))}</table>")
        if section.picture:
            parts.append(f'<p><img src="{html.escape(section.picture)}" alt="{html.escape(section.title)}"></p>')
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{CSS}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
