"""Modules whose own forward runs its chains as one.

Such a module changes its class to a subclass of its own (one per class), whose forward runs the rewritten graph as
long as all that the graph depends on is as it was, and the module's own code otherwise. What a module's forward does
with its submodules is all that changes; every submodule stays a module that is called, hooks included, unless it is in
a chain.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import Module

from cvfast._accelerate import plain
from cvfast._accelerate.chains import CONVOLUTIONS, Found, forget, fuse_graph

_PLAN = "_cvfast_plan"


@dataclass
class Plan:
    """`run(module, *args)`: the module's forward with chains; what it depends on; the chains."""

    run: Callable
    facts: plain.Facts
    chains: list[Found]

    def __deepcopy__(self, memo) -> Plan:
        return self  # it holds for one module, so for the copy it does not hold


def fuse(model: Module) -> None:
    """Fuses the chains of `model` and its submodules where the source of their forward proves that it is right."""
    for module in model.modules():
        _unfuse_one(module)
        _fuse_one(module)


def _fuse_one(module: Module) -> None:
    try:
        plan = make_plan(module)
    except plain.NotPlain:
        return
    if plan.chains:
        module.__class__ = _fused_class(type(module))
        module.__dict__[_PLAN] = plan


def unfuse(model: Module) -> None:
    """Undoes `fuse`."""
    for module in model.modules():
        _unfuse_one(module)


def _unfuse_one(module: Module) -> None:
    before = original(type(module))
    if before is not None:
        module.__class__ = before
        module.__dict__.pop(_PLAN, None)
    if isinstance(module, CONVOLUTIONS):
        forget(module)


def original(cls: type[Module]) -> type[Module] | None:
    """The class that a fused module had before; None for others."""
    return cls.__dict__.get("_cvfast_original")


_OWN = ("__call__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__getnewargs__", "__getnewargs_ex__")


def make_plan(module: Module) -> Plan:
    """The plan for a module that is not fused; raises plain.NotPlain where its chains cannot be proved."""
    cls = type(module)
    if not module._modules or not any(isinstance(m, CONVOLUTIONS) for m in module.modules()):
        return Plan(cls.forward, plain.Facts(), [])
    if "forward" in module.__dict__:
        raise plain.NotPlain("its forward was replaced on this very module")
    own = [name for name in _OWN if getattr(cls, name, None) is not getattr(Module, name, None)]
    if own or isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        raise plain.NotPlain("its class has its own way of being called or copied")
    graph, facts = plain.trace(module)
    chains = fuse_graph(graph, module)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<cvfast: {cls.__name__}.forward with chains>", "exec"), namespace)
    return Plan(namespace["forward"], facts, chains)


@functools.cache
def _fused_class(cls: type[Module]) -> type[Module]:
    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        plan = self.__dict__.get(_PLAN)
        if plan is not None and plan.facts.hold():
            return plan.run(self, *args, **kwargs)
        return cls.forward(self, *args, **kwargs)

    def reduce(self, protocol):
        make, (_, *args), state, *rest = super(fused, self).__reduce_ex__(max(2, protocol))
        assert make is copyreg.__newobj__
        state = {k: v for k, v in state.items() if k != _PLAN}
        return _revive, (cls, *args), state, *rest

    def setstate(self, state):
        self.__class__ = cls
        self.__setstate__(state)
        _fuse_one(self)

    fused = type(
        cls.__name__,
        (cls,),
        {
            "forward": forward,
            "__reduce_ex__": reduce,
            "__setstate__": setstate,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_cvfast_original": cls,
        },
    )
    return fused


def _revive(cls: type[Module], *args) -> Module:
    """An empty module of `cls`, fused; its state comes next."""
    fused = _fused_class(cls)
    return fused.__new__(fused, *args)
