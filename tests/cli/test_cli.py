"""The command: every subcommand once, and an exit code with one clear line for every mistake."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cvfast import _choices, data, engine
from cvfast.cli import app
from cvfast.engine import checkpoint as checkpoints
from cvfast.engine.checkpoint import load_checkpoint
from cvfast.models import create_model, example_inputs


def cvfast(*arguments):
    """Runs the command in this process; a traceback counts as a failure of the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fails(code, message, *arguments):
    result = cvfast(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split()), result.stderr
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    splits = data.load("fashion-mnist")
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(
        path, train_images=splits.train.images[:160].numpy(), train_labels=splits.train.labels[:160].numpy(),
        test_images=splits.test.images[:40].numpy(), test_labels=splits.test.labels[:40].numpy(),
        classes=np.array(splits.classes),
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    """A run trained by the command itself."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = cvfast("train", "--data", small_data, "--epochs", 2, "--threads", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "test accuracy" in result.stdout and f"cvfast eval --checkpoint {out}" in result.stdout
    return out


@pytest.fixture
def picture(tmp_path):
    Image.new("L", (28, 28), 128).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_help_names_every_command_and_exit_code():
    output = " ".join(cvfast("--help").output.split())
    for word in ("demo", "train", "eval", "predict", "export", "bench", "explain", "tune", "info"):
        assert word in output
    for code in ("0 done", "1 failed", "2 wrong usage", "3 file not found", "4 bad data", "5 bad checkpoint",
                 "6 disk full", "130 interrupted"):  # fmt: skip
        assert code in output
    for command in ("demo", "train", "eval", "predict", "export", "explain", "tune", "info"):
        assert cvfast(command, "--help").exit_code == 0


def test_eval_prints_the_table_and_writes_json(run, tmp_path):
    result = cvfast("eval", "--checkpoint", run, "--json", tmp_path / "scores.json")
    assert result.exit_code == 0 and "macro average" in result.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert np.sum(scores["confusion"]) == 40 and f"{scores['accuracy']:.2%}" in result.output


def test_predict(run, picture):
    result = cvfast("predict", "--checkpoint", run / "best.safetensors", "--top", 2, picture, picture)
    assert result.exit_code == 0
    assert [line.count("%") for line in result.stdout.splitlines()] == [2, 2]


@pytest.mark.parametrize(("format", "name"), [("onnx", "model.onnx"), ("torch", "model.pt2")])
def test_export(run, format, name):
    result = cvfast("export", "--checkpoint", run, "--format", format)
    assert result.exit_code == 0, result.output
    assert "40 of 40 images" in result.stdout and "[N, 1, 28, 28]" in result.stdout
    assert (run / name).stat().st_size > 100_000


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [
        ("cnn", "onnx", "images float32 [N, 3, 32, 32] -> output float32 [N, 4]"),
        ("cnn_lstm", "torch", "videos float32 [N, 8, 3, 32, 32] -> float32 [N, 4]"),
        ("show_tell", "onnx",
         "images float32 [N, 1, 56, 56], sentences int64 [N, 10] -> output float32 [N, 10, 4]"),
    ],
)  # fmt: skip
def test_export_of_any_model(name, format, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cvfast("export", "--model", name, "--num-classes", 4, "--format", format)
    assert result.exit_code == 0, result.output
    assert f"wrote {name}.{'onnx' if format == 'onnx' else 'pt2'} with random weights: {words}" in result.stdout
    assert "3 inputs differ by at most" in result.stdout


def test_export_of_weights_from_a_file(tmp_path):
    model = create_model("cnn", num_classes=4)
    torch.save(model.state_dict(), tmp_path / "cnn.pth")
    given = ("export", "--model", "cnn", "--weights", tmp_path / "cnn.pth", "--out", tmp_path / "cnn.onnx")
    result = cvfast(*given, "--num-classes", 4, "--no-check")
    assert result.exit_code == 0 and "checked" not in result.stdout
    assert f"with {tmp_path / 'cnn.pth'} ({len(model.state_dict())} tensors fit): images float32" in result.stdout
    assert engine.check_network(tmp_path / "cnn.onnx", model, example_inputs("cnn", 2)).passed
    fails(5, "2 mismatched", *given)
    fails(3, "nowhere", *given, "--weights", tmp_path / "nowhere.pth")


def test_explain(run):
    for model in ("cnn", run):
        result = cvfast("explain", "--model", model, "--batch", 2)
        assert result.exit_code == 0 and "conv1" in result.output and "µs" in result.output
    fails(2, "'lenet' is neither a checkpoint nor one of", "explain", "--model", "lenet")
    result = cvfast("explain", "--model", "show_tell")
    assert result.exit_code == 0 and "LSTM" in result.output


def test_tune_keeps_choices_beside_the_checkpoint(run, tmp_path):
    """Another machine's are not used, a file of one's own can be named."""
    result = cvfast("tune", "--model", run, "--batch", 1, "--batch", 2)
    assert result.exit_code == 0 and f"kept in {run / 'choices.json'}" in " ".join(result.output.split())
    choices, _ = _choices.read(run / "choices.json")
    assert {call[1][2] for call in choices} == {1, 2} and len(choices) == 4
    _choices.clear()
    loser = next(iter(choices))
    _choices.write(run / "choices.json", {loser: _choices.Choice("ext", 2.0, 1.0)})
    engine.load_classifier(run)
    assert list(_choices.torchs.values()) == [{loser: _choices.Choice("ext", 2.0, 1.0)}]
    _choices.clear()
    assert cvfast("tune", "--model", "cnn", "--out", tmp_path / "own.json").exit_code == 0
    assert (tmp_path / "own.json").exists()
    (run / "choices.json").unlink()
    _choices.clear()


def test_info():
    assert cvfast("info").exit_code == 0


def test_bench_outside_of_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(3, "clone", "bench", "--op", "conv2d")


def test_bench_passes_options_and_the_exit_code_on(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "run.py").write_text("import sys; sys.exit(40 + len(sys.argv[1:]))")
    monkeypatch.chdir(tmp_path)
    assert cvfast("bench", "--op", "conv2d").exit_code == 42


def test_wrong_usage_is_2(run, small_data, tmp_path):
    fails(2, "'lenet'", "train", "--model", "lenet")
    fails(2, "epochs must be positive", "train", "--epochs", 0)
    fails(2, "holds a run already", "train", "--data", small_data, "--out", run)
    fails(2, "give no other option", "train", "--resume", run, "--epochs", 5)
    fails(2, "'tflite'", "export", "--checkpoint", run, "--format", "tflite")
    fails(2, "give one of the two", "export")
    fails(2, "give one of the two", "export", "--checkpoint", run, "--model", "cnn")
    fails(2, "with --model only", "export", "--checkpoint", run, "--num-classes", 3)
    fails(2, "a classifier's --checkpoint only", "export", "--model", "cnn", "--data", small_data)
    fails(2, "unknown model 'lenet'", "export", "--model", "lenet")
    fails(2, "takes no option 'num_classes'", "export", "--model", "srresnet", "--num-classes", 3)
    fails(2, "unknown backend", "eval", "--checkpoint", run, "--backend", "cudnn")
    fails(2, "--checkpoint", "eval")


def test_missing_files_are_3(run, picture, tmp_path):
    fails(3, "nowhere/data", "train", "--data", tmp_path / "nowhere/data", "--out", tmp_path / "x")
    fails(3, "no checkpoint", "eval", "--checkpoint", tmp_path / "nowhere")
    fails(3, "no.png", "predict", "--checkpoint", run, picture, tmp_path / "no.png")
    fails(3, "no checkpoint", "train", "--resume", tmp_path)
    assert not (tmp_path / "x").exists()


def test_bad_data_is_4(run, picture, tmp_path):
    picture.write_bytes(picture.read_bytes()[:50])
    fails(4, "picture.png", "predict", "--checkpoint", run, picture)
    for name in ("cat", "dog"):
        for i in range(5):
            (tmp_path / "animals" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + i, 30), (40 * i, 0, 0)).save(tmp_path / "animals" / name / f"{i}.png")
    fails(4, "knows 10 classes", "eval", "--checkpoint", run, "--data", tmp_path / "animals")
    assert cvfast("train", "--data", tmp_path / "animals", "--epochs", 1, "--out", tmp_path / "a").exit_code == 0
    (tmp_path / "animals/cat/0.png").write_bytes(b"")
    fails(4, "0.png", "train", "--data", tmp_path / "animals", "--epochs", 1, "--out", tmp_path / "b")


def test_bad_checkpoints_are_5(picture, tmp_path):
    broken = tmp_path / "best.safetensors"
    broken.write_bytes(b"no checkpoint")
    for arguments in (("eval",), ("export",), ("predict", picture)):
        fails(5, "best.safetensors", arguments[0], "--checkpoint", broken, *arguments[1:])


def test_a_full_disk_is_6_and_the_run_can_go_on(small_data, tmp_path, monkeypatch):
    """The third checkpoint meets a full disk: the second is still there, and the run resumes from it."""
    original, count = os.fsync, iter(range(1, 100))

    def full(descriptor):
        if next(count) == 4:  # the first file that is written describes the run
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", full)
        fails(6, "disk is full", "train", "--data", small_data, "--epochs", 3, "--threads", 1, "--out", out)
    assert load_checkpoint(out / "last.safetensors").meta["epoch"] == 1
    assert cvfast("train", "--resume", out).exit_code == 0
    assert load_checkpoint(out / "last.safetensors").meta["epoch"] == 3


def test_what_the_machine_lacks_is_1(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fails(1, "finds no CUDA GPU", "eval", "--checkpoint", run, "--device", "cuda")


def test_ctrl_c_is_130_and_leaves_a_checkpoint_that_resumes(small_data, tmp_path):
    """A real SIGINT to a real process, in the middle of a run; it resumes to the weights of an uninterrupted run."""
    settings = ["--data", str(small_data), "--epochs", "40", "--threads", "1"]
    command = [sys.executable, "-m", "cvfast", "train"]
    stopped = tmp_path / "stopped"
    process = subprocess.Popen([*command, *settings, "--out", str(stopped)], stderr=subprocess.PIPE, text=True)
    wait_for(stopped / "last.safetensors", process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted: stopped in epoch" in stderr and "Traceback" not in stderr
    assert load_checkpoint(stopped / "last.safetensors").meta["epoch"] < 40

    assert cvfast("train", "--resume", stopped).exit_code == 0
    assert cvfast("train", *settings, "--out", tmp_path / "whole").exit_code == 0
    resumed, whole = (load_checkpoint(folder / "last.safetensors") for folder in (stopped, tmp_path / "whole"))
    assert [e["train_loss"] for e in resumed.meta["history"]] == [e["train_loss"] for e in whole.meta["history"]]
    assert all(resumed.tensors[name].equal(tensor) for name, tensor in whole.tensors.items())


def wait_for(path: Path, process, seconds: float = 60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, "the run did not start"
        time.sleep(0.02)
