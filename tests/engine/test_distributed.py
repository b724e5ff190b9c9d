"""Two processes under torchrun train as one does."""

import subprocess
import sys

import pytest
import torch

from cvfast.engine import CheckpointError, resume, train
from cvfast.engine.checkpoint import load_checkpoint


def test_two_processes_give_the_losses_of_one(settings, tmp_path):
    """The same global batches, without augmentation: losses and weights agree to 1e-6."""
    one = train(settings("one", epochs=2, augment=False, batch_size=16))
    assert len(one.history) == 2
    options = ["--data", one.config.data, "--epochs", "2", "--batch-size", "16", "--no-augment", "--threads", "1"]
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "cvfast", "train", *options, "--out", str(tmp_path / "two")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("best epoch") == 1  # the second process is silent
    two = load_checkpoint(tmp_path / "two" / "last.safetensors")
    for ours, theirs in zip(one.history, two.meta["history"], strict=True):
        for name in ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy"):
            assert getattr(ours, name) == pytest.approx(theirs[name], abs=1e-6), name
    weights = load_checkpoint(one.folder / "last.safetensors").part("model")
    for name, tensor in two.part("model").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)

    with pytest.raises(CheckpointError, match="2 processes and cannot go on with 1"):
        resume(tmp_path / "two")
