"""Times calls in turns within one process, so that the machine's drifting speed meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Effort:
    """How long one call is timed. It runs until `seconds` are spent, but from `least` to `most` times.

    A minimum of fewer than 20 runs says little on a machine that others share.
    """

    seconds: float = 0.4
    least: int = 20
    most: int = 60

    def repeats(self, call_seconds: float) -> int:
        return min(self.most, max(self.least, int(self.seconds / max(call_seconds, 1e-9))))


QUICK = Effort(seconds=0.02, least=2, most=10)


@dataclass
class Turns:
    """Seconds of each call, by name, and what `between` gave in each round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    between: list[float] = field(default_factory=list)


def take_turns(
    calls: dict[str, Callable[[], object]],
    effort: Effort,
    between: Callable[[], float] | None = None,
    synchronize: Callable[[], None] | None = None,
) -> Turns:
    """Times all calls; one untimed-for-the-result call of each comes first and says how often it can run.

    Each round begins with the call that ended the last one, so that each is at times timed on operands that no other
    call has just driven from the caches.
    A call that runs less often than another sits out rounds, evenly spread. between: called once a round.
    synchronize: waits for a device, within the timed part.
    """
    repeats = {name: effort.repeats(timed(call, synchronize)) for name, call in calls.items()}
    rounds = max(repeats.values(), default=0)
    names = list(calls)
    turns = Turns({name: [] for name in calls})
    for i in range(rounds):
        if between is not None:
            turns.between.append(between())
        first = -i % len(calls)
        for name in names[first:] + names[:first]:
            if (i + 1) * repeats[name] // rounds > i * repeats[name] // rounds:
                turns.seconds[name].append(timed(calls[name], synchronize))
    return turns


def timed(call: Callable[[], object], synchronize: Callable[[], None] | None = None) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - start
