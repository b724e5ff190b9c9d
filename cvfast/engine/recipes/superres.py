"""Trains a network that makes images four times as high and wide, and compares it with bicubic interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvfast.data import Batches, ImageData, batches, epoch_generator
from cvfast.engine.config import RunConfig
from cvfast.engine.logs import EpochFigures, Panel
from cvfast.engine.loop import AUGMENTATION_STREAM, Loop
from cvfast.engine.networks import Networks, load_network
from cvfast.engine.recipes.running import run_recipe
from cvfast.engine.run import hold_out, load_data
from cvfast.engine.train import TrainResult
from cvfast.models.superres import SCALE, bicubic

if TYPE_CHECKING:
    from rich.console import Console

FOLDER_SIZE = (32, 32)  # of images from a folder
JUDGED = 1000  # validation images, and test images, at most
SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Options(RunConfig):
    """What the recipe is told besides what every run is.

    Attributes:
        images: training images, at most; the first of the data set.
        width: channels of the features.
        blocks: residual blocks.
    """

    data: str = "cifar10"
    epochs: int = 12
    batch_size: int = 32
    lr: float = 1e-3
    images: int = 4000
    width: int = 32
    blocks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("images", "width", "blocks")

    @property
    def name(self) -> str:
        return "superres"


@dataclass(frozen=True, kw_only=True)
class SuperresFigures(EpochFigures):
    """An epoch: the mean absolute error on training images in [0, 1], and the mean PSNR of validation images in dB."""

    PANELS = (
        Panel("Loss", "mean absolute error (grey levels of 255)", {"train_loss": "train"}, 255),
        Panel("Validation images", "PSNR (dB)", {"psnr": "network", "bicubic_psnr": "bicubic"}),
    )

    train_loss: float
    psnr: float
    bicubic_psnr: float

    @property
    def score(self) -> float:
        return self.psnr

    def summary(self) -> str:
        return f"loss {self.train_loss:.4f}  PSNR {self.psnr:.2f} dB (bicubic {self.bicubic_psnr:.2f} dB)"


class SuperresRun(Loop):
    """Images, a quarter of their size, and the mean absolute error of what the network makes of those."""

    Figures = SuperresFigures
    NOISE = {"train_loss": 0.001, "psnr": 0.1}

    def __init__(self, config: Options, device: torch.device) -> None:
        data = load_data(config.data, FOLDER_SIZE, config.download)
        channels, height, width = data.train.image_shape
        if height % SCALE or width % SCALE:
            raise ValueError(f"{data.train.name}: sides must be multiples of {SCALE}, got {height}x{width}")
        train_data, validation_data = hold_out(data, config)
        self.train_data, self.validation_data = train_data.first(config.images), validation_data.first(JUDGED)
        self.bicubic_psnr = mean_psnr(bicubic, self.validation_data, device)
        torch.manual_seed(config.seed)
        options = {"in_chans": channels, "width": config.width, "blocks": config.blocks}
        size = [height // SCALE, width // SCALE]
        model = Networks({"upscaler": ("srresnet", options)}, low=0.0, size=size).to(device)
        super().__init__(config, model, [torch.optim.Adam(model.parameters(), config.lr, fused=True)], totals=2)

    def _batches(self, epoch: int) -> Batches:
        generator = epoch_generator(self.config.seed, epoch)
        return batches(self.train_data, self.config.batch_size, True, generator, self.device)

    def _train_step(self, images: Tensor, _labels: Tensor) -> None:
        self.model.train()
        generator = epoch_generator(self.config.seed, AUGMENTATION_STREAM + self.global_step)
        mirrored = (torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5).to(self.device)
        images = images.float() / 255
        images = torch.where(mirrored, images.flip(3), images)
        loss = F.l1_loss(self.model["upscaler"](smaller(images)), images)
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.totals += torch.stack((loss.detach(), torch.ones_like(loss))).double() * len(images)

    def _figures(self, means: list[float], common: dict[str, Any]) -> SuperresFigures:
        network = self.model["upscaler"].eval()
        return SuperresFigures(
            **common,
            train_loss=means[0],
            psnr=mean_psnr(network, self.validation_data, self.device),
            bicubic_psnr=self.bicubic_psnr,
        )

    def description(self) -> dict[str, Any]:
        return self.model.description()


def smaller(images: Tensor) -> Tensor:
    """Images [N, C, H, W] in [0, 1] at a quarter of their sides: bicubic, antialiased, rounded to 256 levels."""
    small = F.interpolate(images, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return (small.clamp(0, 1) * 255).round() / 255


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [N] in dB of images [N, C, H, W] in [0, 1] after rounding to 256 levels."""
    error = ((images.clamp(0, 1) * 255).round() / 255 - truth).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


@torch.no_grad()
def mean_psnr(enlarge, data: ImageData, device: torch.device) -> float:
    """The mean PSNR in dB of all images of ``data``, made smaller and enlarged by ``enlarge``."""
    ratios = []
    for images, _ in batches(data, 250, device=device):
        truth = images.float() / 255
        ratios.append(psnr(enlarge(smaller(truth)), truth))
    return torch.cat(ratios).mean().item()


def run(options: Options, out: Path, console: Console | None) -> None:
    """See `cvfast.engine.recipes`."""
    run_recipe(SuperresRun, _report, options, out, console)


@torch.no_grad()
def _report(result: TrainResult) -> list[str]:
    from cvfast.engine import report

    folder, config = result.folder, result.config
    test = load_data(config.data, FOLDER_SIZE).test.first(JUDGED)
    network, device = load_network(folder, "upscaler"), torch.device("cpu")
    ours, theirs = mean_psnr(network, test, device), mean_psnr(bicubic, test, device)
    truth = test.first(SHOWN).pixels()
    small = smaller(truth)
    kinds = {
        "given": F.interpolate(small, scale_factor=SCALE),
        "bicubic": bicubic(small),
        "network": network(small),
        "truth": truth,
    }
    report.image_grid(folder / "images.png", torch.cat(list(kinds.values())), columns=len(truth), rows=list(kinds))
    report.learning_curves(folder / "learning_curves.png", {"srresnet": result.history})
    sections = [
        report.Section(
            "What was done",
            f"SRResNet with {config.blocks} blocks of {config.width} channels learned to enlarge images of "
            f"{config.data} four times; epoch {result.best_epoch} of {len(result.history)} is the best on the "
            f"images held out. On {len(test):,} test images:",
            [["", "PSNR (dB)"], ["network", f"{ours:.2f}"], ["bicubic", f"{theirs:.2f}"]],
        ),
        report.Section("Images", "Rows: " + ", ".join(kinds) + ".", picture="images.png"),
        report.Section("Learning curves", picture="learning_curves.png"),
        report.settings(config),
        report.machine(),
    ]
    report.write_report(folder, "cvfast train superres", sections)
    return [f"best epoch {result.best_epoch}: test PSNR {ours:.2f} dB, {ours - theirs:+.2f} dB against bicubic's"]
