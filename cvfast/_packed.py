"""Weights in the form in which kernels read them, kept from call to call while they do not change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class _Kept:
    """state: which tensors these are, where they lie and how often they were written to."""

    anchor: weakref.ref
    state: list
    packed: Tensor | None = None


_kept: dict[int, _Kept] = {}  # by id of the first weight, whose end is the entry's


def packed(pack: Callable[..., Tensor], *weights: Tensor | None) -> Tensor | None:
    """`pack(*weights)`, kept while the weights stay the same tensors, at the same address, in the same version.

    None at the first call with these weights in this state, when nobody knows that a second one follows: a training
    step, say, changes them after each call. The first weight must not be None. Writes that torch does not count, those
    through `.data` or numpy, are for the kernels to notice: what they packed carries a sample of the weights.
    """
    anchor = weights[0]
    try:
        state = [None if w is None else (id(w), w.data_ptr(), w._version) for w in weights]
    except RuntimeError:  # tensors of torch.inference_mode count no versions
        return None
    key = id(anchor)
    entry = _kept.get(key)
    if entry is None or entry.anchor() is not anchor or entry.state != state:
        _kept[key] = _Kept(weakref.ref(anchor, lambda ref: _forget(key, ref)), state)
        return None
    if entry.packed is None:
        entry.packed = pack(*weights)
    return entry.packed


def _forget(key: int, ref: weakref.ref) -> None:
    if key in _kept and _kept[key].anchor is ref:
        del _kept[key]
