"""Data sets in one .npz file: the embedded part of Fashion-MNIST, and the user's own."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from cvfast.data.dataset import DataSplits, ImageData

FASHION_MNIST = Path(__file__).parent / "files" / "fashion_mnist_part.npz"
REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")


def load_npz(path: Path, name: str | None = None) -> DataSplits:
    """Images from an .npz with the arrays {train,test}_images, {train,test}_labels and, if it likes, classes.

    Images are uint8 [N, H, W] or [N, C, H, W], labels whole numbers [N], classes strings; without them classes are
    named after their numbers. Nothing is unpickled. ValueError, naming the file, for anything else.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"cannot read the data set {path}: it is neither an .npz nor an archive of CIFAR-10")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in REQUIRED if key not in archive]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}; it has {', '.join(archive.files) or 'no arrays'}")
            arrays = {key: archive[key] for key in archive.files if key in (*REQUIRED, "classes")}
        return _from_arrays(arrays, name or path.stem)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read the data set {path}: {error}") from error


def _from_arrays(arrays: dict[str, np.ndarray], name: str) -> DataSplits:
    labels = [arrays["train_labels"], arrays["test_labels"]]
    if "classes" in arrays:
        classes = [str(c) for c in arrays["classes"]]
    else:
        classes = [str(c) for c in range(1 + max(int(part.max(initial=-1)) for part in labels))]
    train = _part(arrays["train_images"], arrays["train_labels"], classes, f"{name} train")
    test = _part(arrays["test_images"], arrays["test_labels"], classes, f"{name} test")
    return DataSplits.of(train, test)


def _part(images: np.ndarray, labels: np.ndarray, classes: list[str], name: str) -> ImageData:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0:
        raise ValueError(
            f"images must be uint8 [N, H, W] or [N, C, H, W] with N > 0, got {images.dtype} {list(images.shape)}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
    if images.ndim == 3:
        images = images[:, None]
    return ImageData(
        torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)), classes, name
    )
