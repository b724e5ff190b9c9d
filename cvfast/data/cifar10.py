"""CIFAR-10 in each of its published forms, read in place.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvfast.data.dataset import DataSplits, ImageData
from cvfast.data.download import download as fetch
from cvfast.data.download import file_digest

HOME = "https://www.cs.toronto.edu/~kriz/"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS  # bytes: label, then the red, green and blue plane, row by row


@dataclass(frozen=True)
class Original:
    """What is known of a published file: its size in bytes and a digest."""

    size: int
    algorithm: str
    digest: str

    def check(self, what: str, found: str) -> None:
        if found != self.digest:
            raise ValueError(
                f"{what} has the size of the original but is damaged: its {self.algorithm.upper()} is {found}, "
                f"the original's {self.digest}. Delete it and get it again"
            )


@dataclass(frozen=True)
class Layout:
    """One of the two published forms."""

    folder: str
    archive: str
    archive_original: Original
    train: re.Pattern[str]  # names of batch files
    test: str
    originals: dict[str, Original]  # batch files
    parse: Callable[[bytes], tuple[np.ndarray, np.ndarray]]  # -> images [N, 3072], labels [N]


def _parse_binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Any whole number of records of 3073 bytes."""
    if not content or len(content) % RECORD:
        raise ValueError(f"{len(content)} bytes are not a whole number of records of {RECORD} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return records[:, 1:], records[:, 0]


def _parse_pickle(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dict with b"data" (uint8 [N, 3072]) and b"labels" (N numbers), written by Python 2."""
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"damaged pickle ({error or type(error).__name__})") from error
    if not isinstance(batch, dict) or b"data" not in batch or b"labels" not in batch:
        raise ValueError("no dict with data and labels")
    images, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (PIXELS,):
        raise ValueError(f"data is not a uint8 array [N, {PIXELS}]")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError("labels are not a list of whole numbers")
    return images, np.array(labels, dtype=np.int64)


class _BatchUnpickler(pickle.Unpickler):
    """Makes arrays of numbers and plain containers, and nothing else: a pickle may otherwise call any function."""

    # numpy's function that pickled arrays call has moved between numpy's versions; an array knows its own.
    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it wants {module}.{name}, which no CIFAR-10 file does; not loaded, as it may be malicious"
            ) from None


BINARY = Layout(
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    archive_original=Original(170052171, "md5", "c32a1d4ab5d03f1284b67883e8d87530"),
    train=re.compile(r"data_batch_\d+\.bin"),
    test="test_batch.bin",
    originals={
        "data_batch_1.bin": Original(10000 * RECORD, "sha1", "aadd24acce27caa71bf4b10992e9e7b2d74c2540"),
        "data_batch_2.bin": Original(10000 * RECORD, "sha1", "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795"),
        "data_batch_3.bin": Original(10000 * RECORD, "sha1", "1dd00a74ab1d17a6e7d73e185b69dbf31242f295"),
        "data_batch_4.bin": Original(10000 * RECORD, "sha1", "aab85764eb3584312d3c7f65fd2fd016e36a258e"),
        "data_batch_5.bin": Original(10000 * RECORD, "sha1", "26e2849e66a845b7f1e4614ae70f4889ae604628"),
        "test_batch.bin": Original(10000 * RECORD, "sha1", "67eb016db431130d61cd03c7ad570b013799c88c"),
    },
    parse=_parse_binary,
)
PYTHON = Layout(
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    archive_original=Original(170498071, "md5", "c58f30108f718f92721af3b95e74349a"),
    train=re.compile(r"data_batch_\d+"),
    test="test_batch",
    originals={
        "data_batch_1": Original(31035704, "md5", "c99cafc152244af753f735de768cd75f"),
        "data_batch_2": Original(31035320, "md5", "d4bba439e000b95fd0a9bffe97cbabec"),
        "data_batch_3": Original(31035999, "md5", "54ebc095f3ab1f0389bbae665268c751"),
        "data_batch_4": Original(31035696, "md5", "634d18415352ddfa80567beed471001a"),
        "data_batch_5": Original(31035623, "md5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        "test_batch": Original(31035526, "md5", "40351d587109b95175f43aff81a1287e"),
    },
    parse=_parse_pickle,
)
LAYOUTS = (BINARY, PYTHON)


def load_cifar10(root: Path, *, download: bool = False) -> DataSplits:
    """CIFAR-10 from a local copy: uint8 [N, 3, 32, 32], 50,000 + 10,000 images in the original.

    root: `cifar-10-batches-bin`, `cifar-10-batches-py`, `cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz`, or a folder
        that holds one of them (the first of them is read). Archives are read in place, without unpacking.
    download: fetch the binary archive into the folder `root` where it holds none of them.

    A file with an original's size must have its digest; others may hold any whole number of images. Of pickled files
    arrays and plain containers are read, and nothing else.

    FileNotFoundError, with what to do, where there is no copy; ConnectionError, with what to do, where it can't be
    downloaded; ValueError, naming the file, where it is damaged.
    """
    found = find(root)
    if found is None:
        if not download:
            raise FileNotFoundError(f"no CIFAR-10 in {root}.\n{_what_to_do(root)}\nOr allow a download (download=True)")
        found = BINARY, root / BINARY.archive
        try:
            fetch(HOME + BINARY.archive, found[1], BINARY.archive_original.digest)
        except ConnectionError as error:
            raise ConnectionError(f"{error}.\n{_what_to_do(root)}") from error
    layout, path = found
    files = _read_folder(layout, path) if path.is_dir() else _read_archive(layout, path)
    return _assemble(layout, path, files)


def find(path: Path) -> tuple[Layout, Path] | None:
    """The layout and the place of CIFAR-10 at `path`, or in it; None where there is none."""
    if path.is_file():
        layout = _archive_layout(path)
        return None if layout is None else (layout, path)
    for layout in LAYOUTS:
        if path.name == layout.folder or (path / layout.test).is_file():
            return layout, path
    for layout in LAYOUTS:
        for inside in (path / layout.folder, path / layout.archive):
            if inside.exists():
                return layout, inside
    return None


def _archive_layout(path: Path) -> Layout | None:
    """The layout of an archive: by its name, or else by the folder that it begins with."""
    by_name = {layout.archive: layout for layout in LAYOUTS}
    if path.name in by_name:
        return by_name[path.name]
    try:
        with tarfile.open(path, "r|gz") as archive:
            first = archive.next()
    except (tarfile.TarError, EOFError, zlib.error, OSError):
        return None  # not a gzipped tar file
    return None if first is None else {layout.folder: layout for layout in LAYOUTS}.get(first.name.split("/")[0])


def _what_to_do(root: Path) -> str:
    originals = " or ".join(f"{layout.archive} (MD5 {layout.archive_original.digest})" for layout in LAYOUTS)
    return f"Get {originals} from {HOME} on a machine with a network, and put it into {root.resolve()}"


def _train_names(layout: Layout, names: list[str]) -> list[str]:
    return sorted(name for name in names if layout.train.fullmatch(name))


def _read_folder(layout: Layout, folder: Path) -> dict[str, bytes]:
    names = _train_names(layout, [f.name for f in folder.iterdir()])
    return {f.name: f.read_bytes() for f in map(folder.joinpath, [*names, layout.test]) if f.is_file()}


def _read_archive(layout: Layout, path: Path) -> dict[str, bytes]:
    """The batch files in an archive by their bare names; nothing is written to disk."""
    original = layout.archive_original
    if path.stat().st_size == original.size:
        original.check(str(path), file_digest(path, original.algorithm))
    files = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                wanted = folder == layout.folder and (layout.train.fullmatch(name) or name == layout.test)
                if wanted and member.isfile():
                    files[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"{path} is damaged or incomplete ({error}). Delete it and get it again") from error
    return files


def _assemble(layout: Layout, path: Path, files: dict[str, bytes]) -> DataSplits:
    train_names = _train_names(layout, list(files))
    if not train_names or layout.test not in files:
        raise FileNotFoundError(f"{path} is incomplete: it needs data_batch_* and {layout.test}, found {sorted(files)}")

    def part(names: list[str], name: str) -> ImageData:
        batches = [_parse_file(layout, path, file, files[file]) for file in names]
        images = torch.from_numpy(np.concatenate([images for images, _ in batches])).reshape(-1, 3, 32, 32)
        labels = torch.from_numpy(np.concatenate([labels for _, labels in batches]).astype(np.int64))
        return ImageData(images, labels, CLASSES, name)

    return DataSplits.of(part(train_names, "cifar10 train"), part([layout.test], "cifar10 test"))


def _parse_file(layout: Layout, path: Path, name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    original = layout.originals.get(name)
    if original is not None and len(content) == original.size:
        found = hashlib.new(original.algorithm, content, usedforsecurity=False).hexdigest()
        original.check(str(path / name), found)
    try:
        images, labels = layout.parse(content)
        if len(images) != len(labels) or len(images) == 0:
            raise ValueError(f"{len(images)} images with {len(labels)} labels")
        wrong = labels[(labels < 0) | (labels >= len(CLASSES))]
        if len(wrong):
            raise ValueError(f"label {wrong[0]} is outside of the {len(CLASSES)} classes")
    except (ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {path / name}: {error}") from error
    return images, labels
