"""What is there, what is not, and why: the text of `cvfast info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

from cvfast import _choices, _env, _library, backend


def info() -> None:
    """Prints versions, compiled libraries, instruction sets and backends, each with the reason where it is missing."""
    width = max(len(name) for name, _ in facts())
    for name, value in facts():
        print(f"{name:<{width}}  {value}")


def facts() -> list[tuple[str, str]]:
    """(name, value) pairs, in the order in which they are printed."""
    from cvfast import __version__

    return [
        ("cvfast", __version__),
        ("python", platform.python_version()),
        (
            "torch",
            f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'not built in'}",
        ),
        *_build_facts(),
        ("CPU operators", _state(_library.ops)),
        ("CUDA operators", _state(_library.cuda)),
        ("GPU", _gpu()),
        ("triton", _triton()),
        ("backend", f"{backend.current()} (of {', '.join(backend.NAMES)})"),
        ("choices", _choices.origin),
        *((variable.name, str(variable.read())) for variable in _env.RUN_VARIABLES.values()),
    ]


def _state(library: _library.Library) -> str:
    return "loaded" if library.loaded else f"missing: {library.reason}"


def _build_facts() -> list[tuple[str, str]]:
    if _library.C is None:
        return [("cvfast._C", _state(_library.module))]
    build = _library.C.build_info
    compiled, available = _library.C.compiled_isas(), _library.C.available_isas()
    return [
        ("built with", f"{build['compiler']}, torch {build['torch']}, CUDA: {build['cuda']}"),
        (
            "instruction set",
            f"{_library.C.active_isa()} (runs here: {', '.join(available)}; built: {', '.join(compiled)})",
        ),
    ]


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "missing: pip install triton"
    return f"{importlib.metadata.version('triton')}{', interpreted' if _env.triton_interpret else ''}"
