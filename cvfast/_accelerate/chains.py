"""Chains of a graph that can run as one: convolution, batch-norm, a tensor added, activation, pooling of 2x2 pixels.

Or a linear layer and its activation, or a linear layer and a tensor added.

A chain is matched on the graph (`fuse_graph`) and run by a `Chain`, which looks at each call whether it may run as one:
batch-norm must be in eval mode and nobody may watch the layers by hooks. If so, batch-norm's scale and shift are folded
into the convolution's weights, which are kept until a parameter changes; if not, the layers run one by one, and
batch-norm that trains takes what follows it along in its passes over the images (`_train`).
What a call without gradients has found out is kept, too, and the next one checks that it is still so (`_Ready`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from operator import attrgetter, is_, itemgetter
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn import BatchNorm2d, Module
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from cvfast import backend, functional, nn
from cvfast._accelerate import layers
from cvfast._accelerate.plain import unwatched
from cvfast._accelerate.unchanged import Answer, Snapshot, sample

CONVOLUTIONS = (layers.Conv2d, layers.ConvTranspose2d, nn.Conv2d, nn.ConvTranspose2d)
LINEAR = (layers.Linear, nn.Linear)
STARTS = (*CONVOLUTIONS, *LINEAR)  # what a chain starts with; behind a linear layer it has one part and no more
_BEHIND_LINEAR = ("gelu", "gelu_tanh", "silu")  # that take torch so long that a chain's own time doesn't matter


class Activation(NamedTuple):
    """The name of an activation, as the kernels know it, and leaky_relu's slope."""

    name: str
    slope: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Of a tensor that nobody else has."""
        if self.name == "leaky_relu":
            return F.leaky_relu(x, self.slope, inplace=self.slope >= 0)  # others have no derivative in place
        return _FUNCTIONS[self.name](x)


_FUNCTIONS = {
    "relu": torch.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "hardswish": partial(F.hardswish, inplace=True),
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
}
_CALLS = {  # torch's function or the name of a tensor's method -> name; of one argument and in-place or not
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "tanh"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
}
_MODULES = {
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.SiLU: "silu",
    torch.nn.GELU: "gelu",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh",
    torch.nn.Hardswish: "hardswish",
    torch.nn.Hardsigmoid: "hardsigmoid",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by torch's argument `approximate`


def _of_module(module: Module) -> Activation | None:
    name = _MODULES.get(type(module))
    if name == "gelu":
        name = _GELUS.get(module.approximate)
    if name is None:
        return None
    return Activation(name, module.negative_slope) if name == "leaky_relu" else Activation(name)


def _of_call(node: fx.Node) -> Activation | None:
    """Of a node call_function or call_method whose first argument is the chain."""
    name = _CALLS.get(node.target)
    kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if name == "gelu":
        name = _GELUS.get(kwargs.pop("approximate", "none"))
    if name == "leaky_relu":
        more = [*node.args[1:2], *kwargs.values()]
        slope = more[0] if more else 0.01
        return Activation(name, slope) if len(more) < 2 and isinstance(slope, float) else None
    return Activation(name) if name and len(node.args) == 1 and not kwargs else None


# What torch's poolings take after their input, and what it must be: a set, or None where anything will do.
_MAX_POOL = {
    "kernel_size": (2, (2, 2)), "stride": (None, 2, (2, 2)), "padding": (0, (0, 0)), "dilation": (1, (1, 1)),
    "ceil_mode": (False,), "return_indices": (False,),
}  # fmt: skip
_AVERAGE_POOL = {
    "kernel_size": (2, (2, 2)), "stride": (None, 2, (2, 2)), "padding": (0, (0, 0)),
    "ceil_mode": (False,), "count_include_pad": None, "divisor_override": (None,),
}  # fmt: skip
_POOLING_CALLS = {
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), ("max", _MAX_POOL)),
    F.avg_pool2d: ("average", _AVERAGE_POOL),
}
_POOLING_MODULES = {torch.nn.MaxPool2d: ("max", _MAX_POOL), torch.nn.AvgPool2d: ("average", _AVERAGE_POOL)}


def _pooling_of_module(module: Module) -> str | None:
    """ "max" or "average" if it pools 2x2 pixels with stride 2, as functional.conv2d knows it."""
    name, options = _POOLING_MODULES.get(type(module), (None, {}))
    own = module.__dict__
    return name if all([allowed is None or own[o] in allowed for o, allowed in options.items()]) else None


def _pooling_of_call(node: fx.Node) -> str | None:
    """Of a node call_function whose first argument is the chain."""
    name, options = _POOLING_CALLS.get(node.target, (None, {}))
    given = dict(zip(options, node.args[1:], strict=False), **node.kwargs)
    freeze = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    fits = [o in options and (options[o] is None or freeze(v) in options[o]) for o, v in given.items()]
    return name if name and all(fits) and len(node.args) <= 1 + len(options) else None


# Running a chain


class Chain:
    """pooling(activation(norm(conv(input)) + residual)), in one step where that is the same."""

    __name__ = __qualname__ = "chain"  # in the code that torch.fx writes

    def __init__(
        self,
        conv: Module,
        norm: BatchNorm2d | None,
        activation: Module | Activation | None,
        pooling: Module | str | None,
    ) -> None:
        self.layers, self.pooling = (conv, norm, activation), pooling
        self.ready: _Ready | None = None

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if observer is not None:
            return observer(*self.layers, input, residual, self.pooling)
        if torch.compiler.is_compiling():
            return run(*self.layers, input, residual, self.pooling)
        ready = self.ready
        in_one = residual is None or self.pooling is None  # no kernel pools with a residual
        if ready is not None and in_one and ready.holds():
            output = ready.call(input, residual)
            if output is not None:
                return output
        output = run(*self.layers, input, residual, self.pooling)
        self.ready = None if torch.is_grad_enabled() else _Ready.make(*self.layers, self.pooling)
        return output


observer: Callable[..., Tensor] | None = None  # takes the place of `run` while somebody explains


def run(
    conv: Module,
    norm: BatchNorm2d | None,
    activation: Module | Activation | None,
    input: Tensor,
    residual: Tensor | None = None,
    pooling: Module | str | None = None,
) -> Tensor:
    if not runs_as_one(conv, norm, activation, pooling) or (norm is not None and input.dim() != 4):  # which it refuses
        return separately(conv, norm, activation, input, residual, pooling)
    weight, bias = (conv.weight, conv.bias) if norm is None else _folded(conv, norm)
    return _convolve(conv, input, weight, bias, _known(activation), residual, _known_pooling(pooling))


def runs_as_one(
    conv: Module,
    norm: BatchNorm2d | None,
    activation: Module | Activation | None,
    pooling: Module | str | None = None,
) -> bool:
    if (activation is not None and _known(activation) is None) or (pooling is not None and not _known_pooling(pooling)):
        return False
    modules = [m for m in (conv, norm, activation, pooling) if isinstance(m, Module)]
    return _unwatched(modules) and _foldable(conv, norm)


def _known(activation: Module | Activation | None) -> Activation | None:
    return _of_module(activation) if isinstance(activation, Module) else activation


def _known_pooling(pooling: Module | str | None) -> str | None:
    return _pooling_of_module(pooling) if isinstance(pooling, Module) else pooling


def separately(
    conv: Module, norm: Module | None, activation, input: Tensor, residual: Tensor | None, pooling=None
) -> Tensor:
    """The same by calling one layer after the other; batch-norm in training takes what follows it along."""
    output = conv(input)
    if norm is not None:
        if _trains_in_one(norm, activation, pooling, output):
            return _train(norm, _known(activation), output, residual, _known_pooling(pooling))
        output = norm(output)
    if residual is not None:
        output = output + residual
    if activation is not None:
        output = activation(output)
    return pooling(output) if isinstance(pooling, Module) else functional.POOLINGS[pooling or "none"](output)


def _trains_in_one(norm: Module, activation, pooling, input: Tensor) -> bool:
    """Whether `_train` does what the layers do one after the other."""
    if type(norm) is not BatchNorm2d or not norm.training or input.dtype is not torch.float32 or input.dim() != 4:
        return False
    if torch.compiler.is_compiling() or backend.current() == "native" or input.numel() <= input.shape[1]:
        return False
    if (activation is not None and _known(activation) is None) or (pooling is not None and not _known_pooling(pooling)):
        return False
    return _unwatched([m for m in (norm, activation, pooling) if isinstance(m, Module)])


def _train(
    norm: BatchNorm2d, activation: Activation | None, input: Tensor, residual: Tensor | None, pooling: str | None
) -> Tensor:
    """pooling(activation(norm(input) + residual)), and the running statistics' next state."""
    slope = 1.0 if activation is None else {"relu": 0.0, "leaky_relu": activation.slope}.get(activation.name)
    known = slope is not None and 0 <= slope <= 1
    even = input.shape[2] % 2 == input.shape[3] % 2 == 0
    pooled = pooling == "max" and known and residual is None and even
    output, mean, variance = functional.batch_norm(
        input, norm.weight, norm.bias, norm.eps,
        residual=residual, negative_slope=slope if known else 1.0, pooled=pooled,
    )  # fmt: skip
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is not None:
        share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
        with torch.no_grad():
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(variance, share)
    output = output if known else functional.ACTIVATIONS[activation.name](output, activation.slope)
    return output if pooled else functional.POOLINGS[pooling or "none"](output)


def _convolve(
    conv: Module,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    residual: Tensor | None,
    pooling: str | None,
) -> Tensor:
    """activation(conv's operation with this weight and bias + residual), pooled."""
    name, slope = ("none", 0.0) if activation is None else activation
    if isinstance(conv, LINEAR):
        output = functional.linear(input, weight, bias, activation=name, negative_slope=slope)
        return output if residual is None else _with(residual, output)
    if _is_added_in_place(conv, input, weight, residual):
        return conv._conv_forward(
            input, weight, bias, activation=name, negative_slope=slope, residual=residual, pooling=pooling or "none"
        )
    if isinstance(conv, torch.nn.ConvTranspose2d):
        own, activation = (name, None) if residual is None else ("none", activation)
        output = functional.conv_transpose2d(
            input, weight, bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation,
            activation=own, negative_slope=slope,
        )  # fmt: skip
    else:
        output = conv._conv_forward(input, weight, bias)
    if residual is not None:
        output = _with(residual, output)
    return functional.POOLINGS[pooling or "none"](output if activation is None else activation(output))


def _with(residual: Tensor, output: Tensor) -> Tensor:
    """The sum of the two, in place of `output`, which nobody else has, where it fits."""
    same = residual.shape == output.shape and residual.dtype == output.dtype
    return output.add_(residual) if same else output + residual


def _is_added_in_place(conv: Module, input: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether cvfast's conv2d takes `residual` as it is: of the result's own size, not one that is broadcast."""
    if isinstance(conv, torch.nn.ConvTranspose2d):
        return False
    if residual is None:
        return True
    if input.dim() != 4 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    size = functional.conv2d_size(input, weight, conv.stride, conv.padding, conv.dilation)
    return residual.shape == size and residual.dtype is input.dtype and residual.device == input.device


def _unwatched(modules: list[Module]) -> bool:
    """Whether no hook would see what a chain leaves out."""
    return not _has_any_global_hook() and all(map(unwatched, modules))


def _foldable(conv: Module, norm: Module | None) -> bool:
    if type(conv) not in STARTS:
        return False
    if norm is None:
        return True
    if type(norm) is not BatchNorm2d or norm.training:
        return False
    weight, _, _, _, mean, variance = _sources(conv, norm)
    return weight is not None and mean is not None and variance is not None and mean.dtype is weight.dtype


def _sources(conv: Module, norm: BatchNorm2d) -> tuple[Tensor | None, ...]:
    """What is folded: weight and bias of both, mean and variance; past Module.__getattr__, which takes 0.4 µs each."""
    own, norms, statistics = conv._parameters, norm._parameters, norm._buffers
    return (
        own.get("weight"), own.get("bias"), norms.get("weight"), norms.get("bias"),
        statistics.get("running_mean"), statistics.get("running_var"),
    )  # fmt: skip


def _given(sources: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [t for t in sources if t is not None]


def _state(tensors: list[Tensor]) -> list[int]:
    """How often they were written to, where they lie, and some of their elements."""
    return [*map(_VERSION, tensors), *map(Tensor.data_ptr, tensors), *map(sample, tensors)]


_VERSION = attrgetter("_version")


class _Kept(NamedTuple):
    """eps, and the sources with their versions and places, from which weight and bias were made."""

    eps: float
    sources: tuple[Tensor | None, ...]  # held, so that no other tensor takes their place in memory
    state: list[int]
    weight: Tensor
    bias: Tensor


_kept: WeakKeyDictionary[Module, _Kept] = WeakKeyDictionary()


def _folded(conv: Module, norm: BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias with which the convolution computes norm(conv(x)).

    A parameter's change is seen by its version, its place in memory and a sample of its elements; a write past autograd
    (`.data`, NumPy) that leaves all of the sample alone is not: then call `cvfast.accelerate` again.
    """
    sources = _sources(conv, norm)
    if not _may_keep(sources):
        return _fold(conv, norm.eps, *sources)
    state = _state(_given(sources))
    kept = _kept.get(conv)
    if kept is None or kept.state != state or kept.eps != norm.eps or not all(map(is_, kept.sources, sources)):
        with torch.inference_mode(False), torch.no_grad():
            exact = (None if t is None else t.double() for t in sources)
            weight, bias = (t.to(sources[0].dtype) for t in _fold(conv, norm.eps, *exact))
        _kept[conv] = kept = _Kept(norm.eps, sources, state, weight, bias)
    return kept.weight, kept.bias


def _may_keep(sources: tuple[Tensor | None, ...]) -> bool:
    """Whether these are ordinary tensors and nobody asks for derivatives or traces."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*sources))
    ):
        return False
    return not any([t.is_inference() for t in _given(sources)])  # those have no version


def forget(conv: Module | None = None) -> None:
    """Drops the folded weights that are kept for `conv`; None: for all."""
    if conv is None:
        _kept.clear()
    else:
        _kept.pop(conv, None)


def folded(conv: Module) -> list[Tensor]:
    """The folded weight and bias that are kept for `conv`, if any are."""
    kept = _kept.get(conv)
    return [] if kept is None else [kept.weight, kept.bias]


class _Ready:
    """A chain's call with all that it found out about the layers, for inputs that need no derivative."""

    @staticmethod
    def make(
        conv: Module, norm: Module | None, activation: Module | Activation | None, pooling: Module | str | None
    ) -> _Ready | None:
        """None where this is no single call of conv2d or linear."""
        if not runs_as_one(conv, norm, activation, pooling):
            return None
        sources = (conv.weight, conv.bias) if norm is None else _sources(conv, norm)
        if not _may_keep(sources):
            return None
        state = _state(_given(sources))  # before what is made of them
        weight, bias = sources if norm is None else _folded(conv, norm)
        operands = weight, bias, _known(activation), _known_pooling(pooling)
        call = _prepared(conv, *operands)
        return None if call is None else _Ready(conv, norm, activation, pooling, sources, state, call, operands)

    def __init__(
        self,
        conv: Module,
        norm: Module | None,
        activation: Module | Activation | None,
        pooling: Module | str | None,
        sources: tuple[Tensor | None, ...],
        state: list[int],
        call: Callable[[Tensor, Tensor | None], Tensor | None],
        operands: tuple[Tensor, Tensor | None, Activation | None, str | None],
    ) -> None:
        self.call, self.operands = call, operands
        self.conv, self.norm = conv, norm
        self.sources, self.tensors, self.state = sources, _given(sources), state
        self.modules = [(m, type(m)) for m in (conv, norm, activation, pooling) if isinstance(m, Module)]
        options = [(m, itemgetter(*_OPTIONS[cls])) for m, cls in self.modules if cls in _OPTIONS]
        self.options = [(m, of, of(m.__dict__)) for m, of in options]
        self.holds = Answer(self.is_still_so, self.look)

    def is_still_so(self) -> bool:
        """Whether all that was found out about the layers is as it was."""
        if _has_any_global_hook():
            return False
        for module, cls in self.modules:
            if type(module) is not cls or not unwatched(module):
                return False
        for module, of, before in self.options:
            if of(module.__dict__) != before:
                return False
        conv, norm = self.conv, self.norm
        if "_conv_forward" in conv.__dict__:
            return False
        own = conv._parameters
        sources = (own["weight"], own["bias"]) if norm is None else _sources(conv, norm)
        return all(map(is_, sources, self.sources)) and _state(self.tensors) == self.state

    def step(self, input: int, residual: int) -> functional.Step:
        """Of a convolution, in a row of them."""
        weight, bias, activation, pooling = self.operands
        name, slope = activation or ("none", 0.0)
        options = self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups
        own = self.norm is not None  # folded
        return functional.Step(input, residual, name, slope, pooling or "none", weight, bias, options, own_weight=own)

    def look(self, snapshot: Snapshot) -> None:
        """Notes what `is_still_so` asks for."""
        for module, cls in self.modules:
            snapshot.unwatched(module)
            snapshot.entries(module, _OPTIONS.get(cls, ()))
        snapshot.entries(self.conv, ("_conv_forward",))
        snapshot.tensors(self.conv, "_parameters", ("weight", "bias"))
        if self.norm is not None:
            snapshot.tensors(self.norm, "_parameters", ("weight", "bias"))
            snapshot.tensors(self.norm, "_buffers", ("running_mean", "running_var"))


_OPTIONS = {  # what a chain's call depends on besides parameters and buffers
    **dict.fromkeys(CONVOLUTIONS, ("stride", "padding", "dilation", "groups", "padding_mode")),
    BatchNorm2d: ("training", "eps"),
    torch.nn.GELU: ("approximate",),
    torch.nn.LeakyReLU: ("negative_slope",),
    torch.nn.MaxPool2d: tuple(_MAX_POOL),
    torch.nn.AvgPool2d: tuple(_AVERAGE_POOL),
}


def _prepared(
    conv: Module, weight: Tensor, bias: Tensor | None, activation: Activation | None, pooling: str | None
) -> Callable[[Tensor, Tensor | None], Tensor | None] | None:
    """`_convolve` for many inputs, as functional prepares it."""
    name, slope = ("none", 0.0) if activation is None else activation
    if isinstance(conv, LINEAR):
        return functional.prepared_linear(weight, bias, activation=name, negative_slope=slope)
    if not isinstance(conv, torch.nn.Conv2d) or conv.padding_mode != "zeros" or "_conv_forward" in conv.__dict__:
        return None
    options = conv.stride, conv.padding, conv.dilation, conv.groups
    return functional.prepared_conv2d(
        weight, bias, *options, activation=name, negative_slope=slope, pooling=pooling or "none"
    )


def _fold(
    conv: Module,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(variance + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean if bias is None else bias - mean
    shift = shift * scale if beta is None else shift * scale + beta
    if isinstance(
        conv, torch.nn.ConvTranspose2d
    ):  # weight [C, K/groups, R, S], channel k of group g is g * K/groups + k
        groups = conv.groups
        grouped = weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, 1, 1)
        return grouped.flatten(0, 1), shift
    return weight * scale.view(-1, 1, 1, 1), shift


# Finding chains


class Found(NamedTuple):
    """A chain by the names of its modules in the module whose graph it is in; the functions' names in brackets."""

    conv: str
    norm: str | None
    residual: bool
    activation: str | None
    pooling: str | None

    def __str__(self) -> str:
        parts = [self.norm, "add" if self.residual else None, self.activation, self.pooling]
        return " + ".join([self.conv, *(p for p in parts if p is not None)])


def fuse_graph(graph: fx.Graph, root: Module) -> list[Found]:
    """Replaces the chains of `graph` by calls of `chain`; what they are made of."""
    found = []
    module = partial(_module, root=root)
    for node in list(graph.nodes):
        if type(module(node)) in STARTS and _one_argument(node):
            links = _links(node, root)
            while len(links) > 1 and not (_movable(links) and _unwatched([*filter(None, map(module, links))])):
                links.pop()
            if len(links) > 1:
                found.append(_replace(graph, root, links))
    return found


def _module(node: fx.Node, root: Module) -> Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None


def _one_argument(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def _links(conv: fx.Node, root: Module) -> list[fx.Node]:
    """The nodes of the longest chain that starts at `conv`: each is the only user of the one before."""
    links = [conv]

    def extend(fits) -> None:
        users = list(links[-1].users)
        if len(users) == 1 and fits(users[0]):
            links.append(users[0])

    if type(_module(conv, root)) in LINEAR:
        extend(
            lambda node: (
                getattr(_activation(node, root), "name", None) in _BEHIND_LINEAR or _residual(node, conv) is not None
            )
        )
        return links
    extend(lambda node: _is_norm(node, root))
    extend(lambda node: _residual(node, links[-1]) is not None)
    extend(lambda node: _activation(node, root) is not None)
    extend(lambda node: _pooling(node, root) is not None)
    return links


def _is_norm(node: fx.Node, root: Module) -> bool:
    norm = _module(node, root)
    return type(norm) is BatchNorm2d and _one_argument(node) and norm.running_mean is not None


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def _residual(node: fx.Node, end: fx.Node) -> fx.Node | None:
    """What `node` adds to the chain that ends at `end`; None if it doesn't add a tensor."""
    first_only = node.target in (operator.iadd, "add_")
    if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if left is end and isinstance(right, fx.Node) and right is not end:
        return right
    return left if right is end and isinstance(left, fx.Node) and left is not end and not first_only else None


def _activation(node: fx.Node, root: Module) -> Activation | None:
    module = _module(node, root)
    if module is not None:
        return _of_module(module) if _one_argument(node) else None
    return _of_call(node) if node.op in ("call_function", "call_method") else None


def activation_of(node: fx.Node, root: Module) -> Module | Activation | None:
    """The activation that a node is, as a Chain takes it."""
    if _activation(node, root) is None:
        return None
    return _module(node, root) if node.op == "call_module" else _of_call(node)


def _pooling(node: fx.Node, root: Module) -> str | None:
    module = _module(node, root)
    if module is not None:
        return _pooling_of_module(module) if _one_argument(node) else None
    return _pooling_of_call(node) if node.op == "call_function" else None


def _addition(links: list[fx.Node]) -> fx.Node | None:
    """The node that adds a tensor to the chain."""
    return next((n for n in links if n.op != "call_module" and n.target in _ADDITIONS), None)


def _movable(links: list[fx.Node]) -> bool:
    """Whether the links may run at one place.

    Nobody else has what they hand on, so without another tensor they may all run where the convolution does. With one,
    they run where the chain ends. The convolution may wait until then if nothing lies between, or nothing that could
    change its input in place: no other node has that, and it is a new tensor, made by another chain.
    """
    if _addition(links) is None:
        return True
    node, end = links[0], links[-1]
    while node is not end:
        node = node.next
        if node not in links:
            input = links[0].args[0]
            return isinstance(input, fx.Node) and isinstance(input.target, Chain) and len(input.users) == 1
    return True


def _replace(graph: fx.Graph, root: Module, links: list[fx.Node]) -> Found:
    conv, *rest = links
    norm, activation, pooling = (
        next((n for n in rest if is_such(n, root)), None) for is_such in (_is_norm, _activation, _pooling)
    )
    add = _addition(rest)
    residual = None if add is None else _residual(add, conv if norm is None else norm)

    def part(node: fx.Node | None, of_call: Callable | None = None):
        if node is None or node.op != "call_module":
            return None if node is None else of_call(node)
        return _module(node, root)

    chain = Chain(part(conv), part(norm), part(activation, _of_call), part(pooling, _pooling_of_call))
    with graph.inserting_before(conv if add is None else links[-1]):
        new = graph.call_function(chain, (conv.args[0], residual))
    links[-1].replace_all_uses_with(new)
    for node in reversed(links):
        graph.erase_node(node)

    def name(node: fx.Node | None, of_call: Callable) -> str | None:
        if node is None or node.op == "call_module":
            return None if node is None else str(node.target)
        return f"({of_call(node)})"

    names = name(activation, lambda node: _of_call(node).name), name(pooling, _pooling_of_call)
    return Found(conv.target, None if norm is None else norm.target, add is not None, *names)
