"""The registry of recipes: how one is started, resumed, and becomes a command."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
import typer
from typer.testing import CliRunner

from cvfast import cli
from cvfast.engine import CheckpointError, TrainConfig, recipes, train


@dataclasses.dataclass(frozen=True)
class Base:
    """What all have.

    Attributes:
        seed: of the random
            numbers.
    """

    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Options(Base):
    """Settings.

    Attributes:
        steps: to take; ``3`` by default.
        bound: largest, or None.
        fast: whether to hurry.
        out: not an option.

    Not a field: at all.
    """

    steps: int = 3
    bound: float | None = None
    fast: bool = False
    out: str | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")


@pytest.fixture
def counting(monkeypatch):
    """A recipe that counts to ``steps`` in a file, and is interrupted at 2 when it gets there."""
    module = types.ModuleType("cvfast.engine.recipes.counting", "Counts.\n\nMore words.")
    calls = []

    def run(options, out, console):
        calls.append(options)
        state = out / "state"
        while (count := int(state.read_text()) if state.exists() else 0) < options.steps:
            state.write_text(str(count + 1))
            if count + 1 == 2:
                raise KeyboardInterrupt("stopped at 2")

    module.Options, module.run, module.calls = Options, run, calls
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(recipes, "RECIPES", (*recipes.RECIPES, "counting"))
    return module


def test_options_are_described_by_their_docstrings():
    assert recipes.option_help(Options) == {
        "seed": "of the random numbers.",
        "steps": "to take; 3 by default.",
        "bound": "largest, or None.",
        "fast": "whether to hurry.",
        "out": "not an option.",
    }


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_keeps_to_the_interface(name):
    module = recipes.find(name)
    assert module.__doc__ and callable(module.run)
    fields = dataclasses.fields(module.Options)
    assert {field.name for field in fields} <= set(recipes.option_help(module.Options))
    content = json.loads(json.dumps(dataclasses.asdict(module.Options())))
    assert module.Options(**content) == module.Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(module.Options(), fields[0].name, None)


def test_importing_all_recipes_stays_light():
    """`cvfast` imports them for every command."""
    heavy = {"matplotlib", "onnx", "onnxscript", "onnxruntime", "torchmetrics", "PIL", "tensorboard"}
    code = f"import sys, cvfast.cli; print(sorted({heavy!r} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_a_run_is_resumed_with_its_own_options(counting, tmp_path):
    options = Options(steps=4, bound=0.5)
    with pytest.raises(KeyboardInterrupt):
        recipes.start("counting", options, tmp_path / "run")
    assert recipes.resume(tmp_path / "run") == tmp_path / "run"
    assert (tmp_path / "run" / "state").read_text() == "4" and counting.calls == [options, options]
    with pytest.raises(FileExistsError, match="holds a run already"):
        recipes.start("counting", options, tmp_path / "run")


def test_folders_have_the_recipes_name_or_the_models(counting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [recipes.start("counting", Options(steps=1)) for _ in range(2)]
    assert [str(folder) for folder in folders] == ["runs/counting", "runs/counting-2"]
    monkeypatch.setattr(recipes.find("classification"), "run", lambda options, out, console: None)
    assert str(recipes.start("classification", TrainConfig())) == "runs/cnn"


def test_a_recipe_that_fails_at_once_leaves_nothing(counting, tmp_path, monkeypatch):
    def fail(options, out, console):
        raise FileNotFoundError("no data")

    monkeypatch.setattr(counting, "run", fail)
    with pytest.raises(FileNotFoundError):
        recipes.start("counting", Options(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_resumed_is_said(counting, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        recipes.resume(tmp_path)
    for content in ("{", '{"recipe": "nothing", "options": {}}', '{"recipe": "counting", "options": {"step": 1}}'):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(CheckpointError, match="recipe.json does not describe a run"):
            recipes.resume(tmp_path)
    with pytest.raises(ValueError, match="unknown recipe 'lenet'; choose one of classification"):
        recipes.start("lenet", Options())


def test_a_recipe_becomes_a_command(counting, tmp_path, monkeypatch):
    app = typer.Typer(cls=cli._Commands)
    app.add_typer(cli.train_commands(), name="train")
    app.command("other")(lambda: None)  # a Typer with one command has no group

    def call(*arguments):
        result = CliRunner().invoke(app, ["train", *map(str, arguments)])
        return result.exit_code, " ".join(result.output.replace("│", " ").split())

    code, words = call("counting", "--help")
    assert code == 0 and "Counts." in words and "of the random numbers" in words and "--no-fast" in words
    assert call("counting", "--steps", 1, "--bound", 0.5, "--fast", "--out", tmp_path / "run")[0] == 0
    assert counting.calls == [Options(steps=1, bound=0.5, fast=True)]
    assert call("counting", "--out", tmp_path / "long")[0] == 130
    assert call("--resume", tmp_path / "long")[0] == 0  # whatever the recipe
    assert call("counting", "--resume", tmp_path / "long")[0] == 0
    for arguments, message in {
        ("counting", "--steps", 0): "steps must be positive, got 0",
        ("--epochs", 3, "counting"): "behind its name: epochs",
        ("counting", "--resume", "x", "--seed", 1): "give no other option",
        ("lenet",): "lenet",
    }.items():
        code, words = call(*arguments)
        assert code == 2 and message in words


def test_classification_reports_and_goes_on_with_runs_of_the_python_interface(settings, tmp_path):
    folder = tmp_path / "run"
    train(settings(epochs=1))
    recipes.resume(folder)
    report = (folder / "report.md").read_text()
    for picture in ("learning_curves.png", "confusion_matrix.png", "samples.png"):
        assert f"]({picture})" in report and (folder / picture).stat().st_size > 10_000
    assert "Test accuracy" in report and "| epochs | 1 |" in report
