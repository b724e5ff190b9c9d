"""load(): finds the reader for a name or a path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cvfast import _env
from cvfast.data import cifar10, npz
from cvfast.data.dataset import DataSplits, ImageData
from cvfast.data.folders import load_folder
from cvfast.data.transforms import checked_size, resized

NAMES = ("fashion-mnist", "cifar10")


def load(
    name_or_path: str | Path,
    *,
    size: int | Sequence[int] | None = None,
    root: str | Path | None = None,
    download: bool = False,
    seed: int = 0,
) -> DataSplits:
    """A data set by its name or from a path.

    name_or_path:
        "fashion-mnist": a part of Fashion-MNIST that comes with the package, 5,000 + 1,000 images [1, 28, 28].
        "cifar10": CIFAR-10 [3, 32, 32], in `root`.
        a path: CIFAR-10's archive or folder (or the folder that holds it), an .npz (see `npz.load_npz`), or a folder
        with one folder of images per class (see `folders.load_folder`); told apart by what is there.
    size: (height, width), or one number for both, that images get; None keeps theirs. Images in a folder that have
        different sizes need it.
    root: where "cifar10" is looked for and downloaded to; unless given, the folder of the environment variable
        CVFAST_CACHE, which is ~/.cache/cvfast by default.
    download: allow "cifar10" to be downloaded where it is missing.
    seed: for setting test images aside in a folder that doesn't do so itself.

    FileNotFoundError for a path or data that isn't there, ValueError for an unknown name and broken data.
    """
    pixels = checked_size(size)
    if name_or_path == "fashion-mnist":
        splits = npz.load_npz(npz.FASHION_MNIST, "fashion-mnist")
    elif name_or_path == "cifar10":
        splits = cifar10.load_cifar10(Path(root or _env.cache), download=download)
    else:
        splits = _load_path(Path(name_or_path), pixels, seed)
    return splits if pixels is None or not isinstance(splits.train.images, Tensor) else _at_size(splits, pixels)


def _load_path(path: Path, size: tuple[int, int] | None, seed: int) -> DataSplits:
    if not path.exists():
        raise _missing(path)
    if cifar10.find(path) is not None:
        return cifar10.load_cifar10(path)
    if path.is_dir():
        return load_folder(path, size, seed=seed)
    return npz.load_npz(path)


def _missing(path: Path) -> Exception:
    allowed = f"{' or '.join(repr(n) for n in NAMES)}, or the path of a folder of images, CIFAR-10 or an .npz file"
    if path.name == str(path) and not path.suffix:  # one word: meant as a name, most likely
        return ValueError(f"unknown data set {str(path)!r}: give {allowed}")
    return FileNotFoundError(f"no data at {path} (seen from {Path.cwd()}): give {allowed}")


def _at_size(splits: DataSplits, size: tuple[int, int]) -> DataSplits:
    """Data sets in memory, resized; images on disk are decoded at their size, by load_folder's argument."""

    def part(data: ImageData) -> ImageData:
        return replace(data, images=resized(data.images, size))

    return DataSplits.of(part(splits.train), part(splits.test), splits.validation)
