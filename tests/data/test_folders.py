"""Folders of images: who belongs to which class and part, what Pillow's modes become, and broken files."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from cvfast.data import batches, decode_image, load
from cvfast.data.dataset import ImageFiles

from .helpers import random_images, write_image


def image(seed: int, size: tuple[int, int] = (8, 6)) -> torch.Tensor:
    return random_images(1, seed, size=size)[0]


def class_folders(folder, classes: dict[str, int], size: tuple[int, int] = (8, 6)) -> None:
    """`classes` says how many images each class gets; image i of a class has the pixels of image(i)."""
    for name, count in classes.items():
        for i in range(count):
            write_image(folder / name / f"{i:03}.png", image(i, size))


# -- decode_image ----------------------------------------------------------------------------------------------------


def test_pixels(tmp_path):
    """A lossless file comes back as the pixels that were written, planes first."""
    pixels = image(0)
    decoded = decode_image(write_image(tmp_path / "a.png", pixels))
    assert decoded.dtype == torch.uint8 and decoded.is_contiguous()
    assert torch.equal(decoded, pixels)
    assert torch.equal(decode_image(str(tmp_path / "a.png")), pixels)


def test_channels(tmp_path):
    """Grey becomes coloured by repetition, colours become grey by ITU-R BT.601's weights."""
    colours, grey = image(0), random_images(1, 1, channels=1, size=(8, 6))[0]
    assert torch.equal(decode_image(write_image(tmp_path / "grey.png", grey), 3), grey.repeat(3, 1, 1))
    luma = (colours.double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(0)
    decoded = decode_image(write_image(tmp_path / "colours.png", colours), 1)
    assert decoded.shape == (1, 8, 6) and (decoded[0] - luma).abs().max() < 1


def test_other_modes(tmp_path):
    """Palette, transparency, CMYK, bilevel and 16-bit grey become RGB; 16-bit grey keeps its upper 8 bits."""
    colours = Image.fromarray(image(0).permute(1, 2, 0).numpy())
    palette = colours.quantize(4)
    palette.save(tmp_path / "p.png", transparency=b"\x00\x80\xff\xff")
    want = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode_image(tmp_path / "p.png"), want)

    transparent = colours.copy()
    transparent.putalpha(7)
    transparent.save(tmp_path / "rgba.png")
    assert torch.equal(decode_image(tmp_path / "rgba.png"), image(0))

    Image.new("CMYK", (6, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert torch.equal(decode_image(tmp_path / "cmyk.tif")[:, 0, 0], torch.tensor([255, 0, 0], dtype=torch.uint8))

    Image.new("1", (6, 8), 1).save(tmp_path / "1.png")
    assert torch.equal(decode_image(tmp_path / "1.png", 1), torch.full((1, 8, 6), 255, dtype=torch.uint8))

    deep = np.arange(48, dtype=np.uint16).reshape(8, 6) * 1300
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert torch.equal(decode_image(tmp_path / "deep.png", 1)[0], torch.from_numpy((deep >> 8).astype(np.uint8)))


def test_orientation(tmp_path):
    """A photograph taken with the camera turned is turned upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(image(0).permute(1, 2, 0).numpy()).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(decode_image(tmp_path / "turned.png"), image(0).rot90(-1, (1, 2)))


def test_size(tmp_path):
    """With a size the image is resized without aliasing: stripes of one pixel become even grey."""
    stripes = torch.zeros(3, 32, 32, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    decoded = decode_image(write_image(tmp_path / "a.png", stripes), size=(8, 4))
    assert decoded.shape == (3, 8, 4) and decoded.dtype == torch.uint8
    assert (decoded[:, :, 1:-1].int() - 127).abs().max() <= 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_truncated_file(tmp_path, suffix):
    """The first half of an image is an error that names the file, never half an image."""
    path = write_image(tmp_path / f"broken.{suffix}", image(0, (64, 64)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cannot read the image .*broken.{suffix}: "):
        decode_image(path)


def test_wrong_files(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read the image .*text\.png"):
        decode_image(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"no image file at .*missing\.png"):
        decode_image(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path)
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: its pixels \(Pillow mode F\) have no fixed range"):
        decode_image(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="channels must be 1 .* or 3 .*, got 4"):
        decode_image(write_image(tmp_path / "a.png", image(0)), 4)


# -- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_train_and_test_folders(tmp_path, held_out):
    """Classes are sorted by name, and keep their number in a test folder that lacks some."""
    class_folders(tmp_path / "train", {"zebra": 2, "ant": 3, "cat": 1})
    class_folders(tmp_path / held_out, {"zebra": 2})
    splits = load(tmp_path)
    assert splits.classes == ["ant", "cat", "zebra"] and splits.validation is None
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 2, 2] and splits.test.labels.tolist() == [2, 2]
    assert isinstance(splits.train.images, ImageFiles) and splits.train.image_shape == (3, 8, 6)
    assert torch.equal(splits.train.images[4], image(0)) and torch.equal(splits.test.images[1], image(1))


def test_validation_beside_test(tmp_path):
    class_folders(tmp_path / "train", {"a": 2, "b": 2})
    class_folders(tmp_path / "val", {"a": 1, "b": 1})
    class_folders(tmp_path / "test", {"a": 3, "b": 1})
    splits = load(tmp_path)
    assert len(splits.train) == 4 and len(splits.test) == 4 and len(splits.validation) == 2


def test_single_folder_is_divided_by_seed(tmp_path):
    """A fifth of every class is set aside: the same for the same seed, another for another; nothing twice."""
    class_folders(tmp_path, {"a": 20, "b": 10})
    splits = load(tmp_path, seed=3)
    assert splits.test.labels.tolist() == [0] * 4 + [1] * 2
    assert sorted([*splits.train.images.paths, *splits.test.images.paths]) == sorted(tmp_path.rglob("*.png"))
    assert load(tmp_path, seed=3).test.images.paths == splits.test.images.paths
    assert load(tmp_path, seed=4).test.images.paths != splits.test.images.paths


def test_statistics(tmp_path):
    """Mean and deviation are those of the training pixels."""
    class_folders(tmp_path / "train", {"a": 5})
    class_folders(tmp_path / "test", {"a": 1})
    splits = load(tmp_path)
    pixels = torch.stack([image(i) for i in range(5)]).double() / 255
    assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert splits.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-9)


def test_sizes(tmp_path):
    """Images of different sizes need size=, which the error says, naming the file."""
    write_image(tmp_path / "train" / "a" / "0.png", image(0))
    write_image(tmp_path / "train" / "a" / "1.png", image(1, (5, 9)))
    class_folders(tmp_path / "test", {"a": 1}, size=(4, 4))
    with pytest.raises(ValueError, match=r"1\.png has 5x9 pixels where the first image has 8x6.*size="):
        load(tmp_path)
    splits = load(tmp_path, size=(10, 12))
    assert splits.train.image_shape == splits.test.image_shape == (3, 10, 12)
    images, _ = next(iter(batches(splits.train, 2)))
    assert images.shape == (2, 3, 10, 12)


def test_other_files_are_counted(tmp_path):
    """Files that aren't images, and hidden ones, are left out with a warning; images in subfolders are found."""
    class_folders(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "b" / "._000.png").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README").write_text("x")
    write_image(tmp_path / "a" / "more" / "deep.PNG", image(9))
    with pytest.warns(UserWarning, match=f"{tmp_path}: 2 files in its class folders are not images; ignored"):
        splits = load(tmp_path)
    assert splits.classes == ["a", "b"] and len(splits.train) + len(splits.test) == 11


def test_corrupt_image_in_a_batch(tmp_path):
    """A corrupt image raises when its batch is read, with its name, in this process and from workers."""
    class_folders(tmp_path / "train", {"a": 4})
    class_folders(tmp_path / "test", {"a": 1})
    data = load(tmp_path).train
    (tmp_path / "train" / "a" / "002.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    reader = iter(batches(data, 2))
    next(reader)
    with pytest.raises(ValueError, match=r"cannot read the image .*002\.png"):
        next(reader)
    with pytest.raises(ValueError, match=r"cannot read the image .*002\.png"):
        list(batches(data, 2, num_workers=1))


def test_wrong_folders(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty has no class folders: put the images of each class"):
        load(empty)
    class_folders(tmp_path / "one", {"a": 1})
    with pytest.raises(ValueError, match="one image per class"):
        load(tmp_path / "one")
    class_folders(tmp_path / "gap", {"a": 2})
    (tmp_path / "gap" / "b").mkdir()
    with pytest.raises(ValueError, match=r"gap/b holds no images \(\.bmp, "):
        load(tmp_path / "gap")
    class_folders(tmp_path / "half" / "train", {"a": 2})
    with pytest.raises(ValueError, match="half has train/ but neither test/ nor val/"):
        load(tmp_path / "half")
    class_folders(tmp_path / "half" / "test", {"a": 2, "dog": 1})
    with pytest.raises(ValueError, match="half/test has classes that train/ lacks: dog"):
        load(tmp_path / "half")


def test_file_of_another_kind(tmp_path):
    """A single image, an .npy or a text is not a data set, and the error says so."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    for name, content in {"a.png": b"\x89PNG", "a.npy": buffer.getvalue(), "a.txt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the data set .*{name}: it is neither an .npz nor"):
            load(tmp_path / name)
