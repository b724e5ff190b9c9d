"""The time of a call, the least of several; and cvfast.tune()."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import Module

from cvfast import _choices, backend

SECONDS = 0.1  # that a comparison takes, more or less
WORTH = 0.98  # the share of its time that a model may take at most with choices for torch


def least_seconds(*calls: Callable[[], object], seconds: float = SECONDS) -> list[float]:
    """The least time of each call; they take turns, at least three times. torch's random numbers stay untouched."""
    least = [float("inf")] * len(calls)
    end = time.perf_counter() + seconds
    with torch.random.fork_rng(devices=[]):
        turns = 0
        while turns < 3 or (turns < 100 and time.perf_counter() < end):
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                least[i] = min(least[i], time.perf_counter() - start)
            turns += 1
    return least


@torch.no_grad()
def tune(model: Module, *inputs, file: str | Path | None = None) -> int:
    """Measures the calls that `model` makes for these inputs, on cvfast and on torch, and keeps which was faster.

    From then on, and in later processes, a call of the same shapes, dtypes and layouts goes to torch's operator where
    that was faster; where gradients are recorded, the choice is as before. The model runs once, in its own mode.

    Args:
        file: where the choices are kept, added to what is there; default: choices.json in CVFAST_CACHE, which is loaded
            by itself. Load another file with `cvfast.load_choices`. It holds for one processor, instruction set and
            number of threads.

    Returns:
        How many calls go to torch.
    """
    found: _choices.Table = {}

    def measure(operator: str, module, args: tuple) -> None:
        call, native = _choices.key(operator, args), backend.BACKENDS[operator]["native"]
        if module is not native and call not in found:
            seconds = least_seconds(lambda: module.run(*args), lambda: native.run(*args))
            found[call] = _choices.Choice(backend.name_of(operator, module), *seconds)

    with _choices.ignored(), backend.watch(measure):
        model(*inputs)
    if not any(m.training for m in model.modules()) and not _pays(lambda: model(*inputs), found):
        found = _unpaid(found)
    file = _choices.default_file() if file is None else Path(file)
    _choices.write(file, found)
    _choices.load(file)
    return sum(choice.torch_wins for choice in found.values())


def _pays(run: Callable[[], object], found: _choices.Table) -> bool:
    """Whether the whole is faster, by more than what times differ, if the calls that torch won alone go to torch.

    Layers in one call gain more than each alone, and one choice for torch takes that from the process.
    """
    if not any(choice.torch_wins for choice in found.values()):
        return True

    def seconds(choices: _choices.Table) -> float:
        with _choices.also(choices):
            run()  # finds out anew what it keeps
            return least_seconds(run)[0]

    rounds = [(seconds(found), seconds(_unpaid(found))) for _ in range(3)]
    with_torch, without = map(min, zip(*rounds, strict=True))
    return with_torch < WORTH * without


def _unpaid(found: _choices.Table) -> _choices.Table:
    return {call: replace(choice, pays=False) for call, choice in found.items()}


def load_choices(file: str | Path) -> int:
    """Takes what `tune` has measured into this process; how many calls that are.

    Raises FileNotFoundError, or ValueError for a file that is damaged or was measured on another machine, with another
    instruction set or number of threads.
    """
    return _choices.load(Path(file))
