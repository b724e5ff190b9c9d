"""Modules whose own forward runs its chains as one.

Such a module changes its class to a subclass of its own (one per class), whose forward runs the rewritten graph as
long as all that the graph depends on is as it was, and the module's own code otherwise. The graph reaches into
submodules whose forwards are proved, too, while nobody watches them; other submodules stay modules that are called,
hooks included, unless they are in a chain.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Proxy
from torch.nn import Module

from cvfast._accelerate import plain
from cvfast._accelerate.chains import CONVOLUTIONS, STARTS, Found, forget, fuse_graph
from cvfast._accelerate.classifier import replace_ends
from cvfast._accelerate.encoder import join_halves
from cvfast._accelerate.plain import original
from cvfast._accelerate.sequences import join_neighbours

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
    if is_fused(module):
        module.__class__ = original(type(module))
        module.__dict__.pop(_PLAN, None)
    if isinstance(module, CONVOLUTIONS):
        forget(module)


def is_fused(module: Module) -> bool:
    """Whether `module` runs chains."""
    return original(type(module)) is not type(module)


def make_plan(module: Module) -> Plan:
    """The plan for a module that is not fused; raises plain.NotPlain where its chains cannot be proved."""
    cls = type(module)
    if not module._modules or not any(isinstance(m, STARTS) for m in module.modules()):
        return Plan(cls.forward, plain.Facts(), [])
    graph, facts = plain.trace(module, lambda m: isinstance(m, STARTS))
    chains = fuse_graph(graph, module)
    join_halves(graph, module)
    replace_ends(graph, module)
    join_neighbours(graph)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<cvfast: {cls.__name__}.forward with chains>", "exec"), namespace)
    return Plan(namespace["forward"], facts, chains)


@functools.cache
def _fused_class(cls: type[Module]) -> type[Module]:
    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        plan = self.__dict__.get(_PLAN)
        recorded = any(isinstance(arg, Proxy) for arg in (*args, *kwargs.values()))  # by torch.fx, layer by layer
        if plan is not None and not recorded and plan.facts.hold():
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
