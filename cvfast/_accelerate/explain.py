"""cvfast.explain(): what ran in each layer, why, and how long it took beside torch's operator."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from cvfast import _packed, backend, nn
from cvfast._accelerate import chains, fuse, layers, plain
from cvfast._accelerate.measure import least_seconds

if TYPE_CHECKING:  # rich takes long to import, for something that few ask for
    from rich.table import Table

_CVFASTS = tuple(getattr(nn, name) for name in nn.__all__)


@dataclass
class Row:
    """One call of a layer, of a chain of layers that ran as one, or of an operator by a module that is no layer.

    inputs, output: shapes of the tensors. backend: "ext", "triton" or "native" (torch's operators); "torch" for layers
    that are torch's; "" for those that were not called. algorithm: of the kernel, where it has several, as
    cvfast.backend.algorithm names them. reason: why no cvfast kernel ran. seconds: of the call, the least of several
    where the layer is cvfast's. torch_seconds: the same on torch's operators, layer by layer. fused: the layers that
    ran as one. packed_bytes: of the copies of its weights that are kept, folded or packed.
    """

    name: str
    type: str
    inputs: list[list[int]] = field(default_factory=list)
    output: list[list[int]] = field(default_factory=list)
    backend: str = ""
    algorithm: str = ""
    reason: str = ""
    seconds: float | None = None
    torch_seconds: float | None = None
    fused: str = ""
    packed_bytes: int = 0


@dataclass
class Explanation:
    """What `explain` found: a row per call, in their order, and why modules with convolutions were not fused."""

    rows: list[Row]
    notes: dict[str, str]

    def table(self) -> Table:
        """As a table of rich; `print(explanation)` prints it as text."""
        from rich.table import Table

        table = Table(
            title="layer by layer", caption="\n".join(f"{n or 'model'}: {why}" for n, why in self.notes.items())
        )
        for heading in ("layer", "type", "input", "output", "kernel", "cvfast", "torch", "packed", "fused", "reason"):
            is_number = heading in ("cvfast", "torch", "packed")
            table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
        for row in self.rows:
            own = row.backend not in ("", "torch")
            table.add_row(
                row.name, row.type, _shapes(row.inputs), _shapes(row.output),
                f"{row.backend}, {row.algorithm}" if row.algorithm else row.backend,
                _time(row.seconds if own else None), _time(row.torch_seconds if own else row.seconds),
                _size(row.packed_bytes), row.fused, row.reason,
            )  # fmt: skip
        both = [row for row in self.rows if None not in (row.seconds, row.torch_seconds)]
        table.add_section()
        sums = (_time(sum(getattr(row, name) for row in both)) for name in ("seconds", "torch_seconds"))
        packed = {row.name: row.packed_bytes for row in self.rows}  # once where a layer was called several times
        table.add_row("all with both times", "", "", "", "", *sums, _size(sum(packed.values())))
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=200).print(self.table())
        return text.getvalue()


def _shapes(shapes: list[list[int]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.0f} µs"


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count else ""


def _packed_bytes(layer: Module) -> int:
    """Of what is kept beside the weights of a layer, or of the convolution of a chain."""
    folded = chains.folded(layer)
    return sum(t.nbytes for t in folded) + _packed.packed_bytes([*folded, *layer.parameters()])


@torch.no_grad()
def explain(model: Module, *inputs) -> Explanation:
    """Runs the model once, in its own mode and without gradients, and tells layer by layer what computed and how fast.

    Layers of cvfast, and chains of them, are called several times more, on cvfast's choice and on torch's operators,
    for their times; hooks don't see those calls. Other threads should not run models meanwhile.
    """
    watcher = _Watcher(model)
    with watcher.watching():
        model(*inputs)
    rows = watcher.rows
    called = {row.name for row in rows} | {name for row in rows for name in row.fused.split(" + ")}
    parts = {part for layer in model.modules() if _is_layer(layer) for part in layer.modules() if part is not layer}
    for name, module in model.named_modules():
        if isinstance(module, layers.SWAPPABLE) and name not in called and module not in parts:
            rows.append(Row(name, type(module).__name__, reason="not called"))
    return Explanation(rows, _not_fused(model))


def _not_fused(model: Module) -> dict[str, str]:
    """Modules whose chains are not proved, with the reason, where any module of the model is fused."""
    notes = {}
    modules = dict(model.named_modules())
    if any(map(fuse.is_fused, modules.values())):
        for name, module in modules.items():
            if not fuse.is_fused(module):
                try:
                    fuse.make_plan(module)
                except plain.NotPlain as reason:
                    notes[name] = str(reason)
    return notes


class _Watcher:
    """Sees the calls of a model's modules and chains, and the choices of backends, as they happen."""

    def __init__(self, model: Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.open: list[str] = []  # names of the modules that are being called
        self.rows: list[Row] = []
        self.choices: list[tuple[str, str, str]] = []  # operator, backend, reason, since the layer being called began
        self.busy = False  # with a layer, whose parts are no rows of their own
        self.thread = get_ident()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(setattr, Module, "__call__", Module.__call__)
            stack.callback(setattr, chains, "observer", None)
            stack.enter_context(backend.watch(self.choice))
            call = Module.__call__
            Module.__call__ = lambda module, *args, **kwargs: self.call(call, module, args, kwargs)
            chains.observer = self.chain
            yield

    def choice(self, operator: str, module, args: tuple) -> None:
        """backend.watch's callback."""
        name, reasons = backend.name_of(operator, module), backend.report(operator, *args)
        first = next(iter(reasons))
        reason = "" if name == first else "; ".join(reasons[first]) or f"{name!r} was asked for"
        self.choices.append((operator, name, reason))
        if not self.busy and self.open and get_ident() == self.thread:  # a function that no layer called
            native = backend.BACKENDS[operator]["native"]
            row = Row(self.open[-1], operator, _sizes(args), _sizes(module.run(*args)), *self.chosen())
            row.seconds, row.torch_seconds = least_seconds(lambda: module.run(*args), lambda: native.run(*args))
            self.rows.append(row)

    def call(self, call, module: Module, args: tuple, kwargs: dict):
        """In place of Module.__call__, which is `call`."""
        name = self.names.get(module)
        if self.busy or name is None or get_ident() != self.thread:
            return call(module, *args, **kwargs)
        if not _is_layer(module):
            self.open.append(name)
            output = call(module, *args, **kwargs)
            self.open.pop()
            return output
        with self.layer():
            start = time.perf_counter()
            output = call(module, *args, **kwargs)
            seconds = time.perf_counter() - start
            row = Row(name, type(module).__name__, _sizes((args, kwargs)), _sizes(output), "torch", seconds=seconds)
            if isinstance(module, _CVFASTS):
                row.backend, row.algorithm, row.reason = self.chosen()
                if not (module.training and parametrize.is_parametrized(module)):  # whose state changes at each call
                    row.seconds, row.torch_seconds = _compare(*[lambda: module.forward(*args, **kwargs)] * 2)
                row.packed_bytes = _packed_bytes(module)
            elif self.choices:  # a layer of torch's, under cvfast.override()
                row.backend, row.algorithm, row.reason = self.chosen()
            elif isinstance(module, layers.SWAPPABLE):
                row.reason = layers.why_kept(module) or "not accelerated"
            self.rows.append(row)
        return output

    def chain(self, conv, norm, activation, input: Tensor, residual: Tensor | None, pooling) -> Tensor:
        """In place of chains.run."""
        arguments = (conv, norm, activation, input, residual, pooling)
        if self.busy or get_ident() != self.thread or not chains.runs_as_one(conv, norm, activation, pooling):
            return chains.run(*arguments)
        with self.layer():
            output = chains.run(*arguments)
            row = Row(self.names[conv], type(conv).__name__, _sizes((input, residual)), _sizes(output), *self.chosen())
            parts = (norm, "add" if residual is not None else None, activation, pooling)
            row.fused = " + ".join(self.names.get(p) or getattr(p, "name", p) for p in parts if p is not None)
            row.seconds, row.torch_seconds = _compare(
                lambda: chains.run(*arguments), lambda: chains.separately(*arguments)
            )
            row.packed_bytes = _packed_bytes(conv)
            self.rows.append(row)
        return output

    @contextmanager
    def layer(self) -> Iterator[None]:
        self.choices.clear()
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def chosen(self) -> tuple[str, str, str]:
        """Backend, algorithm and reason of the layer's last choice (attention's, where products are around that)."""
        choices = [c for c in self.choices if c[0] != "linear"] or self.choices
        if not choices:
            return "native", "", "it called none of cvfast's operators"
        operator, name, reason = choices[-1]
        return name, backend.algorithm(operator, name), reason


def _compare(ours: Callable[[], object], torchs: Callable[[], object]) -> list[float]:
    """Seconds of both, the second one on torch's operators."""

    def native() -> None:
        with backend.use_backend("native"):
            torchs()

    return least_seconds(ours, native)


def _is_layer(module: Module) -> bool:
    return not module._modules or isinstance(module, (*layers.SWAPPABLE, *_CVFASTS))


def _sizes(values) -> list[list[int]]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [list(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
