"""Layers of a transformer's encoder as one call of the kernels: halves x + attention(norm(x)) and x + mlp(norm(x)).

They are found on a module's graph behind its chains, two of which an mlp is. Each call makes sure that the layers are
what they were when the call was prepared and that nobody watches them; if not, they are called one by one. All at once,
since the kernels leave nothing in the caches of what Python reads: half by half, that took a tenth of the time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.nn import LayerNorm, Module
from torch.nn.modules.module import _has_any_global_hook

from cvfast import functional, nn
from cvfast._accelerate import chains, layers
from cvfast._accelerate.chains import Chain
from cvfast._accelerate.plain import unwatched
from cvfast._accelerate.unchanged import Snapshot

_ATTENTION = (layers.MultiheadAttention, nn.MultiheadAttention)


class AttentionHalf:
    """input + attention(norm(input))"""

    def __init__(self, norm: LayerNorm, attention: Module) -> None:
        self.norm, self.attention = norm, attention

    def __call__(self, input: Tensor) -> Tensor:
        normal = self.norm(input)
        return input + self.attention(normal, normal, normal, need_weights=False)[0]

    def of_first(self, input: Tensor) -> Tensor:
        """[N, 1, E], the first position's results from input [N, L, E]."""
        normal = self.norm(input)
        return input[:, :1] + self.attention(normal[:, :1], normal, normal, need_weights=False)[0]

    def may_leave_out(self) -> bool:
        """Whether positions of the result may be left out, as far as this half alone decides it."""
        attention = self.attention
        return attention.batch_first and not (attention.training and attention.dropout)  # drops from all in order

    def modules(self) -> list[Module]:
        return [self.norm, self.attention, self.attention.out_proj]

    def look(self, snapshot: Snapshot) -> None:
        """Notes all that `prepare` depends on."""
        norm, attention, out = self.norm, self.attention, self.attention.out_proj
        _look_at_norm(norm, snapshot)
        snapshot.unwatched(attention)
        snapshot.children(attention)
        snapshot.entries(attention, _OPTIONS)
        snapshot.tensors(attention, "_parameters", ("in_proj_weight", "in_proj_bias", "bias_k"))
        snapshot.tensors(out, "_parameters", ("weight", "bias"))

    def prepare(self) -> functional.Half | None:
        """As the kernels take it; None where this is none of theirs."""
        norm, attention, out = self.norm._parameters, self.attention._parameters, self.attention.out_proj._parameters
        operands = [
            (own.get(prefix + "weight"), own.get(prefix + "bias"))
            for own, prefix in ((norm, ""), (attention, "in_proj_"), (out, ""))
        ]
        if not self.attention._is_one_call() or not _may_keep(*operands):
            return None
        return functional.Half(operands[0], self.norm.eps, *operands[1:], heads=self.attention.num_heads)


class MlpHalf:
    """input + linear(activation(linear(norm(input)))): two chains behind a norm"""

    def __init__(self, norm: LayerNorm, first: Chain, second: Chain) -> None:
        self.norm, self.first, self.second = norm, first, second

    def __call__(self, input: Tensor) -> Tensor:
        return self.second(self.first(self.norm(input)), input)

    def modules(self) -> list[Module]:
        layers = (*self.first.layers, *self.second.layers)
        return [self.norm, *(layer for layer in layers if isinstance(layer, Module))]

    def look(self, snapshot: Snapshot) -> None:
        """Notes all that `prepare` depends on."""
        _look_at_norm(self.norm, snapshot)
        for chain in (self.first, self.second):
            if chain.ready is not None:
                chain.ready.look(snapshot)

    def prepare(self) -> functional.Half | None:
        """As the kernels take it; None where this is none of theirs."""
        norm, ready = self.norm._parameters, (self.first.ready, self.second.ready)
        operands = norm.get("weight"), norm.get("bias")
        if None in ready or not all([one.is_still_so() for one in ready]) or not _may_keep(operands):
            return None
        (*first, activation, _), (*second, _, _) = (one.operands for one in ready)
        return functional.Half(operands, self.norm.eps, tuple(first), tuple(second), activation=activation.name)


_OPTIONS = (  # what an attention's call depends on besides parameters
    "num_heads", "_qkv_same_embed_dim", "batch_first", "bias_k", "add_zero_attn", "training", "dropout",
)  # fmt: skip


def _look_at_norm(norm: LayerNorm, snapshot: Snapshot) -> None:
    snapshot.unwatched(norm)
    snapshot.entries(norm, ("eps", "normalized_shape"))
    snapshot.tensors(norm, "_parameters", ("weight", "bias"))


def _may_keep(norm: tuple[Tensor | None, ...], *layers: tuple[Tensor | None, ...]) -> bool:
    """Whether all weights are there, and the norm's bias, and may be kept from one call to the next."""
    parameters = [*norm, *(parameter for layer in layers for parameter in layer)]
    needed = [*norm, *(weight for weight, _ in layers)]
    return not any([t is None for t in needed]) and chains._may_keep(tuple(parameters))


class Halves:
    """Halves in a row of which nobody else sees the results between, and a layer norm behind them if there is one.

    Where only the first position of the results is read, as a vision transformer reads its class token, `narrow` is the
    number of the last half of attention: behind it the others are left out, of the results [N, 1, E], too.
    """

    __name__ = __qualname__ = "halves"  # in the code that torch.fx writes

    def __init__(self, halves: list[AttentionHalf | MlpHalf]) -> None:
        self.halves = halves
        self.norm: LayerNorm | None = None
        self.narrow = -1
        self._prepared: list[functional.Half] = []  # for which `calls` were prepared, by sizes of inputs
        self._state = None  # in which they were prepared
        self._calls: dict[torch.Size, Callable[[Tensor], Tensor | None] | None] = {}

    def __call__(self, input: Tensor) -> Tensor:
        if chains.observer is not None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self._one_by_one(input)
        if self._state is not None and self._state.holds():
            output = self._at_once(input)
            return self._one_by_one(input) if output is None else output
        output = self._one_by_one(input)
        self._prepare()
        return output

    def _prepare(self) -> None:
        state = Snapshot.of(self._look)  # before asking: nothing may change unseen in between
        prepared = [None] if state is None or not self._may_norm() else [half.prepare() for half in self.halves]
        self._calls = {}
        self._state, self._prepared = (None, []) if None in prepared else (state, prepared)

    def _one_by_one(self, input: Tensor) -> Tensor:
        narrow = self.narrow if self._may_leave_out(input) else -1
        for number, half in enumerate(self.halves):
            input = half.of_first(input) if number == narrow else half(input)
        return input if self.norm is None else self.norm(input)

    def _may_leave_out(self, input: Tensor) -> bool:
        """Whether nobody sees that positions are left out behind half `narrow`."""
        if self.narrow < 0 or input.dim() != 3 or chains.observer is not None or torch.compiler.is_compiling():
            return False
        modules = [module for half in self.halves[self.narrow :] for module in half.modules()]
        modules += [] if self.norm is None else [self.norm]
        return self.halves[self.narrow].may_leave_out() and all(map(unwatched, modules)) and not _has_any_global_hook()

    def _look(self, snapshot: Snapshot) -> None:
        for half in self.halves:
            half.look(snapshot)
        if self.norm is not None:
            _look_at_norm(self.norm, snapshot)

    def _may_norm(self) -> bool:
        return self.norm is None or _may_keep((self.norm.weight, self.norm.bias))

    def _at_once(self, input: Tensor) -> Tensor | None:
        size = input.shape
        if size not in self._calls:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            norm = None if self.norm is None else (self.norm.weight, self.norm.bias, self.norm.eps)
            self._calls[size] = functional.prepared_encoder(self._prepared, norm, input, self.narrow)
        call = self._calls[size]
        try:
            return None if call is None else call(input)
        except LookupError:
            del self._calls[size]
            return None


_MOST_CALLS = 64  # that halves know: inputs of that many sizes


def join_halves(graph: fx.Graph, root: Module) -> None:
    """Replaces the halves in a graph with chains, those in a row by one node."""
    end: fx.Node | None = None  # of the last row
    for norm in list(graph.nodes):
        module = _module(norm, root)
        if type(module) is not LayerNorm or len(module.normalized_shape) > 1 or not unwatched(module):
            continue
        if len(norm.args) != 1 or norm.kwargs:
            continue
        for found in (_attention_behind, _mlp_behind):
            links = found(norm, root)
            if links is not None and _are_neighbours(links):
                end = _replace(graph, root, links, end)
                break
        else:
            if end is not None and end.next is norm and norm.args[0] is end and set(end.users) == {norm}:
                end.target.norm = module
                norm.replace_all_uses_with(end)
                graph.erase_node(norm)
                end = None
    for node in graph.nodes:
        if isinstance(node.target, Halves) and _only_first_is_read(node):
            attentions = [number for number, half in enumerate(node.target.halves) if isinstance(half, AttentionHalf)]
            node.target.narrow = max(attentions, default=-1)


def _only_first_is_read(node: fx.Node) -> bool:
    """Whether all that becomes of the results is their first position, result[:, 0]."""
    user = _only_user(node)
    return user is not None and user.target is operator.getitem and user.args == (node, (slice(None), 0))


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


def _replace(graph: fx.Graph, root: Module, links: list[fx.Node], before: fx.Node | None) -> fx.Node:
    """The node that takes the place of the links: `before`, a node of halves, where they go on behind it."""
    norm, middle, *_, end = links
    if middle.op == "call_module":
        half = AttentionHalf(_module(norm, root), _module(middle, root))
    else:
        half = MlpHalf(_module(norm, root), middle.target, end.target)
    if before is not None and norm.args[0] is before and before.next is norm and set(before.users) == {norm, end}:
        before.target.halves.append(half)
        new = before
    else:
        with graph.inserting_before(norm):
            new = graph.call_function(Halves([half]), (norm.args[0],))
    end.replace_all_uses_with(new)
    for node in reversed(links):
        graph.erase_node(node)
    return new
