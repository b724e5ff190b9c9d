"""The one form every data set takes here: images with labels, and its division into training and test data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFiles:
    """Images that stay on disk until they are asked for, all of one shape.

    paths: one file per image. decode: makes a uint8 tensor [C, H, W] of a path (picklable, for worker processes).
    """

    paths: Sequence[Path]
    decode: Callable[[Path], Tensor]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, uint8 [C, H, W]."""
        return self.decode(self.paths[index])

    def select(self, indices: Sequence[int]) -> ImageFiles:
        return replace(self, paths=[self.paths[i] for i in indices])


@dataclass(frozen=True)
class ImageData:
    """Images and their classes.

    images: uint8 [N, C, H, W], contiguous, in memory; or `ImageFiles`, read when needed.
    labels: int64 [N], indices into `classes`.
    classes: names of the classes.
    name: what the data is called in reports.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    classes: list[str]
    name: str = "images"

    def __post_init__(self) -> None:
        if isinstance(self.images, Tensor) and (self.images.dtype != torch.uint8 or self.images.dim() != 4):
            raise ValueError(
                f"{self.name}: images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            raise ValueError(
                f"{self.name}: labels must be int64 [{len(self.images)}], one per image, "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )
        wrong = self.labels[(self.labels < 0) | (self.labels >= len(self.classes))]
        if len(wrong):
            raise ValueError(f"{self.name}: label {int(wrong[0])} is outside of the {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image. Reads the first file where images are on disk."""
        channels, height, width = self.images.shape[1:] if isinstance(self.images, Tensor) else self.images[0].shape
        return channels, height, width

    def subset(self, indices: Tensor) -> ImageData:
        """The images at `indices` (int64 [M]), in that order."""
        if isinstance(self.images, Tensor):
            images: Tensor | ImageFiles = self.images.index_select(0, indices)
        else:
            images = self.images.select(indices.tolist())
        return replace(self, images=images, labels=self.labels.index_select(0, indices))

    def first(self, count: int) -> ImageData:
        """The first ``count`` images, or all if there are fewer."""
        return self.subset(torch.arange(min(count, len(self))))

    def pixels(self) -> Tensor:
        """All images as floats [N, C, H, W] in [0, 1]; those on disk are read."""
        return torch.stack([self.images[i] for i in range(len(self))]).float() / 255


@dataclass(frozen=True)
class DataSplits:
    """A data set as `load` returns it.

    train, test: the two parts, with the same `classes`.
    mean, std: per channel, of the training pixels in [0, 1]; over 256 of its images where they are on disk.
    validation: where the data set brings one of its own beside its test part; else use `split(train)`.
    """

    train: ImageData
    test: ImageData
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: ImageData | None = None

    @classmethod
    def of(cls, train: ImageData, test: ImageData, validation: ImageData | None = None) -> DataSplits:
        """Completes classes, mean and std from the training data."""
        mean, std = channel_statistics(train)
        return cls(train, test, train.classes, mean, std, validation)


MAX_FILES_FOR_STATISTICS = 256


def channel_statistics(data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1]: exact in memory, of a sample for files.

    Images on disk are sampled evenly over the data set, so the same files give the same numbers. A channel that
    never changes gets the deviation of one grey level, so that dividing by it is safe.
    """
    images = data.images if isinstance(data.images, Tensor) else _evenly_sampled(data.images)
    level = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * level).sum()
        means.append(mean.item())
        stds.append(max((share * (level - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)


def _evenly_sampled(files: ImageFiles) -> Tensor:
    count = min(len(files), MAX_FILES_FOR_STATISTICS)
    return torch.stack([files[i * len(files) // count] for i in range(count)])


def split(data: ImageData, validation: float = 0.1, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Divides `data` at random into training and validation data, class by class.

    validation: share of every class that goes into the validation data, rounded, 0 < validation < 1. A class of
        two images or more gives at least one to each part; a single image is for training.
    seed: the same seed gives the same division.

    Both parts keep the order of `data`. ValueError for a share outside of (0, 1).
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1, both excluded, got {validation}")
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(data), dtype=torch.bool)
    for label in range(len(data.classes)):
        members = (data.labels == label).nonzero().flatten()
        count = min(max(round(len(members) * validation), 1), len(members) - 1)
        if count > 0:
            held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return data.subset((~held_out).nonzero().flatten()), data.subset(held_out.nonzero().flatten())


def few(data: ImageData, per_class: int, seed: int = 0) -> ImageData:
    """`per_class` images of each class of `data`, chosen at random by `seed`, in the order of `data`.

    ValueError where a class has fewer, or `per_class` is not positive.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be positive, got {per_class}")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, name in enumerate(data.classes):
        members = (data.labels == label).nonzero().flatten()
        if len(members) < per_class:
            raise ValueError(f"{data.name}: {per_class} images of each class are wanted, {name} has {len(members)}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return data.subset(torch.cat(chosen).sort().values)
