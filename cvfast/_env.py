"""Every environment variable cvfast knows, typed and documented. Nothing else in the package reads os.environ.

Values are read once, at import; no call of an operator reads the environment. No text of a run variable makes the
import fail: a wrong name raises where it is used. `table()` is the table that
stands in docs/environment.md. This module imports the standard library only, because setup.py
loads it by path to read the build variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """One environment variable: what it is called, how its text becomes a value, and what it does."""

    name: str
    parse: Callable[[str], object]
    default: object
    help: str

    def read(self) -> object:
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ValueError(f"{self.name}={text!r}: {error}") from None


def one_of(*allowed: str) -> Callable[[str], str]:
    """A parser that takes one of the given words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return parse


def cuda_archs(text: str) -> str:
    """A parser for CUDA architectures as CMake takes them: "80;90" or "80,90"."""
    archs = text.replace(",", ";")
    if not all(part[:2].isdigit() for part in archs.split(";")):
        raise ValueError("expected compute capabilities without a dot, such as 80;90")
    return archs


def positive(text: str) -> int:
    """A parser for whole numbers from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise ValueError("expected a whole number >= 1")
    return int(text)


RUN_VARIABLES = {
    "backend": Variable(
        "CVFAST_BACKEND", str, "auto",
        "backend of every operator: auto (the first able one), ext, triton or native; one that cannot run raises",
    ),
    "isa": Variable(
        "CVFAST_ISA", str, None,
        "instruction set of the CPU kernels (`cvfast info` lists those this machine runs); default: the best",
    ),
    "triton_interpret": Variable(
        "TRITON_INTERPRET", "1".__eq__, False,
        "1: Triton kernels run in Triton's interpreter, on CPU tensors as well (Triton's own variable)",
    ),
    "cache": Variable(
        "CVFAST_CACHE", Path, Path(os.path.expanduser("~/.cache/cvfast")),
        "folder for downloaded data and measured choices; nothing is written there before it is needed",
    ),
    "test_data": Variable(
        "CVFAST_TEST_DATA", Path, None,
        "tests only: a folder with cifar-10-batches-bin (or -py), for the tests on real CIFAR-10 images",
    ),
}  # fmt: skip

BUILD_VARIABLES = {
    "cuda": Variable(
        "CVFAST_CUDA", one_of("auto", "0", "1"), "auto",
        "build the CUDA part: auto (where nvcc is found), 0 (never), 1 (fail without nvcc)",
    ),
    "cuda_archs": Variable(
        "CVFAST_CUDA_ARCHS", cuda_archs, None,
        "CUDA architectures to build for, such as 80;90 (default: all that the toolkit and cvfast support)",
    ),
    "emulated512": Variable(
        "CVFAST_EMULATED512", one_of("0", "1"), "0",
        "1: build emulated512 in place of avx512: its kernels' logic made of AVX2's instructions, for tests",
    ),
    "max_jobs": Variable("MAX_JOBS", positive, None, "compilations at the same time (default: one per core)"),
}  # fmt: skip

backend: str = RUN_VARIABLES["backend"].read()
isa: str | None = RUN_VARIABLES["isa"].read()
triton_interpret: bool = RUN_VARIABLES["triton_interpret"].read()
cache: Path = RUN_VARIABLES["cache"].read()
test_data: Path | None = RUN_VARIABLES["test_data"].read()


def read_build() -> dict[str, object]:
    """The build variables' values; read when asked for, because only setup.py needs them."""
    return {key: variable.read() for key, variable in BUILD_VARIABLES.items()}


def table() -> str:
    """All variables as a Markdown table, without this user's home folder."""
    rows = ["| variable | read at | default | meaning |", "|---|---|---|---|"]
    for when, variables in (("run", RUN_VARIABLES), ("build", BUILD_VARIABLES)):
        for v in variables.values():
            rows.append(f"| `{v.name}` | {when} | {_text(v.default)} | {v.help} |")
    return "\n".join(rows)


def _text(default: object) -> str:
    if isinstance(default, Path):
        return f"`~/{default.relative_to(Path.home())}`"
    return "–" if default in (None, False) else f"`{default}`"
