"""The recurrent operators have no Triton kernels: this backend says so for all of them."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


def why_not(*args) -> list[str]:
    """Always one reason."""
    input = next(a for a in args if isinstance(a, Tensor)) if len(args) > 1 else args[0].input
    return [f"no kernel for {input.dtype}: the recurrent operators have no Triton kernels"]


def why_slower(*args) -> list[str]:
    """It cannot run at all."""
    return []


def run(*args) -> NoReturn:
    """Never reached: `why_not` always has a reason."""
    raise NotImplementedError(*why_not(*args))
