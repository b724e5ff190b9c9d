"""CIFAR-10: every published form gives the same images, and nothing broken or malicious gets through."""

import gzip
import hashlib
import os
import pickle
import tarfile
from dataclasses import replace

import pytest
import torch

from cvfast import _env
from cvfast.data import cifar10, load
from cvfast.data.cifar10 import BINARY, PYTHON, Original

from .helpers import (
    FileServer,
    binary_batch,
    pickled_batch,
    python2_pickle,
    random_images,
    write_archive,
    write_files,
)

TRAIN_IMAGES, TRAIN_LABELS = random_images(30, seed=1), torch.arange(30) % 10
TEST_IMAGES, TEST_LABELS = random_images(7, seed=2), torch.arange(7)


def files_of(layout) -> dict[str, bytes]:
    """Three files: batches of 18 and 12 images and a test batch."""
    pack, suffix = (binary_batch, ".bin") if layout is BINARY else (pickled_batch, "")
    return {
        f"data_batch_1{suffix}": pack(TRAIN_IMAGES[:18], TRAIN_LABELS[:18]),
        f"data_batch_2{suffix}": pack(TRAIN_IMAGES[18:], TRAIN_LABELS[18:]),
        f"test_batch{suffix}": pack(TEST_IMAGES, TEST_LABELS),
    }


def assert_whole(splits) -> None:
    assert torch.equal(splits.train.images, TRAIN_IMAGES) and torch.equal(splits.train.labels, TRAIN_LABELS)
    assert torch.equal(splits.test.images, TEST_IMAGES) and torch.equal(splits.test.labels, TEST_LABELS)
    assert splits.train.images.is_contiguous() and splits.train.images.dtype == torch.uint8
    assert splits.classes[0] == "airplane" and splits.classes[9] == "truck"


layouts = pytest.mark.parametrize("layout", [BINARY, PYTHON], ids=["binary", "python"])


@layouts
def test_folder_and_its_parent(tmp_path, layout):
    """The unpacked folder is read, given itself, its parent, or its parent as the root of "cifar10"."""
    folder = write_files(tmp_path / layout.folder, files_of(layout) | {"readme.html": b"", "batches.meta": b"junk"})
    assert_whole(load(folder))
    assert_whole(load(str(tmp_path)))
    assert_whole(load("cifar10", root=tmp_path))


@layouts
def test_folder_of_another_name(tmp_path, layout):
    """The folder is recognised by the files in it, whatever it is called."""
    assert_whole(load(write_files(tmp_path / "mine", files_of(layout))))


@layouts
def test_archive_and_its_folder(tmp_path, layout):
    """An archive is read in place, given itself, renamed, or its folder, and nothing is unpacked beside it."""
    archive = write_archive(tmp_path / layout.archive, layout.folder, files_of(layout))
    assert_whole(load(archive))
    assert_whole(load(tmp_path))
    assert_whole(load(archive.rename(tmp_path / "renamed.tgz")))
    assert os.listdir(tmp_path) == ["renamed.tgz"]


def test_batches_in_order_of_their_names(tmp_path):
    """Batch files come in the order of their numbers, not in the archive's."""
    files = dict(reversed(files_of(BINARY).items()))
    assert_whole(load(write_archive(tmp_path / BINARY.archive, BINARY.folder, files)))


def test_real_images():
    """The images in CVFAST_TEST_DATA: counts, balance, and statistics near those published for CIFAR-10."""
    if _env.test_data is None:
        pytest.skip("CVFAST_TEST_DATA is not set: no real CIFAR-10 images to read")
    splits = load(_env.test_data)
    assert splits.train.images.shape == (10000, 3, 32, 32) and splits.test.images.shape == (2000, 3, 32, 32)
    assert splits.train.labels.bincount().tolist() == [1000] * 10
    assert splits.test.labels.bincount().tolist() == [200] * 10
    assert splits.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.01)
    assert splits.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)
    pixels = splits.train.images.double() / 255
    assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert splits.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-9)
    # Neighbouring pixels of a photograph are alike, so planes, rows and columns are where they should be.
    for step in (pixels.diff(dim=2), pixels.diff(dim=3), pixels.diff(dim=1)):
        assert step.abs().mean() < 0.08


# -- damage ----------------------------------------------------------------------------------------------------------


def test_part_of_a_record(tmp_path):
    files = files_of(BINARY)
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: 36875 bytes are not a whole number of records of 3073"):
        load(write_files(tmp_path / BINARY.folder, files))


def test_empty_batch(tmp_path):
    with pytest.raises(ValueError, match=r"test_batch\.bin: 0 bytes"):
        load(write_files(tmp_path / BINARY.folder, files_of(BINARY) | {"test_batch.bin": b""}))


@layouts
def test_label_out_of_range(tmp_path, layout):
    files = files_of(layout)
    files[layout.test] = (binary_batch if layout is BINARY else pickled_batch)(TEST_IMAGES, TEST_LABELS + 4)
    with pytest.raises(ValueError, match=f"{layout.test}: label 10 is outside of the 10 classes"):
        load(write_files(tmp_path / layout.folder, files))


@layouts
def test_missing_batches(tmp_path, layout):
    """A folder or an archive without its test batch, or without training batches, says what it needs and has."""
    files = files_of(layout)
    del files[layout.test]
    with pytest.raises(FileNotFoundError, match=f"incomplete: it needs data_batch.* and {layout.test}, found.*batch_1"):
        load(write_files(tmp_path / layout.folder, files))
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load(write_archive(tmp_path / layout.archive, layout.folder, files))
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load(write_files(tmp_path / "other", {layout.test: files_of(layout)[layout.test]}))


@pytest.mark.parametrize("layout", [BINARY, PYTHON], ids=["sha1", "md5"])
def test_digest_of_original_batches(tmp_path, layout, monkeypatch):
    """A batch with an original's size is read if its digest is the original's, refused if it isn't."""
    files = files_of(layout)
    content = files[layout.test]
    algorithm = layout.originals[layout.test].algorithm
    good = Original(len(content), algorithm, hashlib.new(algorithm, content).hexdigest())
    folder = write_files(tmp_path / layout.folder, files)
    monkeypatch.setitem(layout.originals, layout.test, good)
    assert_whole(load(folder))
    monkeypatch.setitem(layout.originals, layout.test, replace(good, digest="0" * 32))
    with pytest.raises(ValueError, match=f"{layout.test} has the size of the original but is damaged.*{good.digest}"):
        load(folder)
    monkeypatch.setitem(layout.originals, layout.test, replace(good, size=len(content) + 1, digest="0" * 32))
    assert_whole(load(folder))


def test_digest_of_original_archive(tmp_path, monkeypatch):
    """An archive with the original's size and another MD5 is refused before it is read."""
    archive = write_archive(tmp_path / BINARY.archive, BINARY.folder, files_of(BINARY))
    as_original(monkeypatch, archive.read_bytes())
    assert_whole(load(archive))
    content = bytearray(archive.read_bytes())
    content[-1] ^= 1  # the end of the gzip trailer, which a stream reader never looks at
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz has the size of the original but is damaged"):
        load(archive)


@layouts
def test_truncated_archive(tmp_path, layout):
    archive = write_archive(tmp_path / layout.archive, layout.folder, files_of(layout))
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{layout.archive} is damaged or incomplete"):
        load(archive)


def test_archive_that_is_none(tmp_path):
    for content in (b"", b"not gzip", gzip.compress(b"not a tar file" * 100)):
        (tmp_path / PYTHON.archive).write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match="cifar-10-python.tar.gz is (damaged|incomplete)"):
            load(tmp_path)


def test_archive_with_foreign_members(tmp_path, monkeypatch):
    """Members with other paths, links and devices are passed over, and no file is written anywhere."""
    path = tmp_path / "in" / BINARY.archive
    path.parent.mkdir()
    files = files_of(BINARY)
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../evil", f"{tmp_path}/evil", "data_batch_3.bin", f"{BINARY.folder}/../data_batch_3.bin"):
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo(f"{BINARY.folder}/data_batch_4.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
            archive.add(tmp_path / name, f"{BINARY.folder}/{name}")
            (tmp_path / name).unlink()
    assert_whole(load(path))
    assert os.listdir(tmp_path) == ["in"] and os.listdir(path.parent) == [BINARY.archive]


class Malicious:
    """Unpickling it would make a folder, if its call were allowed."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function", [os.mkdir, eval, getattr, torch.load], ids=["os.mkdir", "eval", "getattr", "torch.load"]
)
def test_malicious_pickle(tmp_path, function):
    """A batch that wants to call a function is refused before the call, and the error names function and file."""
    trap = tmp_path / "trap"
    argument = f"__import__('os').mkdir({str(trap)!r})" if function is eval else str(trap)
    evil = python2_pickle({"data": Malicious(function, argument), "labels": []})
    folder = write_files(tmp_path / PYTHON.folder, files_of(PYTHON) | {"data_batch_1": evil})
    with pytest.raises(ValueError, match=rf"data_batch_1: it wants .*\.{function.__name__}, .*malicious"):
        load(folder)
    assert not trap.exists()


def test_malicious_pickle_would_work():
    """The trap of the test above is a real one: Python's own unpickler falls into it."""
    evil = pickle.dumps(Malicious(eval, "6 * 7"), protocol=2)
    assert pickle.loads(evil) == 42


@pytest.mark.parametrize(
    "batch, complaint",
    [
        ({"data": TEST_IMAGES.flatten(1).numpy()}, "no dict with data and labels"),
        ([1, 2], "no dict with data and labels"),
        ({"data": TEST_IMAGES.flatten(1).float().numpy(), "labels": [0] * 7}, r"data is not a uint8 array \[N, 3072\]"),
        ({"data": TEST_IMAGES.numpy(), "labels": [0] * 7}, r"data is not a uint8 array \[N, 3072\]"),
        ({"data": TEST_IMAGES.flatten(1).numpy(), "labels": ["cat"] * 7}, "labels are not a list of whole numbers"),
        ({"data": TEST_IMAGES.flatten(1).numpy(), "labels": [0] * 6}, "7 images with 6 labels"),
    ],
    ids=["no labels", "list", "float", "shape", "words", "count"],
)
def test_wrong_content_of_a_pickle(tmp_path, batch, complaint):
    folder = write_files(tmp_path / PYTHON.folder, files_of(PYTHON) | {"test_batch": python2_pickle(batch)})
    with pytest.raises(ValueError, match=f"test_batch: {complaint}"):
        load(folder)


def test_truncated_pickle(tmp_path):
    content = files_of(PYTHON)["test_batch"]
    for length in (0, 1, 100, len(content) - 1):
        folder = write_files(tmp_path / PYTHON.folder, files_of(PYTHON) | {"test_batch": content[:length]})
        with pytest.raises(ValueError, match="cannot read .*test_batch"):
            load(folder)


# -- download --------------------------------------------------------------------------------------------------------


def as_original(monkeypatch, content: bytes) -> None:
    """Makes `content` count as the published binary archive."""
    original = Original(len(content), "md5", hashlib.md5(content).hexdigest())
    layout = replace(BINARY, archive_original=original)
    monkeypatch.setattr(cifar10, "BINARY", layout)
    monkeypatch.setattr(cifar10, "LAYOUTS", (layout, PYTHON))


@pytest.fixture
def published(tmp_path, monkeypatch) -> bytes:
    """A small archive that counts as the published one."""
    content = write_archive(tmp_path / "published", BINARY.folder, files_of(BINARY)).read_bytes()
    as_original(monkeypatch, content)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return content


def test_download_once(tmp_path, monkeypatch, published):
    """A missing data set is downloaded to its root, which is made, and read from there the next time."""
    root = tmp_path / "some" / "root"
    with FileServer(published) as server:
        monkeypatch.setattr(cifar10, "HOME", server.url)
        assert_whole(load("cifar10", root=root, download=True))
        assert_whole(load("cifar10", root=root, download=True))
    assert server.asked == [None]
    assert os.listdir(root) == [BINARY.archive]


def test_no_download_unless_allowed(tmp_path, monkeypatch, published):
    with FileServer(published) as server:
        monkeypatch.setattr(cifar10, "HOME", server.url)
        with pytest.raises(FileNotFoundError, match="no CIFAR-10 in (.|\n)*MD5(.|\n)*download=True"):
            load("cifar10", root=tmp_path / "root")
    assert server.asked == []


def test_no_network(tmp_path, monkeypatch, published):
    """Without a network the error says which file to get, its MD5, and where to put it."""
    with FileServer(published) as server:
        pass  # nobody listens at its address any more
    monkeypatch.setattr(cifar10, "HOME", server.url)
    with pytest.raises(ConnectionError) as error:
        load("cifar10", root=tmp_path / "root", download=True)
    text = str(error.value)
    assert f"cannot download {server.url}cifar-10-binary.tar.gz" in text
    assert PYTHON.archive_original.digest in text and str(tmp_path / "root") in text
