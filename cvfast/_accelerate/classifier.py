"""A classifier's linear layers, of averaged or flattened images, as parts of a sequence; and pooling on the way there.

They are small, and after a model has emptied the caches a call from Python takes longer than the product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.nn import AdaptiveAvgPool2d, Conv2d, Dropout, Flatten, Linear, Module

from cvfast import functional
from cvfast._accelerate import chains
from cvfast._accelerate.chains import Activation, Chain
from cvfast._accelerate.plain import unwatched
from cvfast._accelerate.pooling import ONE_PIXEL, GlobalAverage, MaxPooling, max_pool_of_call
from cvfast._accelerate.unchanged import Snapshot

_MOST_WEIGHTS = 1 << 20  # of a layer behind flattened images: larger ones take so long that a call doesn't matter


class ClassifierLayer:
    """activation(linear(x)), where `before` makes rows x [N, I] of images, or of the rows of the layer before.

    kind: "averaged_linear" or "linear", as cvfast.functional.Step knows it.
    """

    __name__ = __qualname__ = "classifier_layer"  # in the code that torch.fx writes

    def __init__(
        self, kind: str, before: list[Callable], linear: Linear, activation: Module | Activation | None = None
    ) -> None:
        self.kind, self.before, self.linear, self.activation = kind, before, linear, activation
        self._chain = Chain(linear, None, activation, None)
        self._ready: _Ready | None = None

    def __call__(self, input: Tensor, residual: None = None) -> Tensor:
        for one in self.before:
            input = one(input)
        if chains.observer is None:
            return self._chain(input)
        output = self.linear(input)
        return output if self.activation is None else self.activation(output)

    @property
    def ready(self) -> _Ready | None:
        """What is known of a call without gradients; None: nothing yet."""
        linear = self._chain.ready
        if linear is None:
            return None
        if self._ready is None or self._ready.linear is not linear:
            modules = [one.module if isinstance(one, GlobalAverage) else one for one in self.before]
            self._ready = _Ready(self.kind, [one for one in modules if isinstance(one, Module)], linear)
        return self._ready


class _Ready:
    """modules: that make the rows."""

    def __init__(self, kind: str, modules: list[Module], linear: chains._Ready) -> None:
        self.kind, self.modules, self.linear = kind, modules, linear

    def is_still_so(self) -> bool:
        return all([unwatched(one) and _is_plain(one) for one in self.modules]) and self.linear.is_still_so()

    def look(self, snapshot: Snapshot) -> None:
        for module in self.modules:
            snapshot.unwatched(module)
            snapshot.entries(module, _ENTRIES[type(module)])
        self.linear.look(snapshot)

    def step(self, input: int, residual: int) -> functional.Step:
        weight, bias, activation, _ = self.linear.operands
        name, slope = activation or ("none", 0.0)
        options = (1, 1), (0, 0), (1, 1), 1
        return functional.Step(input, residual, name, slope, "none", weight, bias, options, self.kind)


_ENTRIES = {AdaptiveAvgPool2d: ("output_size",), Flatten: ("start_dim", "end_dim"), Dropout: ("training",)}


def _is_plain(module: Module) -> bool:
    """Whether it averages whole images, flattens all but the samples, or does nothing."""
    if type(module) is AdaptiveAvgPool2d:
        return module.output_size in ONE_PIXEL
    if type(module) is Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    return type(module) is Dropout and not module.training


def _flatten(x: Tensor) -> Tensor:
    return torch.flatten(x, 1)


def replace_ends(graph: fx.Graph, root: Module) -> None:
    """Replaces pooling, of whole images by modules, and linear layers behind pooled or flattened images."""
    narrow = any([parameter.dtype is not torch.float32 for parameter in root.parameters()])
    for node in list(graph.nodes):
        module = _module(node, root)
        calls = len(node.args) == 1 and not node.kwargs
        pool = max_pool_of_call(node) or (module if calls else None)
        if calls and type(module) is AdaptiveAvgPool2d and module.output_size in ONE_PIXEL:
            average, behind = GlobalAverage(module), None if narrow else _linear_behind(node, root)
            if behind is None:
                _replace(graph, [node], average, node.args)
            else:
                *dropouts, linear = [_module(link, root) for link in behind[1:]]
                layer = ClassifierLayer("averaged_linear", [average, _flatten, *dropouts], linear)
                _replace(graph, [node, *behind], layer, (*node.args, None))
        elif MaxPooling.takes(pool) and not narrow:
            _replace(graph, [node], MaxPooling(pool), (node.args[0], None))
        elif _flattens(node, root) and not narrow:
            for links, layer in _layers_behind(node, root):
                _replace(graph, links, layer, (links[0].args[0], None))


def _linear_behind(average: fx.Node, root: Module) -> list[fx.Node] | None:
    """[flatten, dropout if there is one, linear layer], each the only user of the one before and next to it."""
    links = [average]
    while len(links) < 4 and (node := _only_user(links[-1])) is not None:
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


def _flattens(node: fx.Node, root: Module) -> bool:
    """Whether it makes rows of the images that a convolution or pooling gives."""
    module = _module(node, root)
    given = type(module) is Flatten and _is_plain(module) and len(node.args) == 1
    given = given or (node.target in (torch.flatten, "flatten") and len(node.args) == 2 and node.args[1] == 1)
    if not given or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    source = node.args[0].target
    return isinstance(source, MaxPooling) or (isinstance(source, Chain) and isinstance(source.layers[0], Conv2d))


def _layers_behind(flatten: fx.Node, root: Module) -> list[tuple[list[fx.Node], ClassifierLayer]]:
    """The linear layers with what stands before them and their activations, each the only user of the one before."""
    layers, links, before = [], [flatten], [_module(flatten, root) or _flatten]
    end = flatten
    while (node := _only_user(end)) is not None and node.args == (end,) and not node.kwargs:
        module, end = _module(node, root), node
        links.append(node)
        if type(module) is Dropout:
            before.append(module)
            continue
        if type(module) not in chains.LINEAR or module.weight.numel() > _MOST_WEIGHTS:
            break
        behind = _only_user(node)
        activation = None if behind is None else chains.activation_of(behind, root)
        if activation is not None:
            links.append(behind)
            end = behind
        layers.append((links, ClassifierLayer("linear", before, module, activation)))
        links, before = [], []
    return layers


def _only_user(node: fx.Node) -> fx.Node | None:
    """Who alone uses the node, if that comes next."""
    return node.next if len(node.users) == 1 and node.next in node.users else None


def _module(node: fx.Node, root: Module) -> Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None


def _replace(graph: fx.Graph, links: list[fx.Node], target: GlobalAverage | ClassifierLayer | MaxPooling, args: tuple):
    with graph.inserting_before(links[-1]):
        new = graph.call_function(target, args)
    links[-1].replace_all_uses_with(new)
    for node in reversed(links):
        graph.erase_node(node)
