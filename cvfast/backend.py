"""Chooses the backend of an operator's call.

A backend is a module `cvfast.backends.<backend>.<operator>` with three functions over the call's normalised
arguments: `why_not` (reasons why it cannot run them; empty: it can), `why_slower` (reasons why it should not be taken
although it can, each backed by a measurement or the lack of one) and `run`. The choice is plain Python over dtype,
device, shape and layout, so torch.compile traces through it; nothing is read from the environment or logged per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch.autograd import forward_ad

from cvfast import _choices, _env, _library, _packed
from cvfast.backends.ext import additive_attention as ext_additive_attention
from cvfast.backends.ext import attention as ext_attention
from cvfast.backends.ext import batch_norm as ext_batch_norm
from cvfast.backends.ext import conv2d as ext_conv2d
from cvfast.backends.ext import conv_transpose2d as ext_conv_transpose2d
from cvfast.backends.ext import gelu as ext_gelu
from cvfast.backends.ext import linear as ext_linear
from cvfast.backends.ext import recurrent as ext_recurrent
from cvfast.backends.ext import recurrent_cell as ext_recurrent_cell
from cvfast.backends.native import additive_attention as native_additive_attention
from cvfast.backends.native import attention as native_attention
from cvfast.backends.native import batch_norm as native_batch_norm
from cvfast.backends.native import conv2d as native_conv2d
from cvfast.backends.native import conv_transpose2d as native_conv_transpose2d
from cvfast.backends.native import gelu as native_gelu
from cvfast.backends.native import linear as native_linear
from cvfast.backends.native import recurrent as native_recurrent
from cvfast.backends.native import recurrent_cell as native_recurrent_cell
from cvfast.backends.triton import additive_attention as triton_additive_attention
from cvfast.backends.triton import attention as triton_attention
from cvfast.backends.triton import conv2d as triton_conv2d
from cvfast.backends.triton import conv_transpose2d as triton_conv_transpose2d
from cvfast.backends.triton import linear as triton_linear
from cvfast.backends.triton import recurrent as triton_recurrent

_RECURRENT = {"ext": ext_recurrent, "triton": triton_recurrent, "native": native_recurrent}
_RECURRENT_CELL = {"ext": ext_recurrent_cell, "triton": triton_recurrent, "native": native_recurrent_cell}
# Operator -> backend -> module, in the order in which `auto` asks them; `native` comes last and never refuses.
BACKENDS: dict[str, dict[str, ModuleType]] = {
    "additive_attention": {
        "ext": ext_additive_attention,
        "triton": triton_additive_attention,
        "native": native_additive_attention,
    },
    "attention": {"ext": ext_attention, "triton": triton_attention, "native": native_attention},
    "batch_norm": {"ext": ext_batch_norm, "native": native_batch_norm},
    "conv2d": {"ext": ext_conv2d, "triton": triton_conv2d, "native": native_conv2d},
    "conv_transpose2d": {
        "ext": ext_conv_transpose2d,
        "triton": triton_conv_transpose2d,
        "native": native_conv_transpose2d,
    },
    "gelu": {"ext": ext_gelu, "native": native_gelu},
    "linear": {"ext": ext_linear, "triton": triton_linear, "native": native_linear},
    **dict.fromkeys(("lstm", "gru", "rnn"), _RECURRENT),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_cell"), _RECURRENT_CELL),
}
NAMES = ("auto", "ext", "triton", "native")

_current = _env.backend


def current() -> str:
    """The backend in force where a call names none: "auto", "ext", "triton" or "native"."""
    return _current


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every cvfast operator runs on the backend `name`, in all threads of the process.

    `name`: "auto", "ext", "triton" or "native". A backend that cannot run a call raises RuntimeError with its reasons.
    Raises ValueError for another name.
    """
    global _current
    before, _current = _current, checked_name(name)
    try:
        yield
    finally:
        _current = before


PRECISIONS = ("fast", "strict")


def set_precision(name: str) -> None:
    """How the CPU kernels may compute, for the whole process.

    "fast" (the default): the fastest algorithm, Winograd's among them, whose relative L2 error stays below 4e-6 in
    float32 on normal data. "strict": only algorithms that form the sums of the definition itself.
    Raises ValueError for another name. Without compiled kernels there is nothing to choose.
    """
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; allowed: {', '.join(PRECISIONS)}")
    if _library.C is not None:
        _library.C.set_strict_precision(name == "strict")
        _packed.free()  # other algorithms take other forms


def checked_name(name: str) -> str:
    """`name`, or ValueError if no backend is called so."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; allowed: {', '.join(NAMES)}")
    return name


def select(operator: str, requested: str | None, *args) -> ModuleType:
    """The backend module that runs `operator` on these normalised arguments.

    `requested`: the name given with the call, or None for the one in force.
    Raises RuntimeError with all reasons if the named backend cannot run them, ValueError if there is no such backend.
    """
    name = _current if requested is None else requested
    backends = BACKENDS[operator]
    if name == "auto":
        if _choices.torchs and _choices.prefers_torch(operator, args) is not None:
            return backends["native"]
        for name, module in backends.items():
            if not _why_not(name, module, args) and not module.why_slower(*args):
                return module
    module = backends[checked_name(name)]
    reasons = _why_not(name, module, args)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot run {operator}: " + "; ".join(reasons))
    return module


def is_certain(name: str, requested: str | None = None) -> bool:
    """Whether each call that the backend `name`, the first one of its operator, can run goes to it, unwatched.

    `requested`: as `select` has it.
    """
    wanted = _current if requested is None else requested
    unwatched = select is _select and not _jit_traces()
    return wanted in ("auto", name) and not _choices.torchs and unwatched


def note_certain(state) -> None:
    """Notes in an `Unchanged` when `is_certain` says so of "ext": less often, only where all is as it mostly is."""
    state.result(globals().get, ("_current",), "auto")
    state.item(globals(), "select")
    state.result(torch._C._is_tracing, (), False)
    state.item(vars(_choices), "torchs")
    if _choices.torchs:
        state.result(bool, (), True)  # never
    else:
        state.empty(_choices.torchs)


def is_free() -> bool:
    """Whether calls go to the fastest backend, and nobody watches the choice."""
    return _current == "auto" and select is _select and not _jit_traces()


def _why_not(name: str, module: ModuleType, args: tuple) -> list[str]:
    """`module.why_not` and what no kernel can do."""
    if name != "native" and forward_ad._current_level >= 0:
        return ["forward-mode derivatives are torch's"]
    if name != "native" and _jit_traces():
        return ["torch.jit.trace records torch's operators"]  # it cannot record results that are numbers
    return module.why_not(*args)


_select = select
_jit_traces = torch.jit.is_tracing


def autocasts(device: str) -> bool:
    """Whether torch.autocast casts on devices of this type, so that operands of different dtypes fit; never on meta.

    torch.amp.is_autocast_available would know of meta, but torch 2.11 cannot compile it.
    """
    return device != "meta" and torch.is_autocast_enabled(device)


def report(operator: str, *args) -> dict[str, list[str]]:
    """For each backend of `operator`, in the order of `auto`, the reasons why it is not taken (empty: able)."""
    choice = _choices.prefers_torch(operator, args) if _choices.torchs else None
    reasons = {name: _why_not(name, m, args) + m.why_slower(*args) for name, m in BACKENDS[operator].items()}
    if choice is not None:
        measured = f"measured: {choice.seconds * 1e6:.0f} µs, torch {choice.torch_seconds * 1e6:.0f} µs"
        reasons = {name: found + [measured] * (name != "native") for name, found in reasons.items()}
    return reasons


def algorithm(operator: str, name: str) -> str:
    """How the last call of this thread, of `operator` on backend `name`, was computed; "" where there is one way.

    Kernels of convolutions have several: "Winograd", "Winograd on phases", "direct", "depthwise", "implicit GEMM".
    """
    several = name == "ext" and operator in ("conv2d", "conv_transpose2d")
    return _library.C.chosen_algorithm() if several else ""


def name_of(operator: str, module: ModuleType) -> str:
    """The name of the backend whose module this is."""
    return next(name for name, m in BACKENDS[operator].items() if m is module)


@contextmanager
def watch(callback: Callable[[str, ModuleType, tuple], None]) -> Iterator[None]:
    """Within the block, `callback(operator, module, args)` hears of every choice, in all threads of the process."""
    global select
    before = select

    def watched(operator: str, requested: str | None, *args) -> ModuleType:
        module = before(operator, requested, *args)
        callback(operator, module, args)
        return module

    select = watched
    try:
        yield
    finally:
        select = before
