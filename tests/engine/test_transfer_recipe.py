"""The recipe transfer: its trainings, their resumption, and what its report says."""

from dataclasses import replace

import pytest
from PIL import Image

from cvfast import data
from cvfast.engine import evaluate, load_classifier, recipes
from cvfast.engine.checkpoint import load_checkpoint
from cvfast.engine.recipes.transfer import Options
from cvfast.engine.run import Run

RUNS = ("source", "scratch-0", "fine-tuned-0", "scratch-1", "fine-tuned-1")


@pytest.fixture
def options(small_data):
    return Options(data=small_data, source=small_data, model="cnn", per_class=6, epochs=2, source_epochs=1, seeds=2,
                   lr=0.01, source_lr=0.01, threads=1, freeze="conv1")  # fmt: skip


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

    report = (tmp_path / "run" / "report.md").read_text()
    test = data.load(options.data).test
    for run in RUNS[1:]:
        accuracy = evaluate(load_classifier(finished[run]), test).accuracy
        assert f"{accuracy:.2%}" in report
    for picture in ("accuracies.png", "learning_curves.png", "source.png", "samples.png", "confusion_matrix.png"):
        assert f"]({picture})" in report
        with Image.open(tmp_path / "run" / picture) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 20


def test_twins_run_on_torchs_operators_and_on_cvfasts(options, tmp_path):
    recipes.start("transfer", replace(options, epochs=1, seeds=1, twin=True), tmp_path / "run")
    for name, backend in {"native": "native", "cvfast": "auto"}.items():
        assert load_checkpoint(tmp_path / "run" / name / "fine-tuned-0").meta["config"]["backend"] == backend
    assert "within noise" in (tmp_path / "run" / "report.md").read_text()


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
