"""Additive attention has no Triton kernel yet."""

from __future__ import annotations

from torch import Tensor


def why_not(query: Tensor, *args) -> list[str]:
    """It cannot run any call."""
    return [f"no kernel for {query.dtype}: additive attention has no Triton kernel yet"]


def why_slower(*args) -> list[str]:
    """Nothing to compare."""
    return []


def run(*args) -> Tensor:
    """Never called: why_not refuses."""
    raise NotImplementedError("additive attention has no Triton kernel yet")
