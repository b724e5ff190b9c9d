"""Measured choices: the calls for which torch's own operator was faster on this machine.

`cvfast.tune` measures and writes them; `cvfast.backend` asks. A call's key is its operator with the shapes, dtypes and
layouts of its tensors and its options. Without gradients only: a forward pass alone is what was measured.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cvfast import _env, _library

FORMAT = "cvfast-choices-1"
NAME = "choices.json"


@dataclass(frozen=True)
class Choice:
    """Seconds of one call, the least of several, on the backend that `auto` would take and on torch's operator.

    pays: whether the model that it was measured in was faster, too: layers that torch runs cannot run in one call with
    their neighbours.
    """

    backend: str
    seconds: float
    torch_seconds: float
    pays: bool = True

    @property
    def torch_wins(self) -> bool:
        return self.pays and self.torch_seconds < self.seconds


Table = dict[tuple, Choice]  # by `key`

# Where torch wins: operator and shape of the first tensor, a key that costs little -> the calls that have it.
torchs: dict[tuple, Table] = {}
origin = "none measured"  # of the choices, in words


def clear() -> None:
    """Forgets what was loaded."""
    torchs.clear()


@contextmanager
def ignored() -> Iterator[None]:
    """Within the block no measurement decides."""
    global torchs
    before, torchs = torchs, {}
    try:
        yield
    finally:
        torchs = before


@contextmanager
def also(choices: Table) -> Iterator[None]:
    """Within the block these measurements decide, beside those that did before."""
    global torchs
    before, torchs = torchs, {kind: dict(calls) for kind, calls in torchs.items()}
    _take(choices)
    try:
        yield
    finally:
        torchs = before


def _take(choices: Table) -> None:
    for call, choice in choices.items():
        kind = call[0], _first_shape(call)
        calls = torchs.pop(kind, {})
        calls.pop(call, None)
        if choice.torch_wins:
            calls[call] = choice
        if calls:
            torchs[kind] = calls


def _first_shape(part: tuple) -> tuple | None:
    """The shape of the first tensor in a key."""
    if part and isinstance(part[0], torch.dtype):
        return part[2:]
    return next((shape for p in part if isinstance(p, tuple) and (shape := _first_shape(p)) is not None), None)


def key(operator: str, args: tuple) -> tuple:
    """What a call's time hangs on, hashable: normalised arguments as cvfast.backend.select takes them."""
    return (operator, *[_part(arg) for arg in args])


def _part(arg):
    if isinstance(arg, Tensor):
        return (arg.dtype, arg.is_contiguous(), *arg.shape)
    if isinstance(arg, (tuple, list)):
        return tuple([_part(a) for a in arg])
    if hasattr(arg, "__dataclass_fields__"):
        return tuple([_part(getattr(arg, name)) for name in arg.__dataclass_fields__])
    return arg


def prefers_torch(operator: str, args: tuple) -> Choice | None:
    """The measurement that speaks for torch's operator, if there is one for this call."""
    if (
        torch.is_grad_enabled() or torch.compiler.is_exporting()
    ):  # an export is for all shapes; so is torch 2.11's compile
        return None
    first = args[0] if isinstance(args[0], Tensor) else args[1] if isinstance(args[0], str) else args[0].input
    if torch.compiler.is_compiling():  # which has loaded this module
        shapes = torch.fx.experimental.symbolic_shapes
        if not all([shapes.has_static_value(size) for size in first.shape]):
            return None  # looking it up would fix a size that torch.compile leaves open
    candidates = torchs.get((operator, tuple(first.shape)))
    return candidates.get(key(operator, args)) if candidates else None


def default_file() -> Path:
    """Where choices are kept for this user: in CVFAST_CACHE."""
    return _env.cache / NAME


def machine() -> str:
    """What measurements hold for: the processor, the kernels' instruction set and torch's threads."""
    isa = "none" if _library.C is None else _library.C.active_isa()
    return f"{_processor()}, {isa}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load(file: Path) -> int:
    """Takes the choices in `file` into the table; how many.

    Raises FileNotFoundError, or ValueError if it is no such file or was measured on another machine.
    """
    global origin
    choices, where = read(file)
    if where != machine():
        raise ValueError(f"{file} was measured on another machine ({where}; this is {machine()})")
    _take(choices)
    origin = f"{len(choices)} calls measured, in {file}"
    return len(choices)


def read(file: Path) -> tuple[Table, str]:
    """The choices in `file`, and the machine they were measured on; raises as `load`."""
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        return {_decoded(entry["call"]): Choice(**entry["choice"]) for entry in content["choices"]}, content["machine"]
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{file} holds no choices of cvfast: {error}") from error


def write(file: Path, choices: Table) -> None:
    """Adds `choices` to those that `file` has of this machine; it is replaced as a whole."""
    try:
        before, where = read(file)
    except (FileNotFoundError, ValueError):
        before, where = {}, None
    merged = {**(before if where == machine() else {}), **choices}
    entries = [{"call": _encoded(call), "choice": vars(choice)} for call, choice in merged.items()]
    content = {"format": FORMAT, "machine": machine(), "choices": entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        json.dump(content, temporary)
    os.replace(temporary.name, file)


def _encoded(part):
    """A key in JSON's types."""
    if isinstance(part, tuple):
        return [_encoded(p) for p in part]
    return str(part) if isinstance(part, torch.dtype) else part


def _decoded(part):
    if isinstance(part, list):
        return tuple([_decoded(p) for p in part])
    if isinstance(part, str) and part.startswith("torch."):
        return getattr(torch, part.removeprefix("torch."))
    return part


def _load_default() -> None:
    """What lies in the user's cache; a file that does not fit is no reason to fail, and `cvfast info` says it."""
    global origin
    try:
        load(default_file())
    except FileNotFoundError:
        pass
    except ValueError as error:
        origin = f"not used: {error}"


_load_default()
