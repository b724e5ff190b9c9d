"""Chains in a row, and pooling among them, of which nobody else sees the results between them: one call of the kernels.

A call from Python takes as long as a small convolution: what it reads of the model is no longer in the caches then.
Nothing runs between such chains, so they may be checked together, too.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, fx

from cvfast import functional
from cvfast._accelerate import chains
from cvfast._accelerate.chains import Chain
from cvfast._accelerate.classifier import ClassifierLayer
from cvfast._accelerate.pooling import MaxPooling
from cvfast._accelerate.unchanged import Answer, Snapshot

_MOST_CALLS = 64  # that a sequence knows: images of that many sizes


class Part(Protocol):
    """What may stand in a sequence: a chain that begins with a convolution, pooling, or a classifier's layer.

    ready: what is known of a call without gradients, the same object as long as it is so; None: nothing yet.
    """

    ready: Ready | None

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor: ...


class Ready(Protocol):
    def is_still_so(self) -> bool: ...

    def look(self, snapshot: Snapshot) -> None:
        """Notes all that `is_still_so` asks for."""

    def step(self, input: int, residual: int) -> functional.Step: ...


class Sequence:
    """steps: parts, each with the numbers of the values that it reads: its input and its residual, -1 for none.

    Values are the sequence's inputs and then the results, of which the last one is the sequence's.
    """

    __name__ = __qualname__ = "sequence"  # in the code that torch.fx writes

    def __init__(self, steps: list[tuple[Part, int, int]]) -> None:
        self.steps = steps
        last_use = {value: i for i, (_, *reads) in enumerate(steps) for value in reads if value >= 0}
        self.ends = [[value for value, last in last_use.items() if last == i] for i in range(len(steps))]
        self.ready: list[Ready] = []  # for which `calls` were prepared, by shapes and strides of the inputs
        self.calls: dict = {}
        self._are_ready = Answer(self._ask_all, self._look_at_all)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if chains.observer is None and not torch.compiler.is_compiling():
            output = self._at_once(inputs) if self._are_ready() else None
            if output is not None:
                return output
            self._are_ready.forget()  # the chains may find out something else
        return self._one_by_one(inputs)

    def _ask_all(self) -> bool:
        ready = [part.ready for part, _, _ in self.steps]
        if None in ready or not all([one.is_still_so() for one in ready]):
            return False
        if ready != self.ready:
            self.ready, self.calls = ready, {}
        return True

    def _look_at_all(self, snapshot: Snapshot) -> None:
        for part, _, _ in self.steps:
            if part.ready is not None:
                part.ready.look(snapshot)

    def _at_once(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        key = tuple([(input.shape, input.stride()) for input in inputs])
        call = self.calls.get(key)
        if call is None:
            if len(self.calls) >= _MOST_CALLS:
                self.calls.clear()
            call = self.calls[key] = functional.prepared_conv2d_sequence(self._prepared_steps(), inputs)
        try:
            return None if call is None else call(inputs)
        except LookupError:
            del self.calls[key]
            return None

    def _prepared_steps(self) -> list[functional.Step]:
        return [ready.step(*reads) for (_, *reads), ready in zip(self.steps, self.ready, strict=True)]

    def _one_by_one(self, inputs: tuple[Tensor, ...]) -> Tensor:
        values: list[Tensor | None] = list(inputs)
        for i, (part, input, residual) in enumerate(self.steps):
            values.append(part(values[input], None if residual < 0 else values[residual]))
            for value in self.ends[i]:
                values[value] = None
        return values[-1]


def join_neighbours(graph: fx.Graph) -> None:
    """Replaces parts in a row, and pooling alone, by sequences."""
    row: list[fx.Node] = []
    for node in list(graph.nodes):
        if _is_part(node.target):
            row.append(node)
        else:
            _join(graph, row)
            row = []


def _is_part(target: object) -> bool:
    if isinstance(target, Chain):
        return isinstance(target.layers[0], torch.nn.Conv2d)
    return isinstance(target, (MaxPooling, ClassifierLayer))


def _join(graph: fx.Graph, row: list[fx.Node]) -> None:
    for i, node in enumerate(row[:-1]):
        if any(user not in row for user in node.users):  # who wants this result ends the sequence
            _join(graph, row[: i + 1])
            _join(graph, row[i + 1 :])
            return
    if not row or (len(row) == 1 and not isinstance(row[0].target, MaxPooling)):
        return
    inputs = list(dict.fromkeys(value for node in row for value in node.args if value is not None and value not in row))
    number = {value: i for i, value in enumerate([*inputs, *row])} | {None: -1}
    steps = [(node.target, *(number[value] for value in node.args)) for node in row]
    with graph.inserting_after(row[-1]):
        new = graph.call_function(Sequence(steps), tuple(inputs))
    row[-1].replace_all_uses_with(new)
    for node in reversed(row):
        graph.erase_node(node)
