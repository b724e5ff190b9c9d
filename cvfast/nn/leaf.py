"""torch.fx records a layer of cvfast as one node, as it does torch's own, which its tracers know by their package."""

from __future__ import annotations

from torch.fx import Proxy
from torch.nn import Module


def is_recorded(module: Module, input) -> bool:
    """Whether this call of a layer's forward is being recorded, and the forward is cvfast's, not a subclass's."""
    return isinstance(input, Proxy) and type(module).forward.__module__.startswith("cvfast.nn.")


def node(module: Module, input: Proxy, *args, **kwargs) -> Proxy:
    """The call as a node of the graph."""
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), kwargs)
