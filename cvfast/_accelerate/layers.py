"""torch's layers become cvfast's in place, and torch's again.

A layer changes its class and nothing else, so its parameters, buffers, hooks, names and mode stay, and so does
everything that refers to it. The class is the only mark of a swapped layer: cvfast's layers that a model had before
are no stand-ins, and `restore` leaves them alone.
"""

from __future__ import annotations

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from cvfast import nn


def _stand_in(layer: type[Module]) -> type[Module]:
    return type(layer.__name__, (layer,), {"__module__": __name__, "__doc__": layer.__doc__})


Conv2d = _stand_in(nn.Conv2d)
ConvTranspose2d = _stand_in(nn.ConvTranspose2d)
Linear = _stand_in(nn.Linear)
LSTM = _stand_in(nn.LSTM)
GRU = _stand_in(nn.GRU)
RNN = _stand_in(nn.RNN)
LSTMCell = _stand_in(nn.LSTMCell)
GRUCell = _stand_in(nn.GRUCell)
RNNCell = _stand_in(nn.RNNCell)
MultiheadAttention = _stand_in(nn.MultiheadAttention)

STAND_INS: dict[type[Module], type[Module]] = {
    getattr(torch.nn, cls.__name__): cls
    for cls in (Conv2d, ConvTranspose2d, Linear, LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell, MultiheadAttention)
}
ORIGINALS = {stand_in: original for original, stand_in in STAND_INS.items()}
SWAPPABLE = tuple(STAND_INS)
_FORWARDS = ("forward", "_conv_forward")


def swap(module: Module) -> None:
    """`module` as cvfast's layer, if it is one of torch's and nothing but torch's."""
    if why_kept(module) is None:
        _change_base(module, STAND_INS)


def restore(module: Module) -> None:
    """Undoes `swap`."""
    _change_base(module, ORIGINALS)


def why_kept(module: Module) -> str | None:
    """Why `swap` leaves this layer as it is; None: it does not."""
    base = parametrize.type_before_parametrizations(module)
    if base not in STAND_INS:
        return f"{base.__name__} is not one of torch's layers that cvfast has, but a class of its own"
    if any(name in module.__dict__ for name in _FORWARDS):
        return "its forward was replaced on this very layer"
    return None


def _change_base(module: Module, change: dict[type[Module], type[Module]]) -> None:
    cls = type(module)
    if cls in change:
        module.__class__ = change[cls]
    elif parametrize.is_parametrized(module) and cls.__bases__[0] in change:
        module.__class__ = _parametrized(cls, change[cls.__bases__[0]])


def _parametrized(cls: type[Module], base: type[Module]) -> type[Module]:
    """torch's class of a parametrized layer (made for it alone, with a property per tensor) on another base."""
    before = cls.__dict__.get("_cvfast_before")
    if before is not None and before.__bases__[0] is base and _own(before).keys() == _own(cls).keys():
        return before
    return type(f"Parametrized{base.__name__}", (base,), {**_own(cls), "_cvfast_before": cls})


def _own(cls: type[Module]) -> dict[str, object]:
    """The class's own attributes, but for what Python adds by itself."""
    added = ("__dict__", "__weakref__", "__slotnames__", "_cvfast_before")
    return {k: v for k, v in vars(cls).items() if k not in added}
