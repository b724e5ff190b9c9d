"""What one core of this machine does at most: the measure that benchmarks are given as a share of.

Measured by running it (csrc/cpu/kernels/peak.cpp), because a data sheet knows neither the clock of the moment nor what
else runs on the machine.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from rich.table import Table

from cvfast import _library

BURST_STEPS = 20_000  # about 0.1 ms
BURSTS = 200
READ_BYTES = 64 << 20  # read per measurement of a cache
MEMORY_BYTES = 256 << 20  # more than caches hold


@dataclass(frozen=True)
class Peak:
    """The largest rate seen. unit: "GFLOP/s", "G/s" or "GB/s" (10^9 a second)."""

    isa: str
    what: str
    rate: float
    unit: str


def isas() -> list[str]:
    """The instruction sets of the CPU kernels that this machine has, best last; RuntimeError without cvfast._C."""
    if _library.C is None:
        raise RuntimeError(_library.module.reason)
    return [isa for isa in _library.C.available_isas() if isa != "emulated512"]


def burst(isa: str, float64: bool = False) -> float:
    """GFLOP/s of one short run of multiply-adds in registers on this thread."""
    start = time.perf_counter()
    operations = _library.C.multiply_adds(isa, float64, BURST_STEPS)
    return operations / (time.perf_counter() - start) / 1e9


def exponential_cost(isa: str) -> float:
    """The floating-point operations that a core does at most in the time of one float32 exponential, as it goes through
    vectors of them in registers."""
    best = 0.0
    for _ in range(BURSTS):
        start = time.perf_counter()
        count = _library.C.exponentials(isa, BURST_STEPS // 8)
        best = max(best, count / (time.perf_counter() - start) / 1e9)
    return max(burst(isa) for _ in range(BURSTS)) / best


def read_rate(isa: str, size: int) -> float:
    """GB/s at which one thread reads `size` bytes again and again."""
    data = b"\x01" * size  # written, so that each page has memory of its own
    passes = max(1, READ_BYTES // size)
    _library.C.read(isa, data, 1)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        _library.C.read(isa, data, passes)
        best = min(best, time.perf_counter() - start)
    return size * passes / best / 1e9


def measure() -> list[Peak]:
    """All peaks of one core: multiply-adds per instruction set and precision; the rest with the best set."""
    rates = [
        Peak(isa, f"multiply-adds, {'float64' if float64 else 'float32'}",
             max(burst(isa, float64) for _ in range(BURSTS)), "GFLOP/s")
        for isa in isas() for float64 in (False, True)
    ]  # fmt: skip
    best = isas()[-1]
    rates.append(Peak(best, "exponentials, float32", rates[-2].rate / exponential_cost(best), "G/s"))
    reads = [Peak(best, f"reading {name}", read_rate(best, size), "GB/s") for name, size in _levels().items()]
    return rates + reads


def table(peaks: list[Peak]) -> Table:
    """The peaks as they are printed."""
    result = Table("instruction set", "one core", "at most", title="peaks of this machine, measured")
    for peak in peaks:
        result.add_row(peak.isa, peak.what, f"{peak.rate:.1f} {peak.unit}")
    return result


def _levels() -> dict[str, int]:
    """Bytes to read, by where they come from: half of each cache, so that other data fits beside them."""
    sizes = {
        "L1": _cache_bytes("SC_LEVEL1_DCACHE_SIZE", 32 << 10),
        "L2": _cache_bytes("SC_LEVEL2_CACHE_SIZE", 512 << 10),
    }
    return {**{name: size // 2 // 512 * 512 for name, size in sizes.items()}, "memory": MEMORY_BYTES}


def _cache_bytes(name: str, fallback: int) -> int:
    told = os.sysconf(name) if name in os.sysconf_names else 0
    return told if told > 0 else fallback
