"""What a call costs beside torch's: conv2d on an image so small that the convolution itself hardly counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import cvfast.functional
from benchmarks.cases.conv2d import OVERHEAD_GOALS
from benchmarks.timing import Effort, take_turns

SHAPE = (1, 8, 8, 8)
CALLS = 100  # per timed piece


def modes(function: Callable) -> dict[str, Callable[[], object]]:
    """One call with each way of asking for gradients."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator) for shape in (SHAPE, (8, 8, 3, 3), (8,))]
    leaves = [tensor.clone().requires_grad_() for tensor in operands]
    cotangent = torch.ones(SHAPE)

    def no_grad():
        with torch.no_grad():
            return function(*operands, padding=1)

    def grad():
        return function(*leaves, padding=1)

    return {
        "no grad": no_grad,
        "forward with grad": grad,
        "forward and backward": lambda: torch.autograd.grad(grad(), leaves, cotangent),
    }


def measure(effort: Effort) -> dict[str, tuple[float, float]]:
    """Microseconds of a call, (cvfast's, torch's), by mode; minima of pieces of CALLS calls in turns, one thread."""

    def piece(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        return run

    functions = {"cvfast": cvfast.functional.conv2d, "torch": torch.nn.functional.conv2d}
    pieces = {(who, mode): piece(call) for who, f in functions.items() for mode, call in modes(f).items()}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = take_turns(pieces, effort).seconds
    torch.set_num_threads(before)
    best = {key: min(times) / CALLS * 1e6 for key, times in seconds.items()}
    return {mode: (best["cvfast", mode], best["torch", mode]) for who, mode in pieces if who == "cvfast"}


def main(console: Console, quick: bool) -> None:
    """Prints the table."""
    table = Table("conv2d on 1x8x8x8, 3x3", "cvfast, µs", "torch, µs", "difference, µs", "goal: at most", "holds")
    for mode, (own, native) in measure(Effort(0, 5, 5) if quick else Effort(0, 40, 40)).items():
        goal = OVERHEAD_GOALS.get(mode)
        holds = "" if goal is None else "yes" if own - native <= goal else "NO"
        table.add_row(
            mode, f"{own:.1f}", f"{native:.1f}", f"{own - native:.1f}", "" if goal is None else str(goal), holds
        )
    console.print(table)
