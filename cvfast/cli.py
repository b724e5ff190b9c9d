"""The command `cvfast`: the engine for people who type. No logic lives here but options, words and exit codes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from enum import IntEnum
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, NamedTuple, get_type_hints

import torch
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

import cvfast
from cvfast import _peak, engine
from cvfast import backend as backends
from cvfast._choices import NAME as CHOICES
from cvfast._choices import default_file
from cvfast.data import DataSplits
from cvfast.engine import recipes
from cvfast.engine.checkpoint import CheckpointError, load_checkpoint, replace_file
from cvfast.engine.export import FORMATS
from cvfast.engine.run import load_data
from cvfast.engine.train import choose_device
from cvfast.engine.transfer import load_weights
from cvfast.models import create_model, example_inputs, list_models

CLASSIFIERS = list_models(task="classification")
BACKEND = backends.current()  # CVFAST_BACKEND is the default of --backend

HELP = """Trains, judges and deploys vision models with cvfast's kernels.

Start with `cvfast demo`. Then: `cvfast train --data FOLDER` (or another recipe, `cvfast train RECIPE`),
`cvfast eval --checkpoint runs/cnn`, `cvfast predict --checkpoint runs/cnn IMAGE...`,
`cvfast export --checkpoint runs/cnn`.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 file not found; 4 bad data (a damaged image, classes that do not
fit); 5 bad checkpoint; 6 disk full; 130 interrupted.
"""


class ExitCode(IntEnum):
    """What the command tells the shell."""

    FAILED = 1
    USAGE = 2
    MISSING = 3
    DATA = 4
    CHECKPOINT = 5
    DISK_FULL = 6
    INTERRUPTED = 130


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with one line and an exit code where an error is the user's or the machine's, not cvfast's."""
    try:
        yield
    except (typer.Exit, typer.Abort):  # both are RuntimeErrors
        raise
    except KeyboardInterrupt as error:
        _fail(ExitCode.INTERRUPTED, f"interrupted: {error}" if str(error) else "interrupted")
    except CheckpointError as error:
        _fail(ExitCode.CHECKPOINT, error)
    except FileNotFoundError as error:
        _fail(ExitCode.MISSING, error)
    except FileExistsError as error:
        _fail(ExitCode.USAGE, error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _fail(ExitCode.DISK_FULL if full else ExitCode.FAILED, f"the disk is full: {error}" if full else error)
    except ValueError as error:
        _fail(ExitCode.DATA, error)
    except (ImportError, RuntimeError, FloatingPointError) as error:
        _fail(ExitCode.FAILED, error)


def _fail(code: ExitCode, message: object) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


class _Commands(TyperGroup):
    def invoke(self, ctx):
        with user_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)

CheckpointOption = Annotated[
    Path, typer.Option(help="A checkpoint, or the folder of a run, whose best epoch is taken.", show_default=False)
]
BackendOption = Annotated[
    str, typer.Option(help=f"Who computes: {', '.join(backends.NAMES)}.", rich_help_panel="Machine")
]
DeviceOption = Annotated[
    str, typer.Option(help="auto (CUDA where there is one), cpu, cuda.", rich_help_panel="Machine")
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads; default: as many as torch takes.", rich_help_panel="Machine")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of both trainings.")] = 0,
    threads: ThreadsOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Train for 2 epochs only; promises less accuracy.")] = False,
) -> None:
    """The whole job in minutes: train on embedded images with torch and with cvfast, judge, export, report.

    Needs no network. Leaves a report with pictures; fails (exit code 1) if a promise of the report is not kept.
    """
    from cvfast.engine.demo import run_demo

    if not run_demo(out, seed=seed, threads=threads, quick=quick, console=Console()):
        raise typer.Exit(ExitCode.FAILED)


TRAIN_HELP = """Trains a model on a folder of images or a data set, and keeps the best epoch; or runs another recipe.

Ctrl-C leaves a checkpoint; `cvfast train --resume FOLDER` goes on from there, with the same result as without the
interruption, whatever the recipe. With several processes: `torchrun --nproc-per-node 2 -m cvfast train ...`

Other recipes have options of their own: `cvfast train RECIPE --help`.
"""
PANELS = {
    "Machine": ("backend", "device", "threads", "amp"),
    "Transfer learning": ("weights", "freeze", "unfreeze_every", "layer_decay", "per_class", "channels"),
}


def _train_command(recipe: str) -> Callable[..., None]:
    """The function of `cvfast train RECIPE`, with an option for each field of the recipe's Options."""
    cls = recipes.find(recipe).Options
    own = [field for field in fields(cls) if field.name != "out"]
    types, words = get_type_hints(cls), recipes.option_help(cls)
    words["model"] = f"One of: {', '.join(CLASSIFIERS)}."
    panels = {name: panel for panel, names in PANELS.items() for name in names}

    def command(ctx: typer.Context, **given) -> None:
        if ctx.invoked_subcommand is None:
            _train(ctx, recipe, [field.name for field in own])
        elif before := _given(ctx):
            raise typer.BadParameter(f"options of a recipe stand behind its name: {', '.join(before)}")

    def parameter(name: str, type: object, default: object, help: str) -> Parameter:
        option = typer.Option(help=help, rich_help_panel=panels.get(name))
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[type, option])

    command.__signature__ = Signature([
        Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(parameter(f.name, types[f.name], BACKEND if f.name == "backend" else f.default, words[f.name]) for f in own),
        parameter("out", Path | None, None, "Folder of the run; default: the first free of runs/NAME, runs/NAME-2, … "
                                            "by the name of the model or recipe."),
        parameter("resume", Path | None, None, "Continue the run in this folder with its own settings; goes with no "
                                               "other option."),
    ])  # fmt: skip
    command.__annotations__ = {name: p.annotation for name, p in command.__signature__.parameters.items()}
    return command


def _train(ctx: typer.Context, recipe: str, names: list[str]) -> None:
    """Runs ``recipe`` with the command's options of these names, or resumes the run that the command names."""
    if ctx.params["resume"] is None:
        given = {name: ctx.params[name] for name in names}
        options = _usage(lambda: recipes.find(recipe).Options(**given))
        recipes.start(recipe, options, ctx.params["out"], Console())
    elif _given(ctx) == ["resume"]:
        recipes.resume(ctx.params["resume"], Console())
    else:
        raise typer.BadParameter("a resumed run keeps its settings: give no other option", param_hint="--resume")


def _given(ctx: typer.Context) -> list[str]:
    return [name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE"]


def train_commands() -> typer.Typer:
    """`cvfast train`, which is the recipe classification, and `cvfast train RECIPE`."""
    commands = typer.Typer()
    commands.callback(invoke_without_command=True, help=TRAIN_HELP)(_train_command("classification"))
    for recipe in recipes.RECIPES:
        words = recipes.find(recipe).__doc__.splitlines()[0]
        commands.command(recipe, help=words)(_train_command(recipe))
    return commands


app.add_typer(train_commands(), name="train")


@app.command("eval")
def evaluate(
    checkpoint: CheckpointOption,
    data: Annotated[str | None, typer.Option(help="Data set; its test part is judged. Default: the run's own.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    backend: BackendOption = BACKEND,
    device: DeviceOption = "auto",
) -> None:
    """Judges a checkpoint on test images: accuracy, and precision, recall and F1 of each class."""
    classifier = engine.load_classifier(checkpoint).to(choose_device(device))
    test = _run_data(checkpoint, data).test
    with cvfast.use_backend(_usage(lambda: backends.checked_name(backend))):
        evaluation = engine.evaluate(classifier, test)
    Console().print(evaluation.table())
    if json_file is not None:
        replace_file(json_file, json.dumps(evaluation.to_dict(), indent=2).encode())


@app.command()
def predict(
    checkpoint: CheckpointOption,
    images: Annotated[list[Path], typer.Argument(help="Image files, of any size.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show per image.")] = 3,
    backend: BackendOption = BACKEND,
) -> None:
    """Names what image files show, with the probability of each of the likeliest classes."""
    with cvfast.use_backend(_usage(lambda: backends.checked_name(backend))):
        predictions = engine.predict(checkpoint, images, top)
    for prediction in predictions:
        classes = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction.top)
        typer.echo(f"{prediction.file}: {classes}")


@app.command()
def export(
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint of any recipe, or the folder of a run, whose "
                                                         "best epoch is taken.")] = None,
    model: Annotated[str | None, typer.Option(help=f"Or a model by name: {', '.join(list_models())}.")] = None,
    weights: Annotated[Path | None, typer.Option(help="With --model: a .safetensors or .pth file. Default: random "
                                                      "weights.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="With --model: classes; default: the model's own.")] = None,
    format: Annotated[str, typer.Option(help=f"One of: {', '.join(FORMATS)}.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="File to write; default: model.onnx or model.pt2 beside the "
                                                  "checkpoint, or one of the model's name.")] = None,
    check: Annotated[bool, typer.Option(help="Compare the file with the model, a classifier's on the test images, "
                                             "others on random inputs.")] = True,
    data: Annotated[str | None, typer.Option(help="Data set for a classifier's check. Default: the run's own.")] = None,
) -> None:  # fmt: skip
    """Writes a model for use elsewhere: ONNX (standard operators only) or torch.export.

    From a checkpoint, the file takes uint8 images [N, C, H, W] of the data set's size and prepares them itself. A
    classifier's returns logits and carries the class names; of the other recipes it is the generator (which takes
    random numbers), the captioner (which carries its vocabulary) or the upscaler. A model by name takes what it takes.
    """
    if format not in FORMATS:
        raise typer.BadParameter(f"{format!r}; choose one of {', '.join(FORMATS)}", param_hint="--format")
    if (checkpoint is None) == (model is None):
        raise typer.BadParameter("give one of the two", param_hint="--checkpoint or --model")
    if model is None and not (weights is None and num_classes is None):
        raise typer.BadParameter("they go with --model only", param_hint="--weights, --num-classes")
    if data is not None and model is not None:
        raise _data_goes_with_classifiers()
    what = _export_of_run(checkpoint, data, check) if model is None else _export_of_model(model, weights, num_classes)
    if out is None:
        folder = Path() if checkpoint is None else checkpoint if checkpoint.is_dir() else checkpoint.parent
        out = folder / f"{model or 'model'}{FORMATS[format]}"
    what.write(out, format)
    typer.echo(f"wrote {out}{what.weights}: {engine.signature(out)}")
    if check:
        result = what.check(out)
        typer.echo(f"checked: {result}")
        if not result.passed:
            raise RuntimeError(f"{out} does not compute what {model or 'the checkpoint'} computes")


class _Export(NamedTuple):
    """How it is written to a file in a format, how that file is checked, and where its weights are from, in words."""

    write: Callable[[Path, str], object]
    check: Callable[[Path], engine.ExportCheck | engine.NetworkCheck]
    weights: str = ""


def _export_of_model(model: str, weights: Path | None, num_classes: int | None) -> _Export:
    options = {} if num_classes is None else {"num_classes": num_classes}
    network, words = _usage(lambda: create_model(model, **options)), " with random weights"
    if weights is not None:
        words = f" with {weights} ({load_weights(network, weights)})"
    return _export_of_network(network, example_inputs(model, 3, **options), {}, words)


def _export_of_run(checkpoint: Path, data: str | None, check: bool) -> _Export:
    if "networks" in load_checkpoint(checkpoint).meta:
        if data is not None:
            raise _data_goes_with_classifiers()
        return _export_of_network(*engine.load_deployable(checkpoint, 3))
    classifier = engine.load_classifier(checkpoint)
    test = _run_data(checkpoint, data).test if check else None
    return _Export(partial(engine.export, classifier), lambda out: engine.check_export(out, classifier, test))


def _export_of_network(
    network: torch.nn.Module, inputs: dict[str, torch.Tensor], metadata: dict[str, str], weights: str = ""
) -> _Export:
    write = partial(engine.export_network, network, inputs, metadata=metadata)
    return _Export(write, lambda out: engine.check_network(out, network, inputs), weights)


def _data_goes_with_classifiers() -> typer.BadParameter:
    return typer.BadParameter("goes with a classifier's --checkpoint only", param_hint="--data")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(ctx: typer.Context) -> None:
    """Measures the kernels; in a clone of cvfast's repository. Options go to the benchmark runner.

    `cvfast bench --peak` works anywhere: it measures what one core of this machine does at most.
    """
    if ctx.args == ["--peak"]:
        Console().print(_peak.table(_peak.measure()))
        return
    if not Path("benchmarks/run.py").is_file():
        raise FileNotFoundError("no benchmarks/run.py here: run cvfast bench in a clone of cvfast's repository")
    raise typer.Exit(subprocess.run([sys.executable, "-m", "benchmarks.run", *ctx.args], check=False).returncode)


ModelOption = Annotated[
    str, typer.Option(help=f"A checkpoint, the folder of a run, or one of: {', '.join(list_models())}.",
                      show_default=False)
]  # fmt: skip


@app.command()
def explain(
    model: ModelOption,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    fuse: Annotated[bool, typer.Option(help="Run chains of layers as one.")] = True,
    backend: BackendOption = BACKEND,
    threads: ThreadsOption = None,
) -> None:
    """Shows layer by layer who computes, why, and how long it takes beside torch's operators."""
    network, inputs = _network(model, batch, threads)
    with cvfast.use_backend(_usage(lambda: backends.checked_name(backend))):
        explanation = cvfast.explain(cvfast.accelerate(network, fuse=fuse), *inputs)
    Console(width=None if sys.stdout.isatty() else 200).print(explanation)


@app.command()
def tune(
    model: ModelOption,
    batch: Annotated[list[int], typer.Option(min=1, help="Images per call; may be given several times.")] = [1],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="File of the choices; default: choices.json beside the checkpoint, "
                                                  "or in CVFAST_CACHE.")] = None,
    threads: ThreadsOption = None,
) -> None:  # fmt: skip
    """Measures each layer on cvfast and on torch, and keeps which was faster for this machine.

    What is kept beside a checkpoint counts when that checkpoint is loaded, what is in CVFAST_CACHE always.
    """
    path = Path(model)
    if out is None and path.exists():
        out = (path if path.is_dir() else path.parent) / CHOICES
    for images in batch:
        network, inputs = _network(model, images, threads)
        slower = cvfast.tune(cvfast.accelerate(network, fuse=True), *inputs, file=out)
        typer.echo(f"{model}, {images} per call: torch's operator is faster for {slower} of the calls")
    typer.echo(f"kept in {out or default_file()}")


@app.command()
def info() -> None:
    """Says what this installation can do, what it can't, and why."""
    cvfast.info()


def _usage(make):
    """What ``make`` returns; its ValueError or TypeError becomes a usage error (exit code 2)."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def _network(model: str, batch: int, threads: int | None) -> tuple[torch.nn.Module, Sequence[torch.Tensor]]:
    """A model of the zoo (with fresh weights) or of a checkpoint, in eval mode, and inputs for it."""
    if threads is not None:
        torch.set_num_threads(threads)
    if model in list_models():
        return create_model(model).eval(), tuple(example_inputs(model, batch).values())
    path = Path(model)
    if not path.exists():
        raise typer.BadParameter(f"{model!r} is neither a checkpoint nor one of {', '.join(list_models())}",
                                 param_hint="--model")  # fmt: skip
    classifier = engine.load_classifier(path)
    return classifier, [torch.randint(256, (batch, *classifier.image_shape), dtype=torch.uint8)]


def _run_data(checkpoint: Path, data: str | None = None) -> DataSplits:
    """The data set called ``data``, or the one that the checkpoint's run was trained on."""
    meta = load_checkpoint(checkpoint).meta
    height, width = meta["classifier"]["image_shape"][1:]
    return load_data(data or meta["config"]["data"], (height, width))


if __name__ == "__main__":
    app()
