"""Batches of a data set: shuffled, shared among processes, on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cvfast.data.dataset import ImageData, ImageFiles


def epoch_generator(seed: int, epoch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch.Generator whose state depends on (seed, epoch) and nothing else.

    Orders and augmentations drawn from it are the same in a run that was stopped and resumed as in one that wasn't.
    """
    # Hashed, as a CPU generator keeps only 32 bits of its seed: shifting the two numbers together would lose one.
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def batches(
    data: ImageData,
    batch_size: int,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    drop_last: bool = False,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Batches:
    """The batches of one epoch: pairs of images (uint8 [B, C, H, W]) and labels (int64 [B]) on `device`.

    batch_size: images per batch and process; the last batch may be smaller.
    shuffle: visit the images in a random order, drawn here, once, from `generator`: going through the result twice
        gives the same batches. `epoch_generator(seed, epoch)` makes the order a function of seed and epoch alone.
    generator: a CPU generator; torch's own where it isn't given.
    device: where batches are moved to; None leaves them where the data is.
    drop_last: leave a smaller last batch out.
    rank, world_size: with several processes, each takes every world_size-th image of the order that all share (all
        need the same generator), so batch k of all processes together is batch k of one process with
        world_size * batch_size. Every process gets equally many images: up to world_size - 1 images are visited twice,
        or left out with drop_last.
    num_workers: processes that decode images on disk (torch's DataLoader); no effect on data in memory.

    ValueError for a batch size below 1, a rank outside of the world, or data without images.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
    if len(data) == 0:
        raise ValueError(f"{data.name} has no images")
    order = torch.randperm(len(data), generator=generator) if shuffle else torch.arange(len(data))
    share = _share_of(order, rank, world_size, drop_last)
    return Batches(data, share, batch_size, device, drop_last, num_workers)


def _share_of(order: Tensor, rank: int, world_size: int, drop_last: bool) -> Tensor:
    """The indices of process `rank`; all processes get equally many."""
    total = len(order) // world_size if drop_last else -(-len(order) // world_size)
    total *= world_size
    repeated = order.repeat(-(-total // len(order)))  # wraps round where images run out
    return repeated[rank:total:world_size]


class Batches:
    """What `batches` returns: an iterable with a length. `indices` says which images it visits, in order."""

    def __init__(
        self,
        data: ImageData,
        indices: Tensor,
        batch_size: int,
        device: torch.device | str | None,
        drop_last: bool,
        num_workers: int,
    ) -> None:
        self.data = data
        self.indices = indices
        self.device = device
        self.num_workers = num_workers
        chunks = indices.split(batch_size) if len(indices) else ()
        self._chunks = [chunk for chunk in chunks if not drop_last or len(chunk) == batch_size]

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = self._from_memory() if isinstance(self.data.images, Tensor) else self._from_files()
        for images, labels in source:
            yield images.to(self.device), labels.to(self.device)

    def _from_memory(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.data.images, self.data.labels
        for chunk in self._chunks:
            yield images.index_select(0, chunk.to(images.device)), labels.index_select(0, chunk.to(labels.device))

    def _from_files(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(
            DataLoader(
                _Decoded(self.data.images, self.data.labels),
                batch_sampler=[chunk.tolist() for chunk in self._chunks],
                num_workers=self.num_workers,
                generator=torch.Generator(),  # else it would draw a seed for its workers from torch's own
            )
        )


class _Decoded(Dataset):
    """Image files with labels, in the form that DataLoader reads."""

    def __init__(self, images: ImageFiles, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]
