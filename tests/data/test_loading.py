"""The embedded images, .npz files, names and paths, and the form that all data sets share."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from cvfast.data import DataSplits, ImageData, load, split
from cvfast.data.npz import FASHION_MNIST

from .helpers import random_images

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_fashion_mnist_part.py"


def test_fashion_mnist():
    """The embedded part: balanced, whole, small enough, and with its licence beside it."""
    splits = load("fashion-mnist")
    assert splits.train.images.shape == (5000, 1, 28, 28) and splits.test.images.shape == (1000, 1, 28, 28)
    assert splits.train.labels.bincount().tolist() == [500] * 10
    assert splits.test.labels.bincount().tolist() == [100] * 10
    assert splits.classes == splits.train.classes == splits.test.classes
    assert splits.classes[0] == "T-shirt/top" and splits.classes[9] == "Ankle boot" and len(splits.classes) == 10
    assert splits.train.images.dtype == torch.uint8 and splits.train.images.is_contiguous()
    # The whole data set's published mean and deviation: 0.2860 and 0.3530.
    assert splits.mean == pytest.approx((0.2860,), abs=0.005) and splits.std == pytest.approx((0.3530,), abs=0.005)
    assert FASHION_MNIST.stat().st_size <= 3_000_000
    notice = FASHION_MNIST.with_name("FASHION_MNIST_LICENSE").read_text()
    assert "Zalando SE" in notice and "Permission is hereby granted, free of charge" in notice


def test_fashion_mnist_is_learnable():
    """Labels belong to their images: the nearest class mean is right for two thirds of the test images."""
    splits = load("fashion-mnist")
    pixels = splits.train.images.float().flatten(1)
    means = torch.stack([pixels[splits.train.labels == c].mean(0) for c in range(10)])
    guesses = torch.cdist(splits.test.images.float().flatten(1), means).argmin(1)
    assert (guesses == splits.test.labels).float().mean() > 0.65


def script():
    """The script that makes the embedded file."""
    specification = importlib.util.spec_from_file_location("make_fashion_mnist_part", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_idx(path: Path, array: np.ndarray) -> None:
    import gzip

    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_script_that_makes_the_part(tmp_path, monkeypatch):
    """From the original's layout: the first images of each class, in order, and the same bytes every time."""
    make = script()
    monkeypatch.setattr(make, "PER_CLASS", {"train": 2, "test": 1})
    images = random_images(40, 0, channels=1, size=(28, 28))[:, 0].numpy()
    labels = np.arange(40, dtype=np.uint8)[::-1] % 10
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.ascontiguousarray(labels))
    arrays = make.select(tmp_path)
    make.write_npz(tmp_path / "a.npz", arrays)
    make.write_npz(tmp_path / "b.npz", make.select(tmp_path))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    splits = load(tmp_path / "a.npz")
    assert torch.equal(splits.train.images[:, 0], torch.from_numpy(images[:20]))
    assert splits.train.labels.tolist() == labels[:20].tolist() and splits.test.labels.tolist() == labels[:10].tolist()
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes((tmp_path / "a.npz").read_bytes())
    with pytest.raises(OSError, match="[Nn]ot a gzipped file"):
        make.select(tmp_path)


def test_embedded_file_is_what_the_script_writes(tmp_path):
    """Written again from its own arrays, the embedded file has the same content, array by array."""
    with np.load(FASHION_MNIST) as archive:
        arrays = dict(archive)
    script().write_npz(tmp_path / "again.npz", arrays)
    with np.load(tmp_path / "again.npz") as again:
        assert list(again) == list(arrays)
        assert all(np.array_equal(again[key], arrays[key]) for key in arrays)
    assert tuple(arrays["classes"]) == script().CLASSES


# -- .npz ------------------------------------------------------------------------------------------------------------


def arrays(**changes) -> dict[str, np.ndarray]:
    """A small data set as .npz holds it; None takes an array away."""
    content = {
        "train_images": random_images(6, 0, size=(4, 5)).numpy(),
        "train_labels": np.arange(6) % 3,
        "test_images": random_images(3, 1, size=(4, 5)).numpy(),
        "test_labels": np.arange(3),
        "classes": np.array(["a", "b", "c"]),
    } | changes
    return {key: value for key, value in content.items() if value is not None}


def test_npz(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    splits = load(tmp_path / "mine.npz")
    assert torch.equal(splits.train.images, random_images(6, 0, size=(4, 5)))
    assert splits.test.labels.tolist() == [0, 1, 2] and splits.test.labels.dtype == torch.int64
    assert splits.classes == ["a", "b", "c"] and splits.train.name == "mine train"


def test_npz_without_classes_and_channels(tmp_path):
    """Classes are named after their numbers; grey images may lack the dimension of channels."""
    grey = random_images(6, 0, channels=1, size=(4, 5))[:, 0].numpy()
    np.savez_compressed(tmp_path / "mine.npz", **arrays(classes=None, train_images=grey, test_images=grey[:3]))
    splits = load(tmp_path / "mine.npz")
    assert splits.classes == ["0", "1", "2"] and splits.train.images.shape == (6, 1, 4, 5)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"test_labels": None}, "it lacks test_labels; it has train_images"),
        ({"train_images": np.zeros((6, 3, 4, 5))}, "images must be uint8 .* got float64"),
        ({"train_images": np.zeros((6, 4), np.uint8)}, r"images must be uint8 .* \[6, 4\]"),
        ({"train_labels": np.zeros(6)}, "labels must be whole numbers, got float64"),
        ({"train_labels": np.zeros(5, int)}, r"mine train: labels must be int64 \[6\], one per image, .*\[5\]"),
        ({"test_labels": np.array([0, 1, 3])}, "mine test: label 3 is outside of the 3 classes"),
        ({"test_labels": np.array([0, 1, -1])}, "mine test: label -1 is outside of the 3 classes"),
        ({"train_images": np.zeros((0, 4, 5), np.uint8), "train_labels": np.zeros(0, int)}, "with N > 0"),
        ({"classes": np.array(["a", None, 3], dtype=object)}, "allow_pickle"),
    ],
    ids=["key", "dtype", "rank", "float labels", "count", "range", "negative", "empty", "pickle"],
)
def test_wrong_npz(tmp_path, changes, complaint):
    np.savez(tmp_path / "mine.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=rf"cannot read the data set .*mine\.npz: .*{complaint}"):
        load(tmp_path / "mine.npz")


def test_damaged_npz(tmp_path):
    np.savez_compressed(tmp_path / "mine.npz", **arrays())
    content = bytearray((tmp_path / "mine.npz").read_bytes())
    content[100:110] = bytes(10)
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the data set .*mine\.npz"):
        load(tmp_path / "mine.npz")
    (tmp_path / "mine.npz").write_bytes(content[:200])
    with pytest.raises(ValueError, match="neither an .npz nor"):
        load(tmp_path / "mine.npz")


# -- names, paths, sizes ---------------------------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown data set 'mnist': give 'fashion-mnist' or 'cifar10', or the path"):
        load("mnist")


def test_missing_path(tmp_path):
    for path in (tmp_path / "nowhere", "some/folder", "mine.npz"):
        with pytest.raises(FileNotFoundError, match=f"no data at {path} .*: give 'fashion-mnist'"):
            load(path)


def test_cifar10_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load("cifar10", root=tmp_path)
    assert "c58f30108f718f92721af3b95e74349a" in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("size, shape", [(32, (32, 32)), ((20, 30), (20, 30)), (28, (28, 28))])
def test_size(size, shape):
    """All images get the size, and the statistics are those of the resized images."""
    splits = load("fashion-mnist", size=size)
    assert splits.train.image_shape == splits.test.image_shape == (1, *shape)
    assert splits.std == pytest.approx([(splits.train.images.double() / 255).std(correction=0).item()], abs=1e-9)


@pytest.mark.parametrize("size", [0, -1, (3,), (3, 4, 5), (3.5, 4)])
def test_wrong_size(size):
    with pytest.raises(ValueError, match="size must be a positive number"):
        load("fashion-mnist", size=size)


# -- ImageData and split ---------------------------------------------------------------------------------------------


def data(labels: list[int], classes: int = 3) -> ImageData:
    """Images [1, 1, 1] whose pixel is their index."""
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return ImageData(images, torch.tensor(labels, dtype=torch.int64), [str(c) for c in range(classes)])


def test_image_data_checks_itself():
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, C, H, W\], got torch.float32 \[2, 1, 4, 4\]"):
        ImageData(images, torch.zeros(2, dtype=torch.int64), ["a"])
    with pytest.raises(ValueError, match=r"labels must be int64 \[2\]"):
        ImageData(images.byte(), torch.zeros(2, dtype=torch.int32), ["a"])
    with pytest.raises(ValueError, match="label 1 is outside of the 1 classes"):
        ImageData(images.byte(), torch.tensor([0, 1]), ["a"])


def test_subset():
    part = data([0, 1, 2, 0]).subset(torch.tensor([3, 1]))
    assert part.images.flatten().tolist() == [3, 1] and part.labels.tolist() == [0, 1] and len(part) == 2


def test_constant_channel():
    """Images of one colour have no deviation; one grey level is reported, so that dividing by it is safe."""
    same = ImageData(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ["a"])
    splits = DataSplits.of(same, same)
    assert splits.mean == pytest.approx((0.2,)) and splits.std == (1 / 255,)


def test_split():
    """Every image goes to one part, every class gives its share, and the order is kept."""
    labels = torch.randint(0, 3, (200,), generator=torch.manual_seed(0)).tolist()
    train, validation = split(data(labels), 0.1, seed=5)
    ids = [part.images.flatten().tolist() for part in (train, validation)]
    assert sorted(ids[0] + ids[1]) == list(range(200)) and all(part == sorted(part) for part in ids)
    for part, indices in ((train, ids[0]), (validation, ids[1])):
        assert part.labels.tolist() == [labels[i] for i in indices]
    for c in range(3):
        assert validation.labels.tolist().count(c) == round(labels.count(c) * 0.1)


def test_split_by_seed():
    whole = data([0, 1] * 50)
    held_out = [split(whole, 0.2, seed)[1].images.flatten().tolist() for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_split_of_rare_classes():
    """Two images give one to each part however small or large the share; a single one stays for training."""
    for share in (0.01, 0.99):
        train, validation = split(data([0, 0, 1]), share)
        assert sorted(train.labels.tolist()) == [0, 1] and validation.labels.tolist() == [0]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_split_wants_a_share(share):
    with pytest.raises(ValueError, match="validation must be a share between 0 and 1"):
        split(data([0, 1]), share)
