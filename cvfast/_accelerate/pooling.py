"""Pooling without gradients: of whole images by torch's avg_pool2d, and what may stand in a sequence of chains.

A first call of what adaptive pooling is made of, after a model has emptied the caches, takes 0.1 ms longer.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import AdaptiveAvgPool2d, Dropout, Linear, MaxPool2d, Module
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from cvfast import functional
from cvfast._accelerate import chains
from cvfast._accelerate.chains import Chain
from cvfast._accelerate.plain import unwatched
from cvfast._accelerate.unchanged import Snapshot

_ONE_PIXEL = (1, (1, 1))


class GlobalAverage:
    """An AdaptiveAvgPool2d to one pixel; as avg_pool2d where that is faster."""

    __name__ = __qualname__ = "global_average"  # in the code that torch.fx writes

    def __init__(self, module: AdaptiveAvgPool2d) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._fits(input):
            return self.module(input)
        return F.avg_pool2d(input, input.shape[2:])

    def _fits(self, input: Tensor) -> bool:
        """Whether these are images in channels_last, and nobody watches the module or has changed it."""
        module = self.module
        images = type(input) is Tensor and input.is_cpu and input.dtype is torch.float32 and input.dim() == 4
        return (
            images
            and input.stride(1) == 1
            and input.numel() > 0
            and type(module) is AdaptiveAvgPool2d
            and module.output_size in _ONE_PIXEL
            and unwatched(module)
            and not _has_any_global_hook()
        )


class MaxPooling:
    """A MaxPool2d of square windows; float32."""

    __name__ = __qualname__ = "max_pooling"  # in the code that torch.fx writes

    def __init__(self, module: MaxPool2d) -> None:
        self.module, self._options = module, _options(module)
        self.ready = self  # at once

    def __call__(self, input: Tensor, residual: None = None) -> Tensor:
        return self.module(input)

    def is_still_so(self) -> bool:
        module = self.module
        return type(module) is MaxPool2d and unwatched(module) and _options(module) == self._options

    def look(self, snapshot: Snapshot) -> None:
        snapshot.unwatched(self.module)
        snapshot.entries(self.module, _MAX_POOL)

    def step(self, input: int, residual: int) -> functional.Step:
        window, stride, padding = self._options[:3]
        pairs = ((length, length) for length in (stride, padding, window))
        return functional.Step(input, residual, "none", 0.0, "none", None, None, (*pairs, 1), "max_pooling")

    @staticmethod
    def takes(module: Module) -> bool:
        if type(module) is not MaxPool2d:
            return False
        window, stride, padding, *others = _options(module)
        square = all(type(length) is int for length in (window, stride, padding))
        return square and others == [1, False, False] and 2 * padding <= window


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def _options(module: MaxPool2d) -> tuple:
    return tuple([getattr(module, name) for name in _MAX_POOL])


class AveragedLinear:
    """linear(dropout(flatten(average(images)))), as a classifier ends."""

    __name__ = __qualname__ = "averaged_linear"  # in the code that torch.fx writes

    def __init__(self, average: GlobalAverage, dropouts: list[Dropout], linear: Linear) -> None:
        self.average, self.dropouts, self.linear = average, dropouts, linear
        self._chain = Chain(linear, None, None, None)
        self._ready: _ReadyLinear | None = None

    def __call__(self, input: Tensor, residual: None = None) -> Tensor:
        x = torch.flatten(self.average(input), 1)
        for dropout in self.dropouts:
            x = dropout(x)
        return self._chain(x) if chains.observer is None else self.linear(x)

    @property
    def ready(self) -> _ReadyLinear | None:
        """What is known of a call without gradients; None: nothing yet."""
        linear = self._chain.ready
        if linear is None:
            return None
        if self._ready is None or self._ready.linear is not linear:
            self._ready = _ReadyLinear(self.average.module, self.dropouts, linear)
        return self._ready


class _ReadyLinear:
    def __init__(self, average: Module, dropouts: list[Module], linear: chains._Ready) -> None:
        self.average, self.dropouts, self.linear = average, dropouts, linear

    def is_still_so(self) -> bool:
        average = self.average
        pools = type(average) is AdaptiveAvgPool2d and average.output_size in _ONE_PIXEL and unwatched(average)
        idle = [type(one) is Dropout and not one.training and unwatched(one) for one in self.dropouts]
        return pools and all(idle) and self.linear.is_still_so()

    def look(self, snapshot: Snapshot) -> None:
        snapshot.unwatched(self.average)
        snapshot.entries(self.average, ("output_size",))
        for dropout in self.dropouts:
            snapshot.unwatched(dropout)
            snapshot.entries(dropout, ("training",))
        self.linear.look(snapshot)

    def step(self, input: int, residual: int) -> functional.Step:
        weight, bias, *_ = self.linear.operands
        options = (1, 1), (0, 0), (1, 1), 1
        return functional.Step(input, residual, "none", 0.0, "none", weight, bias, options, "averaged_linear")


def replace_poolings(graph: fx.Graph, root: Module) -> None:
    """Replaces the calls of modules that pool whole images, with a linear layer behind, and of max pooling."""
    narrow = any([parameter.dtype is not torch.float32 for parameter in root.parameters()])
    for node in list(graph.nodes):
        module = _module(node, root)
        if len(node.args) != 1 or node.kwargs:
            continue
        if type(module) is AdaptiveAvgPool2d and module.output_size in _ONE_PIXEL:
            average, behind = GlobalAverage(module), None if narrow else _linear_behind(node, root)
            if behind is None:
                _replace(graph, [node], average, node.args)
            else:
                modules = [_module(link, root) for link in behind[1:]]
                _replace(graph, [node, *behind], AveragedLinear(average, modules[:-1], modules[-1]), (*node.args, None))
        elif MaxPooling.takes(module) and not narrow:
            _replace(graph, [node], MaxPooling(module), (*node.args, None))


def _linear_behind(average: fx.Node, root: Module) -> list[fx.Node] | None:
    """[flatten, dropout if there is one, linear layer], each the only user of the one before and next to it."""
    links = [average]
    while len(links) < 4 and links[-1].next in links[-1].users and len(links[-1].users) == 1:
        node = links[-1].next
        flattens = node.target is torch.flatten and node.args == (average, 1) and not node.kwargs
        calls = node.args == (links[-1],) and not node.kwargs
        links.append(node)
        if len(links) == 2 and not flattens:
            return None
        if len(links) > 2 and calls and type(_module(node, root)) in chains.LINEAR:
            return links[1:]
        if len(links) > 2 and not (calls and type(_module(node, root)) is Dropout):
            return None
    return None


def _module(node: fx.Node, root: Module) -> Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None


def _replace(graph: fx.Graph, links: list[fx.Node], target: GlobalAverage | AveragedLinear | MaxPooling, args: tuple):
    with graph.inserting_before(links[-1]):
        new = graph.call_function(target, args)
    links[-1].replace_all_uses_with(new)
    for node in reversed(links):
        graph.erase_node(node)
