"""Trains a captioner on grids of real images, which it names in order, and shows where it looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvfast.data import Augmentation, ImageData, epoch_generator
from cvfast.engine.config import RunConfig, check_choice
from cvfast.engine.logs import EpochFigures, Panel
from cvfast.engine.loop import AUGMENTATION_STREAM, Loop
from cvfast.engine.networks import Networks, load_network
from cvfast.engine.recipes.running import run_recipe
from cvfast.engine.run import hold_out, load_data
from cvfast.engine.train import TrainResult
from cvfast.models.captioning import END, PAD, START, beam_search, greedy

if TYPE_CHECKING:
    from rich.console import Console

MODELS = ("show_attend_tell", "show_tell")
FOLDER_SIZE = (32, 32)  # of images from a folder
FUNCTION_WORDS = ("a", "an", "and", ",")
SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Options(RunConfig):
    """What the recipe is told besides what every run is.

    Attributes:
        model: show_attend_tell (Xu et al. 2015) or show_tell (Vinyals et al. 2015).
        rows: rows of pictures in a grid.
        columns: pictures in a row.
        augment: change the training pictures at random, each time anew: mirrored, turned, moved and scaled a little.
        clip: largest norm of the gradient.
        beams: sentences that the search of the final judgement follows; 1 takes the likeliest word each time.
    """

    epochs: int = 30
    batch_size: int = 16
    lr: float = 2e-3
    model: str = "show_attend_tell"
    rows: int = 2
    columns: int = 2
    augment: bool = True
    clip: float = 5.0
    beams: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model", self.model, MODELS)
        self.check_positive("rows", "columns", "clip", "beams")

    @property
    def name(self) -> str:
        return self.model


@dataclass(frozen=True, kw_only=True)
class CaptionFigures(EpochFigures):
    """An epoch: the training loss per word in nats; on validation grids, likeliest word after word: shares in [0, 1].

    ``words_right`` is 1 - the word error rate; ``names_right`` the share of pictures called by their name at their
    place in the sentence; ``attention`` the share of attention, while a name is said, that lies on its picture (nan
    without attention).
    """

    PANELS = (
        Panel("Loss", "cross-entropy (nats per word)", {"train_loss": "train"}),
        Panel("Validation grids", "%", {"words_right": "words", "names_right": "names", "attention": "attention"}, 100),
    )

    train_loss: float
    words_right: float
    names_right: float
    attention: float

    @property
    def score(self) -> float:
        return self.words_right

    def summary(self) -> str:
        return (
            f"loss {self.train_loss:.3f}  right: words {self.words_right:.1%}, names {self.names_right:.1%}"
            f"  attention on the picture {self.attention:.1%}"
        )


class Vocabulary:
    """Sentences about pictures of these classes, as words and as numbers."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.names = [name.lower().split() for name in classes]
        words = {word for name in self.names for word in name}
        clash = words & {*FUNCTION_WORDS}
        if clash:
            raise ValueError(f"a class cannot be called {sorted(clash)[0]!r}: sentences use that word between names")
        self.words = ["<pad>", "<start>", "<end>", *FUNCTION_WORDS, *sorted(words)]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def sentence(self, labels: Sequence[int]) -> tuple[list[int], list[int]]:
        """Numbers of START, "a bag , an ankle boot and a coat", END; per word, the picture that it names, or -1."""
        words, owners = [START], [-1]
        for place, label in enumerate(labels):
            name = self.names[label]
            between = [] if place == 0 else ["and" if place == len(labels) - 1 else ","]
            before = [*between, "an" if name[0][0] in "aeiou" else "a"]
            words += [self.numbers[word] for word in (*before, *name)]
            owners += [-1] * len(before) + [place] * len(name)
        return [*words, END], [*owners, -1]

    def longest(self, pictures: int) -> int:
        """Words of the longest sentence about so many pictures, START included, END not."""
        return pictures * (2 + max(map(len, self.names)))

    def text(self, numbers: Sequence[int]) -> str:
        """The words up to END, with spaces between them."""
        words = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                words.append(self.words[number])
        return " ".join(words)

    def named(self, text: str) -> list[str]:
        """The names in a sentence, in order."""
        names, name = [], []
        for word in [*text.split(), "and"]:
            if word not in FUNCTION_WORDS:
                name.append(word)
            elif name:
                names.append(" ".join(name))
                name = []
        return names


@dataclass(frozen=True)
class Grids:
    """Grids of pictures and sentences about them.

    pictures: uint8 [N, cells, C, H, W], in the sentence's order. sentences: int64 [N, T], from START to END, padded
    with PAD. owners: int64 [N, T], the place of the picture that the word names, or -1.
    """

    pictures: Tensor
    sentences: Tensor
    owners: Tensor


def make_grids(data: ImageData, cells: Tensor, vocabulary: Vocabulary) -> Grids:
    """The grids of ``data``'s images at indices ``cells`` [N, rows * columns]."""
    pictures = torch.stack([torch.stack([data.images[i] for i in row]) for row in cells.tolist()])
    made = [vocabulary.sentence(labels) for labels in data.labels[cells].tolist()]
    sentences, owners = (
        nn.utils.rnn.pad_sequence([torch.tensor(part[k]) for part in made], True, padding)
        for k, padding in ((0, PAD), (1, -1))
    )
    return Grids(pictures, sentences, owners)


def tiled(pictures: Tensor, columns: int) -> Tensor:
    """Pictures [N, cells, C, H, W] as images [N, C, rows * H, columns * W], row by row."""
    return pictures.unflatten(1, (-1, columns)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class GridBatches:
    """One epoch of grids: every image is in one, in an order that ``generator`` decides; what is left over rests."""

    def __init__(
        self, data: ImageData, vocabulary: Vocabulary, config: Options, generator: torch.Generator, device: torch.device
    ) -> None:
        cells = config.rows * config.columns
        order = torch.randperm(len(data), generator=generator)
        count = len(data) // cells
        self.data, self.vocabulary, self.device = data, vocabulary, device
        self.batches = order[: count * cells].view(count, cells).split(config.batch_size) if count else ()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for cells in self.batches:
            grids = make_grids(self.data, cells, self.vocabulary)
            yield grids.pictures.to(self.device), grids.sentences.to(self.device)


class CaptionRun(Loop):
    """Cross-entropy of each word given the words before it, on new grids every epoch."""

    Figures = CaptionFigures
    NOISE = {"train_loss": 0.05, "words_right": 0.03, "names_right": 0.04}

    def __init__(self, config: Options, device: torch.device) -> None:
        data = load_data(config.data, FOLDER_SIZE, config.download)
        cells = config.rows * config.columns
        self.train_data, validation_data = hold_out(data, config)
        if min(len(self.train_data), len(validation_data), len(data.test)) < cells:
            raise ValueError(f"{config.data} has too few images for one grid of {cells}")
        self.vocabulary = Vocabulary(data.classes)
        self.validation = fixed_grids(validation_data, config, self.vocabulary)
        self.augmentation = Augmentation(0.5, 3.0, (0.95, 1.05), 0.05) if config.augment else None
        torch.manual_seed(config.seed)
        channels, height, width = data.train.image_shape
        options = {"num_classes": len(self.vocabulary.words), "in_chans": channels}
        example = {"size": [config.rows * height, config.columns * width], "words": self.vocabulary.longest(cells)}
        model = Networks({"captioner": (config.model, options)}, low=-1.0, **example).to(device)
        self.captioner = model["captioner"]
        super().__init__(config, model, [torch.optim.Adam(model.parameters(), config.lr, fused=True)], totals=2)

    def _batches(self, epoch: int) -> GridBatches:
        generator = epoch_generator(self.config.seed, epoch)
        return GridBatches(self.train_data, self.vocabulary, self.config, generator, self.device)

    def _train_step(self, pictures: Tensor, sentences: Tensor) -> None:
        self.model.train()
        pictures = pictures.float() / 255
        if self.augmentation is not None:
            generator = epoch_generator(self.config.seed, AUGMENTATION_STREAM + self.global_step)
            pictures = self.augmentation(pictures.flatten(0, 1), generator).view_as(pictures)
        scores, _ = self.captioner(to_input(pictures, self.config.columns), sentences[:, :-1])
        targets = sentences[:, 1:]
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=PAD)
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        optimizer.step()
        words = (targets != PAD).sum()
        self.totals += torch.stack((loss.detach() * words, words)).double()

    def _figures(self, means: list[float], common: dict[str, Any]) -> CaptionFigures:
        self.model.eval()
        judged = judge(self.captioner, self.validation, self.vocabulary, self.config.columns, beams=1)
        return CaptionFigures(
            **common,
            train_loss=means[0],
            words_right=judged.words_right,
            names_right=judged.names_right,
            attention=judged.attention,
        )

    def description(self) -> dict[str, Any]:
        return self.model.description() | {"vocabulary": self.vocabulary.words}


def fixed_grids(data: ImageData, config: Options, vocabulary: Vocabulary) -> Grids:
    """Every image in one grid, the same ones for every run."""
    cells = config.rows * config.columns
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return make_grids(data, order[: len(data) // cells * cells].view(-1, cells), vocabulary)


def to_input(pictures: Tensor, columns: int) -> Tensor:
    """Pictures [N, cells, C, H, W] in [0, 1] as the captioner's images [N, C, rows * H, columns * W] in [-1, 1]."""
    return 2 * tiled(pictures, columns) - 1


@dataclass(frozen=True)
class Judgement:
    """What a captioner says of grids, and how much of it is right; the shares are those of :class:`CaptionFigures`."""

    sentences: list[str]
    words_right: float
    names_right: float
    attention: float


@torch.no_grad()
def judge(captioner: nn.Module, grids: Grids, vocabulary: Vocabulary, columns: int, beams: int) -> Judgement:
    """Judges a captioner in eval mode on ``grids`` of so many columns; ``beams`` above 1 for a beam search."""
    from torchmetrics.functional.text import word_error_rate

    device = next(captioner.parameters()).device
    longest = grids.sentences.shape[1]  # a word more than the truth needs
    said, shares = [], []
    for pictures, sentences, owners in zip(
        grids.pictures.split(64), grids.sentences.split(64), grids.owners.split(64), strict=True
    ):
        images = to_input(pictures.to(device) / 255, columns)
        search = greedy(captioner, images, longest) if beams == 1 else beam_search(captioner, images, longest, beams)
        said += [vocabulary.text(row) for row in search[0].tolist()]
        _, weights = captioner(images, sentences[:, :-1].to(device))
        if weights is not None:
            named = owners[:, 1:]
            cells = by_cell(weights.cpu(), images.shape[2:], (pictures.shape[1] // columns, columns))
            shares.append(cells.gather(2, named.clamp_min(0)[..., None])[..., 0][named >= 0])
    truth = [vocabulary.text(row) for row in grids.sentences.tolist()]
    right = [
        a == b for s, t in zip(said, truth, strict=True) for a, b in _pairs(vocabulary.named(s), vocabulary.named(t))
    ]
    return Judgement(
        said,
        1 - word_error_rate(said, truth).item(),
        sum(right) / len(right),
        torch.cat(shares).mean().item() if shares else float("nan"),
    )


def _pairs(said: list[str], meant: list[str]) -> list[tuple[str | None, str]]:
    """Each name that is meant, with the one said in its place, if any."""
    return list(zip([*said, *[None] * len(meant)], meant, strict=False))


def by_cell(weights: Tensor, size: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Attention [..., S] on places of images of ``size`` (H, W), summed over each picture: [..., rows * columns]."""
    rows, columns = grid
    maps = weights.unflatten(-1, (size[0] // 4, size[1] // 4))
    return maps.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1)).sum((-1, -3)).flatten(-2)


def run(options: Options, out: Path, console: Console | None) -> None:
    """See `cvfast.engine.recipes`."""
    run_recipe(CaptionRun, _report, options, out, console)


@torch.no_grad()
def _report(result: TrainResult) -> list[str]:
    from cvfast.engine import report

    folder, config = result.folder, result.config
    data = load_data(config.data, FOLDER_SIZE)
    vocabulary = Vocabulary(data.classes)
    grids = fixed_grids(data.test, config, vocabulary)
    captioner = load_network(folder, "captioner")
    judged = judge(captioner, grids, vocabulary, config.columns, config.beams)
    report.learning_curves(folder / "learning_curves.png", {config.model: result.history})
    table = [
        ["on test grids", "%"],
        ["words right (1 - word error rate)", f"{100 * judged.words_right:.1f}"],
        ["names right, at their place", f"{100 * judged.names_right:.1f}"],
        ["attention on the picture that is named", f"{100 * judged.attention:.1f}"],
        ["the same, if it looked everywhere alike", f"{100 / (config.rows * config.columns):.1f}"],
    ]
    samples = [
        [said, vocabulary.text(meant)]
        for said, meant in zip(judged.sentences[:8], grids.sentences[:8].tolist(), strict=True)
    ]
    pictures = _draw_attention(captioner, grids, vocabulary, config.columns, folder)
    sections = [
        report.Section(
            "What was done",
            f"{config.model} learned to name the pictures of {config.rows} x {config.columns} grids of {config.data} "
            f"in order; epoch {result.best_epoch} of {len(result.history)} is the best on the "
            f"pictures held out. On {len(grids.pictures):,} grids of test pictures, with {config.beams} beams:",
            table,
        ),
        *(report.Section(f"Where it looked, test grid {k + 1}", picture=name) for k, name in enumerate(pictures)),
        report.Section("Sentences", table=[["said", "true"], *samples]),
        report.Section("Learning curves", picture="learning_curves.png"),
        report.settings(config),
        report.machine(),
    ]
    report.write_report(folder, f"cvfast train caption: {config.model}", sections)
    return [
        f"best epoch {result.best_epoch}: words right {judged.words_right:.1%}, names right "
        f"{judged.names_right:.1%}, attention on the picture {judged.attention:.1%}"
    ]


def _draw_attention(
    captioner: nn.Module, grids: Grids, vocabulary: Vocabulary, columns: int, folder: Path
) -> list[str]:
    """Pictures of where the captioner looked for each word that it said; their file names, none without attention."""
    from cvfast.engine import report

    images = tiled(grids.pictures[:SHOWN], columns)
    words, weights = greedy(captioner, to_input(grids.pictures[:SHOWN] / 255, columns), grids.sentences.shape[1])
    if weights is None:
        return []
    height, width = images.shape[2] // 4, images.shape[3] // 4
    names = []
    for k, (image, numbers, looked) in enumerate(zip(images, words.tolist(), weights, strict=True)):
        said = vocabulary.text(numbers).split()
        names.append(f"attention_{k + 1}.png")
        report.attention_maps(folder / names[-1], image, said, looked[: len(said)].unflatten(-1, (height, width)))
    return names
