"""The least time that a case takes on one core, by what this core does at most.

It is the time of the definition's multiply-adds and exponentials at the rates of loops that do nothing else, or that of
reading what each of a sequence's steps must read anew from the cache that holds it, whichever is longer. Nothing else
is counted: no call, no tails, no other memory. So no kernel reaches its limit, and one at 95 % has nothing to gain.
Convolutions have none: Winograd's algorithm needs fewer multiply-adds than the definition.
"""

from __future__ import annotations

from functools import cache

from cvfast import _library, _peak
from cvfast.testing import OpSpec, Sample

NEAR = 0.95  # the share of its limit from which on a case cannot be made faster by anything worth while


def least_ms(spec: OpSpec, sample: Sample, peak: float, training: bool) -> float | None:
    """Milliseconds on one core whose multiply-adds reach `peak` GFLOP/s at the time; None where nothing is known.

    training: forward, and backward with twice the multiply-adds, the same exponentials and reads.
    """
    exponentials = spec.exponentials(sample)
    if not exponentials:
        return None
    times = 3 if training else 1
    computing = (times * spec.flops(sample) + exponentials * _exponential_cost(_library.C.active_isa())) / peak / 1e6
    steps, size = spec.bytes_per_step(sample)
    reading = steps * size / _read_rate(_library.C.active_isa(), size) / 1e6 if size else 0.0
    return max(computing, reading * (2 if training else 1))


_exponential_cost = cache(_peak.exponential_cost)


@cache
def _read_rate(isa: str, size: int) -> float:
    return _peak.read_rate(isa, -(-size // 512) * 512)
