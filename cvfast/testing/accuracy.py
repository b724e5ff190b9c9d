"""Accuracy against the reference, with torch's own error in the same dtype as the measure of what is attainable."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast.testing.extended import rounded

FACTOR = 2.0  # an exact algorithm may have this many times torch's own error ...
FLOOR = 4.0  # ... plus this many units in the last place, where torch happens to be exact


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative L2 error of `actual` against `exact`, float64 or extended (absolute where `exact` is all zero)."""
    error, exact = _error(actual, exact), rounded(exact)
    return float(torch.linalg.vector_norm(error) / (torch.linalg.vector_norm(exact) or 1.0))


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """The largest single error, as a share of the largest magnitude in `exact`."""
    error, exact = _error(actual, exact), rounded(exact)
    return float(error.abs().max() / (exact.abs().max() or 1.0)) if exact.numel() else 0.0


def assert_as_accurate(
    actual: Tensor,
    native: Tensor,
    exact: Tensor,
    what: str = "result",
    *,
    stand_in: tuple[Tensor, Tensor] | None = None,
    bound: float = 0.0,
) -> None:
    """Asserts that `actual` is as accurate as torch's own result `native` is, both against `exact`.

    Shapes, dtypes and the places of NaN and Inf must agree, too; finite places are compared by relative L2 error and by
    the largest single error.

    exact: float64, or extended where the others are float64; the reference gives it for operands that are `widened`.
    stand_in: (torch's result in float32, its reference) of the same case. Torch's error is chance where few elements
    make it up; its error in float32, scaled to the precision of `native`, stands for it where it is the larger one.
    bound: an error that is allowed anyway: that of an algorithm which is not exact, as docs/numerics.md states it.
    """
    assert exact.dtype == torch.float64, "the oracle must be float64"
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == native.dtype, f"{what}: {actual.dtype}, torch gives {native.dtype}"
    torch.testing.assert_close(
        _places(actual, exact), _places(exact, exact), equal_nan=True,
        msg=lambda text: f"{what}: NaN and Inf in other places than the reference's\n{text}",
    )  # fmt: skip
    eps = torch.finfo(actual.dtype).eps
    for measure in (relative_error, largest_error):
        error, attainable = measure(*_finite(actual, exact)), measure(*_finite(native, exact))
        if stand_in is not None:
            scale = eps / torch.finfo(stand_in[0].dtype).eps
            attainable = max(attainable, measure(*_finite(*stand_in)) * scale)
        assert error <= max(FACTOR * attainable + FLOOR * eps, bound), (
            f"{what}: {measure.__name__} {error:.3g}, torch has {attainable:.3g} in {actual.dtype}"
        )


def _error(actual: Tensor, exact: Tensor) -> Tensor:
    """The difference, rounded once."""
    return rounded(actual.to(torch.float64) - exact)


def _places(tensor: Tensor, exact: Tensor) -> Tensor:
    """`tensor` where `exact` is NaN or Inf, elsewhere 0."""
    return rounded(tensor).to(torch.float64).masked_fill(rounded(exact).isfinite(), 0)


def _finite(tensor: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Both where `exact` is finite, elsewhere 0."""
    return tuple(t.masked_fill(~rounded(exact).isfinite(), 0) for t in (tensor, exact))
