"""The recipe transfer: its trainings, their resumption, and what its report says."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from cvfast import data
from cvfast.engine import TrainConfig, TrainResult, evaluate, load_classifier, recipes
from cvfast.engine.checkpoint import load_checkpoint
from cvfast.engine.recipes.running import TWINS, compare, gaps
from cvfast.engine.recipes.transfer import Options
from cvfast.engine.run import Run

RUNS = ("source", "scratch-0", "fine-tuned-0", "scratch-1", "fine-tuned-1")


def options_on(small_data):
    return Options(data=small_data, source=small_data, model="cnn", per_class=6, epochs=2, source_epochs=1, seeds=2,
                   lr=0.01, source_lr=0.01, threads=1, freeze="conv1")  # fmt: skip


@pytest.fixture
def options(small_data):
    return options_on(small_data)


def test_an_interrupted_recipe_goes_on_and_reports(options, tmp_path, monkeypatch):
    original, count = Run._train_step, iter(range(1, 1000))

    def stop(self, *batch):
        if next(count) == 14:  # 144 images in batches of 64, then 50 images in batches of 32: within fine-tuned-1
            raise KeyboardInterrupt
        original(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_train_step", stop)
        recipes.start("transfer", options, tmp_path / "run")
    finished = {run: (tmp_path / "run" / run / "last.safetensors") for run in RUNS}
    before = {run: file.read_bytes() for run, file in finished.items() if file.exists()}
    assert 2 <= len(before) < len(RUNS)
    recipes.resume(tmp_path / "run")
    done = list(before)[:-1]
    assert all(finished[run].read_bytes() == before[run] for run in done) and all(f.exists() for f in finished.values())

    source, tuned, scratch = (load_checkpoint(finished[run]) for run in ("source", "fine-tuned-1", "scratch-1"))
    assert tuned.tensors["model.conv1.weight"].equal(source.tensors["model.conv1.weight"])  # frozen
    assert not scratch.tensors["model.conv1.weight"].equal(source.tensors["model.conv1.weight"])
    for name in ("per_class", "seed", "lr", "epochs"):
        assert tuned.meta["config"][name] == scratch.meta["config"][name]

    own, first = (load_checkpoint(tmp_path / "run" / path) for path in (".", "fine-tuned-0/last.safetensors"))
    assert own.meta == first.meta and all(own.tensors[name].equal(tensor) for name, tensor in first.tensors.items())

    report = (tmp_path / "run" / "report.md").read_text()
    test = data.load(options.data).test
    for run in RUNS[1:]:
        accuracy = evaluate(load_classifier(finished[run]), test).accuracy
        assert f"{accuracy:.2%}" in report
    for picture in ("accuracies.png", "learning_curves.png", "source.png", "samples.png", "confusion_matrix.png"):
        assert f"]({picture})" in report
        with Image.open(tmp_path / "run" / picture) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 20


@pytest.fixture(scope="module")
def twins(small_data, tmp_path_factory, undrawn):
    """The folder of finished twins, and of each their trainings' histories by name."""
    options = replace(options_on(small_data), seeds=1, twin=True)
    with undrawn():
        out = recipes.start("transfer", options, tmp_path_factory.mktemp("twins") / "run")
    return out, {name: {run: history_of(out / name / run) for run in RUNS[:3]} for name in TWINS}


def history_of(folder):
    return [Run.Figures(**entry) for entry in load_checkpoint(folder).meta["history"]]


def test_twins_run_on_torchs_operators_and_on_cvfasts_and_learn_alike(twins):
    """From one seed: each training is the same after its first epoch but for rounding, and at the end within noise."""
    out, histories = twins
    for name, backend in TWINS.items():
        for run in RUNS[:3]:
            assert load_checkpoint(out / name / run).meta["config"]["backend"] == backend
    rows = [line.split(" | ") for line in (out / "report.md").read_text().splitlines() if line.endswith(" yes |")]
    for run in RUNS[:3]:
        assert histories["native"][run] != histories["cvfast"][run]
        found = gaps(histories["native"][run], histories["cvfast"][run], Run.NOISE)
        assert all(gap.is_noise and gap.first <= 1e-3 for gap in found), (run, found)
        for gap in found:
            row = next(row for row in rows if row[0] == f"| {run}: {gap.figure}")
            assert row[1:3] == [f"{gap.first:.2g}", f"{gap.last:.3g}"]
        assert (out / f"learning_curves_{run}.png").exists()
    judged = [row for row in rows if row[0].endswith(": test_accuracy")]
    assert [row[0] for row in judged] == [f"| {run}: test_accuracy" for run in RUNS[1:3]]
    test = data.load(load_checkpoint(out / "native" / RUNS[1]).meta["config"]["data"]).test
    for run, row in zip(RUNS[1:3], judged, strict=True):
        native, ours = (evaluate(load_classifier(out / name / run / "last.safetensors"), test) for name in TWINS)
        assert row[1:3] == ["", f"{abs(native.accuracy - ours.accuracy):.3g}"]


@pytest.mark.parametrize("run", RUNS[:3])
def test_twins_of_which_one_training_differs_are_told(run, twins, options, tmp_path, undrawn):
    out, histories = twins
    results = {
        name: {
            training: TrainResult(options, out / name / training, history, 1, True, Run.NOISE)
            for training, history in trainings.items()
        }
        for name, trainings in histories.items()
    }
    worse = [replace(entry, train_loss=entry.train_loss + 0.2) for entry in histories["cvfast"][run]]
    results["cvfast"][run] = replace(results["cvfast"][run], history=worse)
    with undrawn():
        lines = compare(options, results, tmp_path)
    assert [line.split(": ")[:2] for line in lines if "MORE THAN NOISE" in line] == [[run, "train_loss"]]
    told = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.endswith(" NO |")]
    assert len(told) == 1 and told[0].startswith(f"| {run}: train_loss |")


def test_means_of_few_images_are_noisy(small_data):
    few = Run(TrainConfig(data=small_data), torch.device("cpu"), None)
    images = torch.zeros(2000, dtype=torch.int64)
    few.train_data, few.validation_data = few.train_data.subset(images[:450]), few.validation_data.subset(images[:50])
    assert few.noise == {"train_loss": pytest.approx(2 * (2 / 450) ** 0.5), "validation_accuracy": pytest.approx(0.2)}
    few.train_data, few.validation_data = few.train_data.subset(images), few.validation_data.subset(images)
    assert few.noise == Run.NOISE


def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="seeds must be positive, got 0"):
        Options(seeds=0)
    with pytest.raises(ValueError, match="per_class must be 2 or more"):
        Options(per_class=1)
    with pytest.raises(ValueError, match="unknown model 'lenet'"):
        Options(model="lenet")


def test_missing_data_is_missed_before_the_source_is_learned(options, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recipes.start("transfer", Options(data=str(tmp_path / "no" / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
