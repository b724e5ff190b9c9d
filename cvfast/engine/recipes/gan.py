"""Trains a generator and a discriminator: DCGAN or WGAN-GP, with or without labels; shows samples while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvfast.data import Batches, DataSplits, batches, epoch_generator
from cvfast.engine.config import RunConfig, check_choice
from cvfast.engine.logs import EpochFigures, Panel
from cvfast.engine.loop import AUGMENTATION_STREAM, Loop
from cvfast.engine.networks import Networks, load_network
from cvfast.engine.recipes.running import run_recipe
from cvfast.engine.run import hold_out, load_data
from cvfast.engine.train import TrainResult

if TYPE_CHECKING:
    from rich.console import Console

LOSSES = ("dcgan", "wgan-gp")
FOLDER_SIZE = (32, 32)  # of images from a folder
SAMPLES = 80  # in a picture, 10 in a row
JUDGED = 1000  # samples and real images in the distance, at most
DIRECTIONS = 256


@dataclass(frozen=True, kw_only=True)
class Options(RunConfig):
    """What the recipe is told besides what every run is.

    Attributes:
        loss: dcgan (Radford et al. 2016; non-saturating) or wgan-gp (Gulrajani et al. 2017: a critic with a penalty on
            its gradient).
        conditional: give both networks the images' labels, so that the generator draws what it is asked for.
        width: channels of the widest images' layer; the others have two, four, … times as many.
        latent: random numbers that an image is made of.
        critic_steps: with wgan-gp, steps of the critic per step of the generator.
        penalty: with wgan-gp, weight of the penalty on the gradient.
    """

    epochs: int = 40
    lr: float = 2e-4
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    loss: str = "dcgan"
    conditional: bool = False
    width: int = 48
    latent: int = 64
    critic_steps: int = 5
    penalty: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        self.check_positive("width", "latent", "critic_steps")
        self.check_not_negative("penalty")

    @property
    def name(self) -> str:
        return "gan"


@dataclass(frozen=True, kw_only=True)
class GanFigures(EpochFigures):
    """An epoch of both networks.

    Losses are means per image (the critic's of wgan-gp is what it minimises, the penalty included). ``distance`` is the
    sliced Wasserstein distance between samples and validation images, see :func:`sliced_distance`.
    """

    PANELS = (
        Panel("Losses", "mean per image", {"discriminator_loss": "discriminator", "generator_loss": "generator"}),
        Panel("Distance from validation images", "sliced Wasserstein (grey levels in [0, 1])", {"distance": "samples"}),
    )

    discriminator_loss: float
    generator_loss: float
    distance: float

    @property
    def score(self) -> float:
        return -self.distance

    def summary(self) -> str:
        return (
            f"loss: discriminator {self.discriminator_loss:.3f}, generator {self.generator_loss:.3f}"
            f"  distance {self.distance:.4f}"
        )


class GanRun(Loop):
    """Both networks, each with its Adam."""

    Figures = GanFigures
    NOISE = {"discriminator_loss": 0.15, "generator_loss": 0.6, "distance": 0.015}

    def __init__(self, config: Options, device: torch.device) -> None:
        data = load_data(config.data, FOLDER_SIZE, config.download)
        self.train_data, validation_data = hold_out(data, config)
        self.real = validation_data.first(JUDGED).pixels()
        torch.manual_seed(config.seed)
        model = _networks(config, data).to(device)
        self.generator, self.discriminator = model["generator"], model["discriminator"]
        self.wasserstein = config.loss == "wgan-gp"
        self.critic_steps = config.critic_steps if self.wasserstein else 1
        betas = (0.0, 0.9) if self.wasserstein else (0.5, 0.999)  # the papers'
        self.generator_optimizer, self.discriminator_optimizer = optimizers = [
            torch.optim.Adam(network.parameters(), config.lr, betas, fused=True)
            for network in (self.generator, self.discriminator)
        ]
        super().__init__(config, model, optimizers, totals=3)

    def _batches(self, epoch: int) -> Batches:
        """Images for one step: ``critic_steps`` batches for the discriminator; the generator follows the last."""
        size = self.config.batch_size * self.critic_steps
        if len(self.train_data) < size:
            raise ValueError(f"one step needs {size} images, but {self.train_data.name} has {len(self.train_data)}")
        generator = epoch_generator(self.config.seed, epoch)
        return batches(self.train_data, size, True, generator, self.device, drop_last=True)

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        self.model.train()
        generator = epoch_generator(self.config.seed, AUGMENTATION_STREAM + self.global_step)
        parts = list(zip(images.chunk(self.critic_steps), labels.chunk(self.critic_steps), strict=True))
        for real, kinds in parts:
            kinds = kinds if self.config.conditional else None
            critic_loss = self._discriminator_loss(real.float() / 127.5 - 1, kinds, generator)
            _update(self.discriminator_optimizer, critic_loss)
        fake = self.generator.sample(len(real), generator, kinds)
        scores = self.discriminator(fake, kinds)
        loss = -scores.mean() if self.wasserstein else F.softplus(-scores).mean()
        _update(self.generator_optimizer, loss)
        sums = torch.stack((critic_loss.detach(), loss.detach(), torch.ones_like(loss)))
        self.totals += sums.double() * len(images)

    def _discriminator_loss(self, real: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            fake = self.generator.sample(len(real), generator, labels)
        real_scores, fake_scores = self.discriminator(real, labels), self.discriminator(fake, labels)
        if not self.wasserstein:
            return F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()
        penalty = gradient_penalty(self.discriminator, real, fake, labels, generator)
        return fake_scores.mean() - real_scores.mean() + self.config.penalty * penalty

    def _figures(self, means: list[float], common: dict[str, Any]) -> GanFigures:
        discriminator_loss, generator_loss = means
        samples = draw(self.generator, len(self.real), self.config.seed)
        distance = sliced_distance(samples, self.real)
        return GanFigures(
            **common, discriminator_loss=discriminator_loss, generator_loss=generator_loss, distance=distance
        )

    def _after_epoch(self, folder: Path) -> None:
        from cvfast.engine import report

        samples = draw(self.generator, SAMPLES, self.config.seed)
        (folder / "samples").mkdir(exist_ok=True)
        report.image_grid(folder / "samples" / f"epoch_{self.epoch:03}.png", samples, columns=10)

    def description(self) -> dict[str, Any]:
        return self.model.description()


def gradient_penalty(
    critic: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Mean of (|gradient of the critic's value by its input| - 1)^2, differentiable by the critic's weights.

    The inputs lie between real and fake images [N, C, H, W], each pair mixed at random (Gulrajani et al. 2017).
    """
    share = torch.rand(len(real), 1, 1, 1, generator=generator).to(real)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between, labels).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


@torch.no_grad()
def draw(generator: nn.Module, count: int, seed: int) -> Tensor:
    """``count`` images [N, C, S, S] in [0, 1], on the CPU, of random numbers that the seed decides.

    With labels, class i, i + K, … of K classes, as columns of a grid.
    """
    training = generator.training
    generator.eval()
    device = next(generator.parameters()).device
    labels = torch.arange(count, device=device) % generator.num_classes if generator.num_classes else None
    images = generator.sample(count, torch.Generator().manual_seed(seed), labels)
    generator.train(training)
    return images.cpu() / 2 + 0.5


def sliced_distance(one: Tensor, other: Tensor) -> float:
    """Sliced Wasserstein-2 distance (Rabin et al. 2011) between as many images [N, ...], in the unit of their values.

    The root of the mean square distance of the images' projections, in order, over 256 fixed directions.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(one[0].numel(), DIRECTIONS, generator=generator)
    directions /= directions.norm(dim=0)
    a, b = ((images.flatten(1) @ directions).sort(dim=0).values for images in (one, other))
    return (a - b).square().mean().sqrt().item()


def same_class_share(samples: Tensor, labels: Tensor, images: Tensor, classes: Tensor) -> float:
    """Share of samples whose nearest neighbour among ``images`` (by pixels) has the sample's label."""
    nearest = torch.cdist(samples.flatten(1), images.flatten(1)).argmin(1)
    return (classes[nearest] == labels).float().mean().item()


def _networks(config: Options, data: DataSplits) -> Networks:
    channels, height, width = data.train.image_shape
    if height != width:
        raise ValueError(f"{data.train.name}: images must be square, got {height}x{width}")
    common = {
        "num_classes": len(data.classes) if config.conditional else 0,
        "in_chans": channels,
        "image_size": height,
        "width": config.width,
    }
    norm = "none" if config.loss == "wgan-gp" else "batch"
    return Networks(
        {
            "generator": ("dcgan_generator", common | {"latent": config.latent}),
            "discriminator": ("dcgan_discriminator", common | {"norm": norm}),
        }
    )


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def run(options: Options, out: Path, console: Console | None) -> None:
    """See `cvfast.engine.recipes`."""
    run_recipe(GanRun, _report, options, out, console)


def _report(result: TrainResult) -> list[str]:
    from cvfast.engine import report

    folder, config = result.folder, result.config
    data = load_data(config.data, FOLDER_SIZE)
    generator = load_network(folder, "generator")
    real = data.test.first(JUDGED).pixels()
    train = data.train.pixels()
    samples = draw(generator, len(real), config.seed)
    rows = [
        ["distance from test images", f"{sliced_distance(samples, real):.4f}", f"{_real_distance(train, real):.4f}"],
    ]
    if config.conditional:
        labels = torch.arange(len(samples)) % len(data.classes)
        rows.append(
            ["nearest training image is of the class asked for",
             f"{same_class_share(samples, labels, train, data.train.labels):.1%}",
             f"{same_class_share(real, data.test.labels[: len(real)], train, data.train.labels):.1%}"]
        )  # fmt: skip
    report.image_grid(folder / "samples.png", samples[:SAMPLES], columns=10)
    report.image_grid(folder / "real.png", real[:SAMPLES], columns=10)
    nearest = train[torch.cdist(samples[:20].flatten(1), train.flatten(1)).argmin(1)]
    report.image_grid(folder / "nearest.png", torch.stack((samples[:20], nearest), 1).flatten(0, 1), columns=10)
    report.learning_curves(folder / "learning_curves.png", {config.loss: result.history})
    kind = f"{config.loss}{', with labels' if config.conditional else ''}"
    sections = [
        report.Section(
            "What was done",
            f"A generator ({kind}) was trained on {len(train):,} images of {config.data} for {len(result.history)} "
            f"epochs; the samples are those of epoch {result.best_epoch}, the nearest to the images held out.",
            [["", "samples", "real training images" if not config.conditional else "real images"], *rows],
        ),
        report.Section("Samples", picture="samples.png"),
        report.Section("Real images", picture="real.png"),
        report.Section(
            "Samples, each beside the training image nearest to it", "Copies would be the same.", picture="nearest.png"
        ),
        report.Section("Learning curves", picture="learning_curves.png"),
        report.settings(config),
        report.machine(),
    ]
    report.write_report(folder, f"cvfast train gan: {kind}", sections)
    words = "; ".join(f"{what}: {ours} (real images: {theirs})" for what, ours, theirs in rows)
    return [f"best epoch {result.best_epoch}: {words}"]


def _real_distance(train: Tensor, test: Tensor) -> float:
    """The distance of as many training images from the test images: what a perfect generator would have."""
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(test)]
    return sliced_distance(train[chosen], test[: len(chosen)])
