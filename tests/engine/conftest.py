"""Small real images, and runs on them that take about a second."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from cvfast import data
from cvfast.engine import TrainConfig, train

TRAIN, TEST = 160, 40


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Path of an .npz with the first images of the embedded Fashion-MNIST: 160 for training, 40 for testing."""
    splits = data.load("fashion-mnist")
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(
        path,
        train_images=splits.train.images[:TRAIN].numpy(),
        train_labels=splits.train.labels[:TRAIN].numpy(),
        test_images=splits.test.images[:TEST].numpy(),
        test_labels=splits.test.labels[:TEST].numpy(),
        classes=np.array(splits.classes),
    )
    return str(path)


@pytest.fixture
def settings(small_data, tmp_path):
    """A function that makes a TrainConfig on the small data, writing to a fresh folder."""

    def make(out="run", **changes):
        defaults = {"data": small_data, "epochs": 3, "batch_size": 16, "threads": 1}
        return TrainConfig(**(defaults | changes), out=str(tmp_path / out))

    return make


@pytest.fixture(scope="session")
def small_run(small_data, tmp_path_factory):
    """A finished run of three epochs on the small data."""
    out = tmp_path_factory.mktemp("run")
    return train(TrainConfig(data=small_data, epochs=3, batch_size=16, threads=1, out=str(out)))


@pytest.fixture(scope="session")
def undrawn():
    """A context manager within which reports' pictures are empty files: to draw them takes longer than to train."""
    from cvfast.engine import report  # imports matplotlib

    def save(figure, path):
        path.touch()
        report.plt.close(figure)

    @contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "_save", save)
            yield

    return context


@pytest.fixture(autouse=True)
def _keep_random_state():
    """Training seeds torch's random numbers; other tests shall not notice."""
    with torch.random.fork_rng():
        yield
