"""Training: what a run is a function of, where it stops, and that a resumed run is the uninterrupted one."""

import csv
import dataclasses
import io
import math
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import cvfast.models
from cvfast import _env, backend, data
from cvfast.engine import CheckpointError, TrainConfig, evaluate, load_classifier, resume, train
from cvfast.engine.checkpoint import load_checkpoint
from cvfast.engine.run import Run
from cvfast.engine.schedule import learning_rate
from cvfast.engine.train import run_folder
from cvfast.models import CNN
from cvfast.models.entry import Entry


def without_seconds(history):
    return [dataclasses.replace(entry, seconds=0.0) for entry in history]


def last(config):
    return load_checkpoint(Path(config.out) / "last.safetensors")


def assert_same_run(one, other):
    """Bit for bit: every loss and accuracy of every epoch, all weights, the optimiser's and the random state."""
    assert without_seconds(one.history) == without_seconds(other.history)
    assert one.best_epoch == other.best_epoch
    a, b = last(one.config).tensors, last(other.config).tensors
    assert a.keys() == b.keys() and any(name.startswith("optimizer.") for name in a)
    for name in a:
        assert torch.equal(a[name], b[name]), name


class DropoutCNN(CNN):
    """A model that draws from torch's random numbers while it trains."""

    def __init__(self, num_classes, in_chans):
        super().__init__(num_classes, in_chans)
        self.fc2 = nn.Sequential(self.fc2, nn.Dropout(0.5))


@pytest.fixture
def dropout_model(monkeypatch):
    monkeypatch.setitem(cvfast.models._MODELS, "dropout-cnn", Entry(DropoutCNN, (32, 32)))
    return "dropout-cnn"


def at_step(monkeypatch, number, action):
    """Calls ``action`` within the training step ``number``, counted from 1 over the run."""
    original, count = Run._train_step, iter(range(1, 10**6))

    def step(self, images, labels):
        original(self, images, labels)
        if next(count) == number:
            action()

    monkeypatch.setattr(Run, "_train_step", step)


def power_cut():
    raise SystemError("power cut")


STEPS = 9  # per epoch: 144 training images in batches of 16


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(
    ("number", "action", "error"),
    [
        pytest.param(STEPS + 4, lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, id="mid-epoch"),
        pytest.param(2 * STEPS, lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, id="last step"),
        pytest.param(2 * STEPS + 1, power_cut, SystemError, id="epoch boundary"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    settings, monkeypatch, dropout_model, optimizer, number, action, error
):
    uninterrupted = train(settings("a", model=dropout_model, optimizer=optimizer))
    config = settings("b", model=dropout_model, optimizer=optimizer)
    with monkeypatch.context() as patch, pytest.raises(error):
        at_step(patch, number, action)
        train(config)
    torch.manual_seed(12345)  # the random state of the new process must not matter
    assert_same_run(uninterrupted, resume(config.out))


def test_a_resumed_run_replays_an_augmentation_that_draws_from_torchs_random_numbers(settings, monkeypatch):
    def noise(pixels):
        return pixels + 0.1 * torch.randn_like(pixels)

    uninterrupted = train(settings("a"), augmentation=noise)
    config = settings("b")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, STEPS + 4, lambda: signal.raise_signal(signal.SIGINT))
        train(config, augmentation=noise)
    torch.manual_seed(12345)
    assert_same_run(uninterrupted, resume(config.out, augmentation=noise))


def test_an_interruption_leaves_pythons_own_handler_behind(settings, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="epoch 1, step 2"):
        train(settings())
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_changes_nothing(small_run):
    before = (small_run.folder / "last.safetensors").read_bytes()
    again = resume(small_run.folder)
    assert without_seconds(again.history) == without_seconds(small_run.history)
    assert (small_run.folder / "last.safetensors").read_bytes() == before


def test_resume_needs_a_run(tmp_path, small_run):
    with pytest.raises(FileNotFoundError, match=r"last\.safetensors"):
        resume(tmp_path)
    content = (small_run.folder / "last.safetensors").read_bytes()
    (tmp_path / "last.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        resume(tmp_path)


def test_the_seed_decides_and_augmentation_matters(settings):
    first, same = train(settings("a", epochs=1)), train(settings("b", epochs=1))
    assert_same_run(first, same)
    for name, change in {"c": {"seed": 1}, "d": {"augment": False}}.items():
        other = train(settings(name, epochs=1, **change))
        assert other.history[0].train_loss != first.history[0].train_loss


def test_training_learns(settings):
    history = train(settings(epochs=12, augment=False)).history
    assert history[0].train_accuracy < 0.4 and history[-1].train_accuracy > 0.7
    assert history[-1].train_loss < 0.5 * history[0].train_loss


def test_the_best_checkpoint_is_the_best_epochs(settings):
    result = train(settings(epochs=6))
    accuracies = [entry.validation_accuracy for entry in result.history]
    assert result.best_epoch == 1 + accuracies.index(max(accuracies))
    best = load_checkpoint(result.folder)
    assert best.meta["epoch"] == result.best_epoch
    _, validation = data.split(data.load(result.config.data).train, result.config.validation, result.config.seed)
    evaluation = evaluate(load_classifier(result.folder), validation)
    assert evaluation.accuracy == pytest.approx(max(accuracies), abs=1e-6)


def test_patience_stops_a_run_that_no_longer_improves(settings):
    result = train(settings(epochs=9, lr=1e-30, weight_decay=0.0, patience=2))
    assert (result.best_epoch, len(result.history)) == (1, 3)


def test_clipping_bounds_the_step(settings):
    config = settings(epochs=1, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, clip=1e-3, schedule="constant",
                      warmup_epochs=0.0)  # fmt: skip
    torch.manual_seed(config.seed)
    start = CNN(10, 1).state_dict()
    train(config)
    end = last(config).part("model")
    moved = math.sqrt(sum((end[name] - start[name]).pow(2).sum().item() for name in start))
    assert 1e-4 < moved <= STEPS * 1e-3 * 1.01


def test_amp_computes_in_bfloat16_and_comes_close(settings):
    exact, amp = train(settings("a", epochs=1)).history[0], train(settings("b", epochs=1, amp=True)).history[0]
    assert amp.train_loss != exact.train_loss
    assert amp.train_loss == pytest.approx(exact.train_loss, rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_do(settings):
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        train(settings(optimizer="sgd", lr=1e30))


def test_the_backend_holds_during_the_run_only(settings, monkeypatch):
    seen = []
    at_step(monkeypatch, 1, lambda: seen.append((backend.current(), torch.get_num_threads())))
    before = backend.current(), torch.get_num_threads()
    train(settings(epochs=1, backend="native", threads=3))
    assert seen == [("native", 3)]
    assert (backend.current(), torch.get_num_threads()) == before


def test_a_run_is_never_overwritten(settings, tmp_path, monkeypatch):
    train(settings(epochs=1))
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(settings(epochs=1))
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before
    monkeypatch.chdir(tmp_path)
    assert [str(run_folder(TrainConfig(), new=True)) for _ in range(2)] == ["runs/cnn", "runs/cnn-2"]


def test_logs(settings):
    terminal, pipe = (Console(file=io.StringIO(), force_terminal=t, width=120) for t in (True, False))
    result = train(settings("a", epochs=2, tensorboard=True), console=pipe)
    lines = pipe.file.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]  # no bar, no control codes
    with (result.folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in rows] == [entry.train_loss for entry in result.history]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.folder / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("validation_accuracy")]
    assert logged == pytest.approx([entry.validation_accuracy for entry in result.history])

    train(settings("b", epochs=1), console=terminal)
    assert "━" in terminal.file.getvalue()


def test_schedules():
    def rates(steps, **config):
        return [learning_rate(TrainConfig(lr=1.0, epochs=10, **config), step, 4) for step in steps]

    assert rates([0, 1, 3, 4], schedule="constant", warmup_epochs=1) == [0.25, 0.5, 1.0, 1.0]
    assert rates([0, 20, 40], schedule="cosine", warmup_epochs=0) == pytest.approx([1.0, 0.5, 0.0])
    assert rates([4, 22, 40], schedule="cosine", warmup_epochs=1) == pytest.approx([1.0, 0.5, 0.0])
    assert rates([0, 11, 12, 24], schedule="step", warmup_epochs=0, step_epochs=3) == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "lenet"}, "'lenet'.*cnn"),
        ({"optimizer": "lion"}, "'lion'.*adamw"),
        ({"schedule": "linear"}, "'linear'.*cosine"),
        ({"backend": "cudnn"}, "'cudnn'.*native"),
        ({"device": "tpu"}, "'tpu'.*cuda"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"momentum": -0.1}, "momentum must not be negative"),
        ({"validation": 1.0}, "validation must lie between 0 and 1, got 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_the_real_cifar_images_are_learned(tmp_path):
    """Three epochs on CIFAR-10's images: far above the 10 % of guessing. Needs CVFAST_TEST_DATA."""
    if _env.test_data is None:
        pytest.skip("CVFAST_TEST_DATA names no folder with cifar-10-batches-bin")
    folder = _env.test_data / "cifar-10-batches-bin"
    result = train(TrainConfig(data=str(folder), epochs=3, out=str(tmp_path / "run"), threads=1))
    assert evaluate(load_classifier(result.folder), data.load(folder).test).accuracy > 0.35
