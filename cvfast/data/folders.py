"""Folders of images, one folder per class, read with Pillow when an image is needed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvfast.data.dataset import DataSplits, ImageData, ImageFiles, split
from cvfast.data.transforms import resized

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
VALIDATION_FOLDERS = ("val", "valid", "validation")
PILLOW_MODES = {1: "L", 3: "RGB"}


def decode_image(path: str | Path, channels: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    """The image in a file: uint8 [channels, H, W].

    channels: 1 (grey) or 3 (red, green, blue). Other modes are converted: palettes are looked up, transparency is
        dropped, 16-bit grey keeps its upper 8 bits. Of an animation the first picture is taken.
    size: (height, width) to resize to (bilinear, antialiased); None keeps the file's size. The orientation that a
        camera noted is applied.

    FileNotFoundError for a missing file; ValueError, naming the file, for one that isn't a whole image or has pixels
    without a fixed range (32-bit integers, floating point).
    """
    from PIL import Image, ImageOps

    if channels not in PILLOW_MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (red, green, blue), got {channels}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    try:
        with Image.open(path) as image:
            pixels = _to_mode(ImageOps.exif_transpose(image), PILLOW_MODES[channels])
    except PermissionError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise ValueError(f"cannot read the image {path}: {error}") from error
    tensor = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()
    return tensor if size is None else resized(tensor.unsqueeze(0), size).squeeze(0)


def _to_mode(image, mode: str) -> np.ndarray:
    """A Pillow image as a new uint8 array [H, W] ("L") or [H, W, 3] ("RGB")."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels (Pillow mode {image.mode}) have no fixed range; save it with 8 or 16 bits")
    elif image.mode in ("P", "PA"):  # by way of RGBA: Pillow warns of a palette's transparency otherwise
        image = image.convert("RGBA")
    return np.array(image.convert(mode))


@dataclass(frozen=True)
class _Decoder:
    """decode_image at a fixed size; a class, not a closure, as worker processes need to pickle it."""

    channels: int
    size: tuple[int, int]
    resize: bool

    def __call__(self, path: Path) -> Tensor:
        image = decode_image(path, self.channels, self.size if self.resize else None)
        if tuple(image.shape[1:]) != self.size:
            raise ValueError(
                f"{path} has {image.shape[1]}x{image.shape[2]} pixels where the first image has "
                f"{self.size[0]}x{self.size[1]}: images of different sizes need size="
            )
        return image


def load_folder(
    folder: Path, size: tuple[int, int] | None = None, *, seed: int = 0, test_share: float = 0.2
) -> DataSplits:
    """Class folders of images -> RGB images, decoded when needed.

    Either `folder/train/<class>/...` with `folder/test/<class>/...` or `folder/val/...` (with both, val becomes
    `DataSplits.validation`), or `folder/<class>/...`, of which `test_share` is set aside for testing, class by class,
    by `seed`. Classes are sorted by name; folders in a class folder belong to the class; hidden files and those
    without an image's suffix are left out, with a warning that counts them.

    ValueError where there are no class folders, an empty class, or a class in one part that train/ lacks.
    """
    train_folder = folder / "train"
    if not train_folder.is_dir():
        files, labels, classes = _labelled_files(folder)
        train, test = split(ImageData(_image_files(files, size), labels, classes, folder.name), test_share, seed)
        if len(test) == 0:
            raise ValueError(f"{folder} holds one image per class: too few to set some aside for testing")
        return DataSplits.of(train, test)

    held_out = [folder / name for name in ("test", *VALIDATION_FOLDERS) if (folder / name).is_dir()]
    if not held_out:
        raise ValueError(f"{folder} has train/ but neither test/ nor {', '.join(f'{n}/' for n in VALIDATION_FOLDERS)}")
    files, labels, classes = _labelled_files(train_folder)
    images = _image_files(files, size)
    train = ImageData(images, labels, classes, folder.name)
    test, *others = (_held_out_part(part, classes, images.decode) for part in held_out)
    return DataSplits.of(train, test, others[0] if others else None)


def _held_out_part(folder: Path, classes: list[str], decode: _Decoder) -> ImageData:
    files, labels, own_classes = _labelled_files(folder)
    unknown = sorted(set(own_classes) - set(classes))
    if unknown:
        raise ValueError(f"{folder} has classes that train/ lacks: {', '.join(unknown)}")
    labels = torch.tensor([classes.index(name) for name in own_classes])[labels]
    return ImageData(ImageFiles(files, decode), labels, classes, f"{folder.parent.name}/{folder.name}")


def _image_files(files: list[Path], size: tuple[int, int] | None) -> ImageFiles:
    if size is not None:
        return ImageFiles(files, _Decoder(3, size, resize=True))
    height, width = decode_image(files[0]).shape[1:]
    return ImageFiles(files, _Decoder(3, (height, width), resize=False))


def _labelled_files(folder: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Image files of all class folders, sorted, with their labels (int64) and the classes."""
    class_folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not class_folders:
        raise ValueError(f"{folder} has no class folders: put the images of each class into a folder of its own")
    files: list[Path] = []
    labels: list[int] = []
    ignored = 0
    for label, class_folder in enumerate(class_folders):
        found = sorted(f for f in class_folder.rglob("*") if f.is_file())
        images = [f for f in found if _is_image(f)]
        if not images:
            raise ValueError(f"{class_folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        ignored += len(found) - len(images)
        files += images
        labels += [label] * len(images)
    if ignored:
        warnings.warn(f"{folder}: {ignored} files in its class folders are not images; ignored", stacklevel=2)
    return files, torch.tensor(labels), [f.name for f in class_folders]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
