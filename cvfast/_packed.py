"""Weights in the form in which kernels read them, kept from call to call while they do not change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class _Kept:
    """state: which tensors these are, where they lie and how often they were written to.

    forms: what was packed, by form. calls: the same, by the calls that take it; None where a call takes none.
    """

    anchor: weakref.ref
    state: list
    forms: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[Hashable, Tensor | None] = field(default_factory=dict)


_kept: dict[int, _Kept] = {}  # by id of the first weight, whose end is the entry's
_MOST_CALLS = 64  # that an entry knows: images of that many sizes


def packed(
    call: Hashable, form: Callable[[], int], pack: Callable[[], Tensor], *weights: Tensor | None
) -> Tensor | None:
    """`pack()`, kept while the weights stay the same tensors, at the same address, in the same version.

    call: all but the weights on which it depends in which form a kernel takes them. form: a number of that form, 0 if
    packing does not pay; calls of one form share what was packed. The first weight must not be None.

    None at the first call with these weights in this state, when nobody knows that a second one follows: a training
    step, say, changes them after each call. Writes that torch does not count, those through `.data` or numpy, are for
    the kernels to notice: what they packed carries a sample of the weights.
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
    try:
        return entry.calls[call]
    except KeyError:
        if len(entry.calls) >= _MOST_CALLS:
            entry.calls.clear()
        entry.calls[call] = result = _in_form(entry, form(), pack)
        return result


def when_dropped(weights: Iterable[Tensor], call: Callable[[], None]) -> list[weakref.ref]:
    """`call()` once what is kept for one of the weights is dropped, as long as the result is held."""
    entries = [_kept[id(w)] for w in weights if id(w) in _kept and _kept[id(w)].anchor() is w]
    return [weakref.ref(entry, lambda _: call()) for entry in entries]


def _in_form(entry: _Kept, form: int, pack: Callable[[], Tensor]) -> Tensor | None:
    if form and form not in entry.forms:
        entry.forms[form] = pack()
    return entry.forms.get(form)


def _forget(key: int, ref: weakref.ref) -> None:
    if key in _kept and _kept[key].anchor is ref:
        del _kept[key]


def packed_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes of what is kept for these weights."""
    entries = [_kept[id(w)] for w in weights if id(w) in _kept and _kept[id(w)].anchor() is w]
    return sum(form.nbytes for entry in entries for form in entry.forms.values())


def free(weights: Iterable[Tensor] | None = None) -> None:
    """Drops what is kept for these weights, or (None) for all. It is packed again when it is used again."""
    for key in list(_kept) if weights is None else [id(w) for w in weights]:
        _kept.pop(key, None)
