"""The training run of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvfast.data import (
    Augmentation,
    Batches,
    DataSplits,
    ImageData,
    Preparation,
    batches,
    epoch_generator,
    few,
    load,
    split,
)
from cvfast.engine import distributed
from cvfast.engine.classifier import Classifier
from cvfast.engine.config import RunConfig, TrainConfig
from cvfast.engine.logs import EpochLog
from cvfast.engine.loop import AUGMENTATION_STREAM, Loop
from cvfast.engine.transfer import freeze, load_weights, parameter_groups, unfreeze_gradually
from cvfast.models import input_size


def load_data(data: str, folder_size: tuple[int, int], download: bool = False) -> DataSplits:
    """:func:`cvfast.data.load`; images in folders, whose sizes may differ, are read at ``folder_size`` (H, W)."""
    return load(data, size=folder_size if Path(data).is_dir() else None, download=download)


def hold_out(data: DataSplits, config: RunConfig) -> tuple[ImageData, ImageData]:
    """Images for training and for choosing the best epoch: the data's own division, or one that the seed decides."""
    if data.validation is None:
        train_data, validation_data = split(data.train, config.validation, config.seed)
    else:
        train_data, validation_data = data.train, data.validation
    if len(validation_data) == 0:
        raise ValueError(f"{config.data} has too few images to hold some out for validation")
    return train_data, validation_data


_FEW = 500  # images: with more, twins are right about the same ones


class Run(Loop):
    """Cross-entropy on labelled images, judged on validation images."""

    Figures = EpochLog
    PARALLEL = True
    NOISE = {"train_loss": 0.1, "validation_accuracy": 0.03}

    def __init__(
        self, config: TrainConfig, device: torch.device, augmentation: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.train_data, self.validation_data, self.classifier = _data_and_classifier(config)
        self.classifier.to(device)
        model = self.classifier.model
        self.augmentation = augmentation or _augmentation(config)
        super().__init__(config, model, [_optimizer(config, model)], totals=3)

    @property
    def noise(self) -> dict[str, float]:
        """``NOISE``; of few images, two standard deviations of the difference between two means, if that is more.

        An image's loss has a deviation of about 1 while much of it is left, being right or wrong one of at most 1/2.
        """
        trained, judged = len(self.train_data), len(self.validation_data)
        noise = {"train_loss": max(self.NOISE["train_loss"], 2 * math.sqrt(2 / trained))}
        if judged < _FEW:
            noise["validation_accuracy"] = 2 * math.sqrt(0.5 / judged)
        return self.NOISE | noise

    def _batches(self, epoch: int) -> Batches:
        return batches(
            self.train_data,
            self.local_batch_size,
            shuffle=True,
            generator=epoch_generator(self.config.seed, epoch),
            device=self.device,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def _before_epoch(self) -> None:
        if self.config.freeze is not None and self.config.unfreeze_every is None:
            freeze(self.model, self.config.freeze)
        elif self.config.freeze is not None:
            unfreeze_gradually(self.model, self.config.freeze, self.epoch, self.config.unfreeze_every)
        self.parallel_model = distributed.wrap(self.model)  # which keeps to the parameters that learn now

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        self.model.train()
        inputs = self.classifier.preparation(images, self._augment())
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            logits = self.parallel_model(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        loss.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        optimizer.step()
        self.totals += _totals(loss.detach(), logits, labels)

    def _augment(self) -> Callable[[Tensor], Tensor]:
        """The augmentation of the next step. A callable of the user's draws from torch's own random numbers."""
        if not isinstance(self.augmentation, Augmentation):
            return self.augmentation
        stream = AUGMENTATION_STREAM + self.global_step * distributed.world_size() + distributed.rank()
        generator = epoch_generator(self.config.seed, stream)
        return lambda pixels: self.augmentation(pixels, generator)

    def _figures(self, means: list[float], common: dict[str, Any]) -> EpochLog:
        train_loss, train_accuracy = means
        validation_loss, validation_accuracy = self._validate()
        return EpochLog(
            **common,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
        )

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the validation data, of which each process looks at its share."""
        self.model.eval()
        share = torch.arange(distributed.rank(), len(self.validation_data), distributed.world_size())
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        if len(share):
            for images, labels in batches(self.validation_data.subset(share), 500, device=self.device):
                logits = self.classifier(images)
                totals += _totals(F.cross_entropy(logits, labels), logits, labels)
        loss, right, images = distributed.sum_over_processes(totals).tolist()
        return loss / images, right / images

    def description(self) -> dict[str, Any]:
        return {"classifier": self.classifier.description()}


def _data_and_classifier(config: TrainConfig) -> tuple[ImageData, ImageData, Classifier]:
    data = load_data(config.data, input_size(config.model), config.download)
    if config.per_class is not None:
        data = replace(data, train=few(data.train, config.per_class, config.seed))
    train_data, validation_data = hold_out(data, config)
    torch.manual_seed(config.seed)
    mean, std = data.mean, data.std
    if config.channels not in (None, len(mean)):
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    preparation = Preparation(input_size(config.model), mean, std, config.channels)
    classifier = Classifier(config.model, data.classes, data.train.image_shape, preparation)
    if config.weights is not None:
        load_weights(classifier.model, config.weights, head=False)
    return train_data, validation_data, classifier


def _augmentation(config: TrainConfig) -> Augmentation | None:
    if not config.augment:
        return None
    return Augmentation(
        flip=config.flip,
        rotation=config.rotation,
        scaling=(1 / (1 + config.scaling), 1 + config.scaling),
        translation=config.translation,
    )


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    parameters = list(model.parameters())
    if config.layer_decay != 1:
        parameters = parameter_groups(model, config.lr, config.layer_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](parameters, **common)


def _totals(mean_loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [3]: summed loss, right answers, images."""
    right = (logits.argmax(dim=1) == labels).sum()
    images = torch.tensor(len(labels), device=labels.device)
    return torch.stack((mean_loss.double() * images, right.double(), images.double()))
