"""How far resident memory grows while conv2d meets one new shape after another; Linux only.

Each measurement is a process of its own, so that nobody's growth is hidden in memory that another one left behind:
python -m benchmarks.memory cvfast 10000 prints the bytes.
"""

from __future__ import annotations

import gc
import itertools
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import cvfast.functional
from benchmarks.cases.conv2d import MEMORY_GOAL_MB

FUNCTIONS = {
    "cvfast": lambda *operands: cvfast.functional.conv2d(*operands, padding=1, backend="ext"),
    "torch": lambda *operands: torch.nn.functional.conv2d(*operands, padding=1),
}
ROOT = Path(__file__).parent.parent
STATM = Path("/proc/self/statm")
WARM_UP = 200  # shapes: libraries load, allocators get their first pages


def shapes() -> Iterator[tuple[int, int, int, int, int]]:
    """Different small (channels, height, width, out channels, kernel), the largest ones first: 10 000 and more."""
    return itertools.product((24, 20, 17, 16, 5, 3), range(24, 4, -1), range(24, 4, -1), (18, 16, 7, 4), (3, 1, 5))


def resident_bytes() -> int:
    pages = int(STATM.read_text().split()[1])
    return pages * resource.getpagesize()


def grow(who: str, count: int) -> int:
    """Bytes of growth over `count` shapes, each met forward and backward once, after some to warm up."""
    torch.set_num_threads(1)
    before = 0
    for i, (channels, height, width, out, kernel) in enumerate(itertools.islice(shapes(), WARM_UP + count)):
        if i == WARM_UP:
            gc.collect()
            before = resident_bytes()
        leaves = [torch.ones(shape, requires_grad=True) for shape in (
            (1, channels, height, width), (out, channels, kernel, kernel), (out,))]  # fmt: skip
        FUNCTIONS[who](*leaves).sum().backward()
    gc.collect()
    return resident_bytes() - before


def growth_mb(who: str, count: int) -> float:
    """`grow` in a process of its own, in MB."""
    command = [sys.executable, "-m", "benchmarks.memory", who, str(count)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout) / 1e6


def main(console: Console, quick: bool) -> None:
    """Prints the table."""
    table = Table(
        "conv2d, forward and backward", "different shapes", "growth, MB", "MB a 1000", "goal: at most", "holds"
    )
    own, native = (1000, 100) if quick else (10_000, 400)
    for who, count, goal in (("cvfast", own, MEMORY_GOAL_MB), ("torch", native, None)):
        grown = growth_mb(who, count)
        holds = "" if goal is None else "yes" if grown <= goal else "NO"
        table.add_row(who, str(count), f"{grown:.1f}", f"{grown / count * 1000:.1f}", str(goal or ""), holds)
    console.print(table)


if __name__ == "__main__":
    print(grow(sys.argv[1], int(sys.argv[2])))
