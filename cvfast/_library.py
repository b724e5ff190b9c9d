"""Loads cvfast's compiled libraries, once, and keeps the reason where one cannot be loaded.

Importing this module never raises because of a library: a missing file, a library built for another torch or Python,
or an unknown CVFAST_ISA leaves a sentence in `ops.reason`, `cuda.reason` or `module.reason`, which the backend `ext`
gives as its reason not to run and which `cvfast info` prints.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from cvfast import _env

FOLDER = Path(__file__).parent / "lib"
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Library:
    """A compiled library: loaded when `reason` is None, otherwise the reason why it is not."""

    name: str
    reason: str | None

    @property
    def loaded(self) -> bool:
        return self.reason is None


def torch_version() -> tuple[int, int]:
    """(major, minor) of the running torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def load(name: str) -> Library:
    """Loads lib/<name>.so into the process; its operators register themselves with torch's dispatcher."""
    path = FOLDER / f"{name}.so"
    if not path.is_file():
        return Library(name, f"{path.name} was not built; reinstall cvfast with a C++20 compiler (for CUDA: with nvcc)")
    if torch_version() < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Library(
            name, f"torch {torch.__version__} is older than {oldest}, the oldest that {path.name} works with"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return Library(name, f"{path.name} cannot be loaded with torch {torch.__version__}: {error.__cause__ or error}")
    return Library(name, None)


def load_module() -> tuple[ModuleType | None, Library]:
    """Imports cvfast._C (build information, instruction sets), which needs no torch, and applies CVFAST_ISA."""
    try:
        module = importlib.import_module("cvfast._C")
    except ImportError as error:
        return None, Library("_C", f"cvfast._C cannot be imported: {error}")
    if _env.isa is not None:
        try:
            module.set_isa(_env.isa)
        except ValueError as error:
            return None, Library("_C", f"CVFAST_ISA: {error}")
    return module, Library("_C", None)


C, module = load_module()
ops = load("libcvfast_ops") if module.loaded else Library("libcvfast_ops", module.reason)
cuda = load("libcvfast_cuda")
