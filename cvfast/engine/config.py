"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from cvfast.backend import checked_name
from cvfast.models import list_models

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "step", "constant")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run is told; only JSON types, because it travels in every checkpoint.

    Attributes:
        data: a data set's name ("fashion-mnist", "cifar10") or a folder, as :func:`cvfast.data.load` takes it.
        download: fetch the data set where it is missing and has a public address (cifar10).
        validation: part of the training images held out for choosing the best epoch, in (0, 1).
        epochs: passes over the training images.
        batch_size: images per step, over all processes together.
        lr: the largest learning rate of the schedule.
        schedule: "cosine" to zero, "step" (times ``step_gamma`` every ``step_epochs``) or "constant".
        warmup_epochs: epochs in which the learning rate rises linearly to ``lr``.
        step_epochs: epochs between two reductions of the step schedule.
        step_gamma: factor of one reduction.
        patience: stop after so many epochs without a better one, or None to train to the end.
        seed: of the weights, the order of the images, and all that is drawn at random.
        backend: "auto", "ext", "triton" or "native", see :func:`cvfast.use_backend`.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        threads: torch's threads on the CPU, or None to leave them.
        tensorboard: write TensorBoard events next to the CSV log.
        twin: train twice from one seed, with torch's operators and with cvfast's, and say how far apart both end.
        out: folder of the run; None takes the first free of runs/<name>, runs/<name>-2, ….
    """

    data: str = "fashion-mnist"
    download: bool = False
    validation: float = 0.1
    epochs: int = 40
    batch_size: int = 64
    lr: float = 2e-3
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    step_epochs: int = 10
    step_gamma: float = 0.1
    patience: int | None = None
    seed: int = 0
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    tensorboard: bool = False
    twin: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        checked_name(self.backend)
        self.check_positive("epochs", "batch_size", "lr", "step_epochs", "step_gamma", "patience", "threads")
        self.check_not_negative("warmup_epochs", "seed")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {self.validation}")

    @property
    def name(self) -> str:
        """What the run's folder is called unless ``out`` says."""
        raise NotImplementedError

    def check_positive(self, *names: str) -> None:
        """ValueError if one of these settings is neither None nor above 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def check_not_negative(self, *names: str) -> None:
        """ValueError if one of these settings is below 0."""
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that determines the training of a classifier, besides what :class:`RunConfig` says.

    Attributes:
        model: a classifier among :func:`cvfast.models.list_models`.
        optimizer: "sgd" (with ``momentum``), "adam" or "adamw".
        momentum: of SGD.
        weight_decay: L2 penalty (sgd, adam) or decoupled decay (adamw).
        clip: largest norm of the gradient, or None for no clipping.
        amp: run the forward pass under autocast in bfloat16.
        augment: change the training images at random, each time anew, by the four amounts that follow.
        flip: probability of a mirrored image.
        rotation: largest angle in degrees.
        scaling: images become smaller or larger by a factor of up to 1 + ``scaling``.
        translation: largest shift as a share of the image's size.
        per_class: use only so many training images of each class, chosen by the seed (those held out included), or
            None for all.
        channels: of what the model takes, 1 or 3, or None for as many as the images have.
        weights: file or run to start from, as :func:`cvfast.engine.transfer.load_weights` takes it, or None for random
            weights. The last layer starts at random all the same.
        freeze: name of the last of the model's modules that do not learn, such as layer2 (with all before it), or None.
        unfreeze_every: let one more stage of the frozen ones learn every so many epochs, or None to keep them frozen.
        layer_decay: each stage's learning rate is so many times that of the stage behind it, in (0, 1].
    """

    model: str = "cnn"
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 1e-2
    clip: float | None = None
    amp: bool = False
    augment: bool = True
    flip: float = 0.5
    rotation: float = 5.0
    scaling: float = 0.1
    translation: float = 0.1
    per_class: int | None = None
    channels: int | None = None
    weights: str | None = None
    freeze: str | None = None
    unfreeze_every: int | None = None
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model", self.model, tuple(list_models(task="classification")))
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        self.check_positive("clip", "unfreeze_every")
        self.check_not_negative("momentum", "weight_decay")
        if self.per_class is not None and self.per_class < 2:
            raise ValueError(f"per_class must be 2 or more, one to train on and one to judge, got {self.per_class}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.unfreeze_every is not None and self.freeze is None:
            raise ValueError("unfreeze_every needs freeze: what does not learn at first")

    @property
    def name(self) -> str:
        return self.model


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")
