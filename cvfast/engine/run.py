"""The state of a training run and the loop that advances it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvfast.data import Augmentation, Batches, DataSplits, ImageData, Preparation, batches, epoch_generator, load, split
from cvfast.engine import distributed
from cvfast.engine.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from cvfast.engine.classifier import Classifier
from cvfast.engine.config import TrainConfig
from cvfast.engine.logs import EpochLog, RunLog
from cvfast.engine.schedule import learning_rate
from cvfast.models import input_size

BEST, LAST = "best", "last"
AUGMENTATION_STREAM = 2**31  # keeps the augmentation's random numbers apart from those of the images' order


def load_data(data: str, folder_size: tuple[int, int], download: bool = False) -> DataSplits:
    """:func:`cvfast.data.load`; images in folders, whose sizes may differ, are read at ``folder_size`` (H, W)."""
    return load(data, size=folder_size if Path(data).is_dir() else None, download=download)


class Run:
    """The state of a run. Between two steps, :meth:`checkpoint` is all of it."""

    def __init__(
        self, config: TrainConfig, device: torch.device, augmentation: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.config = config
        self.device = device
        self.train_data, self.validation_data, self.classifier = _data_and_classifier(config)
        self.classifier.to(device)
        self.model = self.classifier.model
        self.parallel_model = distributed.wrap(self.model)
        self.optimizer = _optimizer(config, self.model)
        self.augmentation = augmentation or _augmentation(config)
        self.local_batch_size = _local_batch_size(config.batch_size)
        self.steps_per_epoch = len(self._batches(epoch=0))
        torch.manual_seed(config.seed + distributed.rank())  # the models' dropout differs from process to process
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch at hand
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # of the epoch at hand, see _totals()
        self.history: list[EpochLog] = []
        self.best_epoch = 0

    def fit(self, folder: Path, log: RunLog, interrupted: Callable[[], bool]) -> None:
        """Trains to the end, or raises KeyboardInterrupt with a checkpoint of the very step."""
        while self.epoch < self.config.epochs and not self._out_of_patience():
            start = time.perf_counter()
            for images, labels in log.progress(self._remaining_batches(), self.epoch, self.steps_per_epoch - self.step):
                self._train_step(images, labels)
                if distributed.in_any_process(interrupted(), self.device):
                    self._save(folder, LAST)
                    raise KeyboardInterrupt(f"stopped in epoch {self.epoch + 1}, step {self.step}")
            self._finish_epoch(time.perf_counter() - start)
            if self.best_epoch == self.epoch:
                self._save(folder, BEST)
            self._save(folder, LAST)
            if distributed.rank() == 0:
                log.add(self.history)

    def _remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(self._batches(self.epoch), self.step, None)

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
        config, step = self.config, self.epoch * self.steps_per_epoch + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self.steps_per_epoch)
        self.model.train()
        inputs = self.classifier.preparation(images, self._augment(step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
            logits = self.parallel_model(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.totals += _totals(loss.detach(), logits, labels)
        self.step += 1

    def _augment(self, step: int) -> Callable[[Tensor], Tensor]:
        """The augmentation of one step. A callable of the user's draws from torch's own random numbers."""
        if not isinstance(self.augmentation, Augmentation):
            return self.augmentation
        stream = AUGMENTATION_STREAM + step * distributed.world_size() + distributed.rank()
        generator = epoch_generator(self.config.seed, stream)
        return lambda pixels: self.augmentation(pixels, generator)

    def _finish_epoch(self, seconds: float) -> None:
        loss, right, images = distributed.sum_over_processes(self.totals).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss of epoch {self.epoch + 1} is {loss / images}; try a smaller learning rate"
            )
        validation_loss, validation_accuracy = self._validate()
        self.epoch += 1
        lr = learning_rate(self.config, self.epoch * self.steps_per_epoch - 1, self.steps_per_epoch)
        self.step = 0
        self.totals.zero_()
        self.history.append(
            EpochLog(self.epoch, lr, loss / images, right / images, validation_loss, validation_accuracy, seconds)
        )
        best = self.history[self.best_epoch - 1].validation_accuracy if self.best_epoch else -1.0
        if validation_accuracy > best:
            self.best_epoch = self.epoch

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

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.epoch - self.best_epoch >= self.config.patience

    def _save(self, folder: Path, name: str) -> None:
        checkpoint = self.checkpoint()  # in every process: it gathers from all
        if distributed.rank() == 0:
            save_checkpoint(folder / f"{name}.safetensors", checkpoint)

    def checkpoint(self) -> Checkpoint:
        """All of the run's state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        names = [name for name, _ in self.model.named_parameters()]
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{names[index]}.{key}": t for key, t in state.items() if isinstance(t, Tensor)}
        tensors["rng.cpu"] = distributed.gather(torch.get_rng_state().to(self.device)).cpu()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = distributed.gather(torch.cuda.get_rng_state().to(self.device)).cpu()
        tensors["totals"] = distributed.gather(self.totals).cpu()
        meta = {
            "classifier": self.classifier.description(),
            "config": asdict(self.config),
            "epoch": self.epoch,
            "step": self.step,
            "best_epoch": self.best_epoch,
            "history": [asdict(entry) for entry in self.history],
        }
        return Checkpoint(tensors, meta)

    def restore(self, checkpoint: Checkpoint) -> None:
        """The inverse of :meth:`checkpoint`."""
        world, rank = distributed.world_size(), distributed.rank()
        processes = len(checkpoint.tensors["totals"])
        if processes != world:
            raise CheckpointError(f"the run was started with {processes} processes and cannot go on with {world}")
        try:
            self.model.load_state_dict(checkpoint.part("model"))
            state = {
                index: checkpoint.part(f"optimizer.{name}")
                for index, (name, _) in enumerate(self.model.named_parameters())
            }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            torch.set_rng_state(checkpoint.tensors["rng.cpu"][rank])
            if self.device.type == "cuda" and "rng.cuda" in checkpoint.tensors:
                torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"][rank])
            self.totals = checkpoint.tensors["totals"][rank].to(self.device)
            self.epoch, self.step, self.best_epoch = (checkpoint.meta[key] for key in ("epoch", "step", "best_epoch"))
            self.history = [EpochLog(**entry) for entry in checkpoint.meta["history"]]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint does not fit its own run: {error}") from error


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


def _local_batch_size(batch_size: int) -> int:
    world = distributed.world_size()
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {world} processes")
    return batch_size // world


def _totals(mean_loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [3]: summed loss, right answers, images."""
    right = (logits.argmax(dim=1) == labels).sum()
    images = torch.tensor(len(labels), device=labels.device)
    return torch.stack((mean_loss.double() * images, right.double(), images.double()))
