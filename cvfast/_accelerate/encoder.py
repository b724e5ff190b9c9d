"""The halves of a transformer's encoder layer, each one call of the kernels: x + attention(norm(x)), x + mlp(norm(x)).

They are found on a module's graph behind its chains, two of which an mlp is. Each call makes sure that the layers are
what they were when the call was prepared and that nobody watches them; if not, they are called one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from operator import is_, itemgetter

import torch
from torch import Tensor, fx
from torch.nn import LayerNorm, Module
from torch.nn.modules.module import _has_any_global_hook

from cvfast import functional, nn
from cvfast._accelerate import chains, layers
from cvfast._accelerate.chains import Chain
from cvfast._accelerate.plain import unwatched

_ATTENTION = (layers.MultiheadAttention, nn.MultiheadAttention)


class _Unchanged:
    """Parameters of modules that nobody watches: what they were when this was made, and whether they still are that."""

    def __init__(self, modules: list[Module], parameters: list[tuple[Module, str]]) -> None:
        self._modules = [(module, type(module)) for module in modules]
        self._parameters = [(module._parameters, name) for module, name in parameters]
        self.parameters = self._now()
        self._given = chains._given(self.parameters)
        self._state = chains._state(self._given)

    def _now(self) -> tuple[Tensor | None, ...]:
        return tuple([parameters.get(name) for parameters, name in self._parameters])

    def holds(self) -> bool:
        for module, cls in self._modules:
            if type(module) is not cls or not unwatched(module):
                return False
        return all(map(is_, self._now(), self.parameters)) and chains._state(self._given) == self._state


class _Prepared:
    """A call with what has to hold for it."""

    def __init__(self, holds: Callable[[], bool], call: Callable[[Tensor], Tensor | None]) -> None:
        self.holds, self.call = holds, call


class _Half:
    """input + (what the subclass knows of norm(input))."""

    __name__ = __qualname__ = "half"  # in the code that torch.fx writes

    def __init__(self, norm: LayerNorm) -> None:
        self.norm = norm
        self._prepared: _Prepared | None = None

    def __call__(self, input: Tensor) -> Tensor:
        if chains.observer is not None or torch.compiler.is_compiling():
            return self.separately(input)
        prepared, watched = self._prepared, _has_any_global_hook()
        if prepared is not None and not watched and prepared.holds():
            output = prepared.call(input)
            if output is not None:
                return output
        output = self.separately(input)
        self._prepared = None if watched or torch.is_grad_enabled() else self.prepare()
        return output

    def separately(self, input: Tensor) -> Tensor:
        """The same by calling one layer after the other."""
        raise NotImplementedError

    def prepare(self) -> _Prepared | None:
        raise NotImplementedError

    def _options(self) -> tuple:
        return _OPTIONS(self.norm.__dict__)


_OPTIONS = itemgetter("eps", "normalized_shape")


class AttentionHalf(_Half):
    """input + attention(norm(input))"""

    def __init__(self, norm: LayerNorm, attention: Module) -> None:
        super().__init__(norm)
        self.attention = attention

    def separately(self, input: Tensor) -> Tensor:
        normal = self.norm(input)
        return input + self.attention(normal, normal, normal, need_weights=False)[0]

    def prepare(self) -> _Prepared | None:
        norm, attention, out = self.norm, self.attention, self.attention.out_proj
        names = [(norm, "weight"), (norm, "bias"), (attention, "in_proj_weight"), (attention, "in_proj_bias")]
        same = _Unchanged([norm, attention], [*names, (out, "weight"), (out, "bias")])
        norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias = same.parameters
        needed = (norm_weight, norm_bias, in_weight, out_weight)
        if any(t is None for t in needed) or not chains._may_keep(same.parameters):
            return None
        heads, options = attention.num_heads, self._options()
        call = functional.prepared_encoder_attention(
            (norm_weight, norm_bias, norm.eps), in_weight, in_bias, out_weight, out_bias, heads
        )

        def holds() -> bool:
            known = self._options() == options and attention.num_heads == heads and attention.out_proj is out
            return known and attention._is_one_call() and same.holds()

        return None if call is None else _Prepared(holds, call)


class MlpHalf(_Half):
    """input + linear(activation(linear(norm(input)))), the two chains behind a norm"""

    def __init__(self, norm: LayerNorm, first: Chain, second: Chain) -> None:
        super().__init__(norm)
        self.chains = first, second

    def separately(self, input: Tensor) -> Tensor:
        first, second = self.chains
        return second(first(self.norm(input)), input)

    def prepare(self) -> _Prepared | None:
        norm, (first, second) = self.norm, self.chains
        ready = first.ready, second.ready
        same = _Unchanged([norm], [(norm, "weight"), (norm, "bias")])
        if None in ready or any(t is None for t in same.parameters) or not chains._may_keep(same.parameters):
            return None
        (weight_1, bias_1, activation, _), (weight_2, bias_2, _, _) = (one.operands for one in ready)
        options = self._options()
        call = functional.prepared_encoder_mlp(
            (*same.parameters, norm.eps), activation.name, weight_1, bias_1, weight_2, bias_2
        )

        def holds() -> bool:
            return self._options() == options and same.holds() and all([one.holds() for one in ready])

        return None if call is None else _Prepared(holds, call)


def join_halves(graph: fx.Graph, root: Module) -> None:
    """Replaces the halves in a graph with chains."""
    for norm in list(graph.nodes):
        module = _module(norm, root)
        if type(module) is not LayerNorm or len(module.normalized_shape) > 1 or not unwatched(module):
            continue
        if len(norm.args) != 1 or norm.kwargs:
            continue
        for found in (_attention_behind, _mlp_behind):
            links = found(norm, root)
            if links is not None and _are_neighbours(links):
                _replace(graph, root, links)
                break


def _module(node: fx.Node, root: Module) -> Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _attention_behind(norm: fx.Node, root: Module) -> list[fx.Node] | None:
    """[norm, attention, results that are taken from its tuple, sum]"""
    attention = _only_user(norm)
    if attention is None or type(_module(attention, root)) not in _ATTENTION:
        return None
    if attention.args != (norm,) * 3 or attention.kwargs != {"need_weights": False}:
        return None
    taken = list(attention.users)
    if any(node.target is not operator.getitem for node in taken):
        return None
    used = [node for node in taken if node.users]
    if len(used) != 1 or used[0].args[1] != 0:
        return None
    total = _only_user(used[0])
    if total is None or chains._residual(total, used[0]) is not norm.args[0]:
        return None
    return [norm, attention, *taken, total]


def _mlp_behind(norm: fx.Node, root: Module) -> list[fx.Node] | None:
    """[norm, first chain, second chain]"""
    first = _only_user(norm)
    second = None if first is None else _only_user(first)
    if second is None or not (_is_linear(first, norm, None) and _is_linear(second, first, norm.args[0])):
        return None
    return [norm, first, second] if second.target.layers[2] is None and first.target.layers[2] is not None else None


def _is_linear(node: fx.Node, input: fx.Node, residual: fx.Node | None) -> bool:
    return (
        isinstance(node.target, Chain)
        and isinstance(node.target.layers[0], torch.nn.Linear)
        and node.args == (input, residual)
    )


def _are_neighbours(links: list[fx.Node]) -> bool:
    """Whether nothing lies between the links, so that nothing can change the input before it is added."""
    node = links[0]
    while node is not links[-1]:
        node = node.next
        if node not in links:
            return False
    return True


def _replace(graph: fx.Graph, root: Module, links: list[fx.Node]) -> None:
    norm, middle, *_, end = links
    if middle.op == "call_module":
        half = AttentionHalf(_module(norm, root), _module(middle, root))
    else:
        half = MlpHalf(_module(norm, root), middle.target, end.target)
    with graph.inserting_before(norm):
        new = graph.call_function(half, (norm.args[0],))
    end.replace_all_uses_with(new)
    for node in reversed(links):
        graph.erase_node(node)
