"""The form of an operator's card, and its registration with torch's dispatcher.

A card is written once and registered for two namespaces: `torch.ops.cvfast` (implemented by the compiled libraries)
and `torch.ops.cvfast_triton` (implemented by Triton kernels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

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
    """

    schema: str
    fake: Callable
    setup_context: Callable
    backward: Callable
    vmap: Callable

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def register(cards: Sequence[Card]) -> None:
    """Defines the operators of `cards` in every namespace."""
    for namespace in NAMESPACES:
        library = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(library)
        for card in cards:
            _register(card, namespace, library)


_libraries: list[torch.library.Library] = []  # a Library takes its registrations back when it is collected


def _register(card: Card, namespace: str, library: torch.library.Library) -> None:
    name, ops = f"{namespace}::{card.name}", getattr(torch.ops, namespace)
    library.define(card.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    op = getattr(ops, card.name).default
    torch.library.register_fake(name, card.fake, lib=library)
    torch.library.register_vmap(name, partial(card.vmap, ops), lib=library)
    _differentiable[op] = _function(card, ops)
    library.impl(card.name, partial(_autograd, op), "Autograd", with_keyset=True)
    for device in ("CPU", "CUDA"):
        library.impl(card.name, partial(_autocast, op, device.lower()), f"Autocast{device}")


# Derivatives. torch.library.register_autograd would do the same at twice the time per call.

_differentiable: dict[torch._ops.OpOverload, Callable] = {}  # operator -> (run, *args) -> result that autograd knows


def _function(card: Card, ops) -> Callable:
    """The operator as a torch.autograd.Function: `run(*args)` computes the result, here below autograd."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, *args):
            output = _below_autograd(run, *args)
            card.setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, *card.backward(ops, ctx, ctx.needs_input_grad[1:], *grads)

    Function.__name__ = Function.__qualname__ = card.name
    return Function.apply


def _autograd(op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, *args):
    """The operator's kernel for the dispatcher's autograd key."""
    return _run(op, partial(op.redispatch, keyset & torch._C._after_autograd_keyset), args)


def call(op: torch._ops.OpOverload, *args):
    """Calls an operator without the detour through the dispatcher's autograd key, which is Python that C++ calls back.

    Tracers and torch.func's transforms, which must see the operator as the dispatcher has it, do.
    """
    if torch.compiler.is_compiling() or _transforms() is not None or torch.is_autocast_enabled(args[0].device.type):
        return op(*args)
    return _run(op, op, args)


_transforms = torch._C._functorch.peek_interpreter_stack


def _run(op: torch._ops.OpOverload, run: Callable, args: tuple):
    """`run(*args)`, which computes the result of `op`, with its derivative where one is asked for."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _differentiable[op](run, *args)
    return _below_autograd(run, *args)


def _below_autograd(run: Callable, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return run(*args)


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
