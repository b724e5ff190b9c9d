"""Checkpoint files: whole or not there, and never trusted blindly."""

import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cvfast.engine import CheckpointError, Classifier, load_classifier
from cvfast.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

TENSORS = {"model.w": torch.tensor([1.0, float("nan"), -0.0]), "rng.cpu": torch.arange(5, dtype=torch.uint8)}
META = {"epoch": 3, "loss": 0.1 + 0.2, "name": "é"}


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, Checkpoint(TENSORS | {"model.t": torch.arange(6.0).view(2, 3).T}, META))
    checkpoint = load_checkpoint(path)
    assert checkpoint.meta == META
    assert checkpoint.part("model").keys() == {"w", "t"}
    assert torch.equal(checkpoint.tensors["model.w"].view(torch.int32), TENSORS["model.w"].view(torch.int32))
    assert torch.equal(checkpoint.tensors["model.t"], torch.arange(6.0).view(2, 3).T)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, a disk that is always full")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """The unfinished file is a link to /dev/full, where every write fails with ENOSPC, as on a full disk."""
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, Checkpoint(TENSORS, META))
    before = path.read_bytes()
    (tmp_path / "x.safetensors.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        save_checkpoint(path, Checkpoint(TENSORS, META | {"epoch": 4}))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_before_the_data_is_on_the_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, Checkpoint(TENSORS, META))
    before = path.read_bytes()

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, Checkpoint(TENSORS, META | {"epoch": 4}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_checkpoints_are_refused(tmp_path, small_run):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="x.safetensors"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="best.safetensors"):
        load_checkpoint(tmp_path)
    whole = (small_run.folder / "best.safetensors").read_bytes()
    for content in (b"", b"not a checkpoint", whole[:1000], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="x.safetensors"):
            load_checkpoint(path)
    safetensors.torch.save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of cvfast"):
        load_checkpoint(path)


def test_a_checkpoint_whose_parts_do_not_fit_is_refused(small_run):
    whole = load_checkpoint(small_run.folder)
    assert isinstance(load_classifier(small_run.folder), Classifier)
    broken = [
        Checkpoint({}, whole.meta),
        Checkpoint(whole.tensors, {}),
        Checkpoint(whole.tensors, whole.meta | {"classifier": whole.meta["classifier"] | {"model": "lenet"}}),
        Checkpoint(whole.tensors, whole.meta | {"classifier": whole.meta["classifier"] | {"classes": ["one"]}}),
    ]
    for checkpoint in broken:
        with pytest.raises(CheckpointError, match="does not hold a usable classifier"):
            Classifier.from_checkpoint(checkpoint)
