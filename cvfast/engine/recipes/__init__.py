"""Training recipes: what `cvfast train RECIPE` runs.

A recipe is a module of this package, named in ``RECIPES``, with

    a docstring     its first line is the command's help;
    Options         a frozen dataclass of JSON types (bool, int, float, str, or one of these or None), all with
                    defaults. Its fields are the command's options (``out`` is not: every recipe has ``--out``), the
                    section "Attributes:" of its docstring, or of a base class's, their help. ``__post_init__`` raises
                    ValueError for what cannot be. The defaults train in 10 minutes on two cores;
    run             run(options, out, console) -> None: trains in the folder ``out``, and leaves its checkpoints, a
                    report (report.md, report.html) and its pictures there. Where ``out`` holds the checkpoints of an
                    earlier call with the same options, it goes on from them: so an interrupted run is resumed. Ctrl-C
                    leaves a checkpoint and raises KeyboardInterrupt. ``console`` is None where nothing shall be shown:
                    to a silent caller, and in all processes but the first.

Modules are imported to list their options, so what is slow to import (matplotlib) is imported in functions.

`start` makes the folder and keeps name and options in its ``recipe.json``; `resume` reads them there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cvfast.engine import distributed
from cvfast.engine.checkpoint import CheckpointError, checkpoint_file, replace_file
from cvfast.engine.train import choose_device

if TYPE_CHECKING:
    from rich.console import Console

RECIPES = ("classification", "transfer", "gan", "sequence", "caption", "superres")
RECIPE_FILE = "recipe.json"


def find(name: str) -> ModuleType:
    """The module of the recipe called ``name``; ValueError if there is none."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return import_module(f"{__name__}.{name}")


def option_help(options: type) -> dict[str, str]:
    """What the docstrings of the dataclass ``options`` and of its bases say of each attribute, by name."""
    words: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        section = cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].split("\n\n")[0]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.M):
            words[name] = re.sub(r"``|:\w+:", "", " ".join(text.split()))
    return words


def start(name: str, options: Any, out: str | Path | None = None, console: Console | None = None) -> Path:
    """Runs the recipe called ``name`` from its beginning.

    Args:
        options: an instance of the recipe's ``Options``.
        out: folder of the run; None takes the first free of runs/<name>, runs/<name>-2, ... where the name is that of
            the options if they have one (a classification's is its model's), else the recipe's.
        console: where to show progress; None is silent.

    Returns:
        The folder.

    Raises:
        FileExistsError: if ``out`` holds a run already.
        KeyboardInterrupt: after Ctrl-C; `resume` goes on.
        ValueError: if ``name`` is unknown; besides, whatever the recipe raises.
    """
    recipe = find(name)

    def make_folder() -> Path:
        folder = _new_folder(out, getattr(options, "name", name))
        content = {"recipe": name, "options": asdict(options)}
        replace_file(folder / RECIPE_FILE, json.dumps(content, indent=2).encode())
        return folder

    return _run(recipe, options, make_folder, console)


def resume(folder: str | Path, console: Console | None = None) -> Path:
    """Goes on with the interrupted run in ``folder``, with its own recipe and options; returns ``folder``.

    A folder without a ``recipe.json``, as `cvfast.engine.train` leaves it, holds a classification.

    Raises:
        FileNotFoundError: if ``folder`` holds no run.
        CheckpointError: if what is there is damaged; besides, whatever the recipe raises.
    """
    folder = Path(folder)
    file = folder / RECIPE_FILE
    if file.is_file():
        try:
            content = json.loads(file.read_text())
            recipe = find(content["recipe"])
            options = recipe.Options(**content["options"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} does not describe a run that can be resumed: {error}") from error
    else:
        checkpoint_file(folder, "last")
        recipe = find("classification")
        options = recipe.Options()  # the checkpoint knows its own
    return _run(recipe, options, lambda: folder, console)


def _run(recipe: ModuleType, options: Any, make_folder: Callable[[], Path], console: Console | None) -> Path:
    with distributed.process_group(choose_device(getattr(options, "device", "cpu"))):
        folder = distributed.from_first(make_folder)
        try:
            recipe.run(options, folder, console if distributed.rank() == 0 else None)
        except BaseException:
            if distributed.rank() == 0:
                _remove_if_unused(folder)
            raise
    return folder


def _remove_if_unused(folder: Path) -> None:
    if [file.name for file in folder.iterdir()] == [RECIPE_FILE]:
        (folder / RECIPE_FILE).unlink()
        folder.rmdir()


def _new_folder(out: str | Path | None, name: str) -> Path:
    if out is None:
        folder, number = Path("runs") / name, 1
        while folder.exists():
            number += 1
            folder = Path("runs") / f"{name}-{number}"
    else:
        folder = Path(out)
        if (folder / RECIPE_FILE).exists() or (folder / "last.safetensors").exists():
            raise FileExistsError(f"{folder} holds a run already: resume it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
