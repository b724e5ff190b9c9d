"""The form of an operator's card, and its registration with torch's dispatcher.

A card is written once and registered for two namespaces: `torch.ops.cvfast` (implemented by the compiled libraries)
and `torch.ops.cvfast_triton` (implemented by Triton kernels). Each has a twin, `torch.ops.<namespace>_kernels`, with
the same operators and implementations but no derivatives: a call through it costs a quarter less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

NAMESPACES = ("cvfast", "cvfast_triton")


@dataclass(frozen=True)
class Card:
    """What torch knows of one operator.

    schema: torch's schema string, without a namespace.
    fake: the result for fake tensors, with the kernel's exact strides.
    setup_context: `(ctx, inputs, output)`, keeps what backward needs.
    backward: `(ops, ctx, needs, *grads)`, one gradient per argument, None where `needs` (a bool per argument) says so;
        `ops` is the namespace (torch.ops.cvfast, say) of the operator that ran, so that a derivative runs on the
        backend of its forward. It is made of operators called through `call`, hence differentiable itself.
    vmap: `(ops, info, in_dims, *args)`, as torch.library.register_vmap takes it, behind the namespace.
    casts: whether autocast casts the arguments; not where some must keep their dtype.
    """

    schema: str
    fake: Callable
    setup_context: Callable
    backward: Callable
    vmap: Callable
    casts: bool = True

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def register(cards: Sequence[Card]) -> None:
    """Defines the operators of `cards` in every namespace and its twin."""
    for namespace in NAMESPACES:
        library = torch.library.Library(namespace, "FRAGMENT")
        twin = torch.library.Library(f"{namespace}_kernels", "FRAGMENT")
        _libraries.extend((library, twin))
        for card in cards:
            op = _define(card, library)
            _kernels[op] = _called(_define(card, twin))
            twin.impl(card.name, torch.library.fallthrough_kernel, "Autograd")
            _transformations(card, op, library)


_libraries: list[torch.library.Library] = []  # a Library takes its registrations back when it is collected
_kernels: dict[torch._ops.OpOverload, Callable] = {}  # operator -> its twin


def define_kernel(namespace: str, schema: str) -> Callable:
    """An operator of the twin of `namespace` alone: for calls that are not `watched` and need no derivative."""
    library, name = torch.library.Library(f"{namespace}_kernels", "FRAGMENT"), schema.partition("(")[0]
    _libraries.append(library)
    library.define(schema)
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    packet, _, overload = name.partition(".")
    return _called(getattr(getattr(getattr(torch.ops, library.ns), packet), overload or "default"))


def _called(op: torch._ops.OpOverload) -> Callable:
    """The operator for whoever just calls it: without the Python in front of it (0.3 µs)."""
    return op._op


kernel = partial(define_kernel, "cvfast")  # an operator of the compiled libraries alone


def _define(card: Card, library: torch.library.Library) -> torch._ops.OpOverload:
    library.define(card.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    torch.library.register_fake(f"{library.ns}::{card.name}", card.fake, lib=library)
    return getattr(getattr(torch.ops, library.ns), card.name).default


def _transformations(card: Card, op: torch._ops.OpOverload, library: torch.library.Library) -> None:
    """Gradients, vmap and autocast of `op`."""
    ops = getattr(torch.ops, library.ns)
    torch.library.register_vmap(f"{library.ns}::{card.name}", partial(card.vmap, ops), lib=library)
    _differentiable[op] = _function(card, ops)
    library.impl(card.name, partial(_autograd, op), "Autograd", with_keyset=True)
    for device in ("CPU", "CUDA") if card.casts else ():
        library.impl(card.name, partial(_autocast, op, device.lower()), f"Autocast{device}")


# Derivatives. torch.library.register_autograd would do the same at twice the time per call.

_differentiable: dict[torch._ops.OpOverload, Callable] = {}  # operator -> (run, *args) -> result that autograd knows


def _function(card: Card, ops) -> Callable:
    """The operator as a torch.autograd.Function: `run(*args)` computes the result without its derivative."""

    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, run, *args):
            output = run(*args)
            card.setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, *card.backward(ops, ctx, ctx.needs_input_grad[1:], *grads)

    Function.__name__ = Function.__qualname__ = card.name
    return Function.apply


def asked_for(ctx) -> tuple[bool, ...]:
    """ctx.needs_input_grad without those for which nobody asks in this backward pass; torch tells its own operators.

    Takes 1 µs, but 20 µs for each leaf whose gradient torch.autograd.grad is to return.
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of the arguments that need gradients
    return tuple(need and _runs(next(nodes)) for need in ctx.needs_input_grad)


def _runs(node) -> bool:
    """Whether the backward pass comes to this node."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # which is a leaf whose gradient torch.autograd.grad returns
        return True


def _autograd(op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, *args):
    """The operator's kernel for the dispatcher's autograd key."""
    keyset = keyset & torch._C._after_autograd_keyset

    def run(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset, *args)

    def run_next_level(*args):  # derivatives of derivatives: the level below has its own graph
        with torch.enable_grad():
            return run(*args)

    if derives(args):
        if transforms() is None:
            return _differentiable[op](run, *args)
        with enable_single_level_autograd_function():
            return _differentiable[op](run_next_level, *args)
    return run(*args)


def call(op: torch._ops.OpOverload, *args):
    """Calls an operator without the detour through the dispatcher's autograd key, which is Python that C++ calls back.

    What must see the operator as the dispatcher has it does: tracers, modes, torch.func's transforms, autocast.
    """
    if watched(args[0]):
        return op(*args)
    return _differentiable[op](_kernels[op], *args) if derives(args) else _kernels[op](*args)


def watched(tensor: Tensor) -> bool:
    """Whether a tracer, a mode, a transform of torch.func, autocast or the meta device is to see an operator's call."""
    return (
        torch.compiler.is_compiling()
        or transforms() is not None
        or _modes() > 0
        or tensor.is_meta
        or torch.is_autocast_enabled("cpu" if tensor.is_cpu else tensor.device.type)
    )


def derives(args: tuple) -> bool:
    """Whether autograd is to know of the call; in forward mode, for it to say that there is no such derivative."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args) or forward_ad._current_level >= 0


transforms = torch._C._functorch.peek_interpreter_stack  # None where none of torch.func's is active
_modes = torch._C._len_torch_dispatch_stack


def looped(op: Callable, info, in_dims: tuple[int | None, ...], args: tuple):
    """A vmap rule for what no kernel does at once: the operator for one after the other of vmap's samples."""
    results = [
        op(*(a.select(d, i) if d is not None else a for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), tuple(0 for _ in results[0])


def autocast_dtype(tensor: Tensor, device: str) -> torch.dtype:
    """The dtype in which an operator will see `tensor`, on `device`: autocast's where that is on (never of float64)."""
    dtype = tensor.dtype
    if torch.is_autocast_enabled(device) and dtype.is_floating_point and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _autocast(op: Callable, device: str, *args):
    """Runs `op` with its tensors in autocast's dtype."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    casts = lambda arg: isinstance(arg, Tensor) and arg.device.type == device  # noqa: E731
    cast = [arg.to(autocast_dtype(arg, device)) if casts(arg) else arg for arg in args]
    with torch._C._ExcludeDispatchKeyGuard(key):
        return op(*cast)
