"""The training run of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvfast.data import Augmentation, Batches, DataSplits, ImageData, Preparation, batches, epoch_generator, load, split
from cvfast.engine import distributed
from cvfast.engine.classifier import Classifier
from cvfast.engine.config import TrainConfig
from cvfast.engine.logs import EpochLog
from cvfast.engine.loop import AUGMENTATION_STREAM, Loop
from cvfast.models import input_size


def load_data(data: str, folder_size: tuple[int, int], download: bool = False) -> DataSplits:
    """:func:`cvfast.data.load`; images in folders, whose sizes may differ, are read at ``folder_size`` (H, W)."""
    return load(data, size=folder_size if Path(data).is_dir() else None, download=download)


class Run(Loop):
    """Cross-entropy on labelled images, judged on validation images."""

    Figures = EpochLog
    NOISE = {"train_loss": 0.1, "validation_accuracy": 0.03}

    def __init__(
        self, config: TrainConfig, device: torch.device, augmentation: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.train_data, self.validation_data, self.classifier = _data_and_classifier(config)
        self.classifier.to(device)
        model = self.classifier.model
        self.parallel_model = distributed.wrap(model)
        self.augmentation = augmentation or _augmentation(config)
        super().__init__(config, model, [_optimizer(config, model)], totals=3)

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
    if data.validation is None:
        train_data, validation_data = split(data.train, config.validation, config.seed)
    else:
        train_data, validation_data = data.train, data.validation
    if len(validation_data) == 0:
        raise ValueError(f"{config.data} has too few images to hold some out for validation")
    torch.manual_seed(config.seed)
    preparation = Preparation(input_size(config.model), data.mean, data.std)
    classifier = Classifier(config.model, data.classes, data.train.image_shape, preparation)
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
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](model.parameters(), **common)


def _totals(mean_loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [3]: summed loss, right answers, images."""
    right = (logits.argmax(dim=1) == labels).sum()
    images = torch.tensor(len(labels), device=labels.device)
    return torch.stack((mean_loss.double() * images, right.double(), images.double()))
