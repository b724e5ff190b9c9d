"""Batch normalisation in training with what follows it, beside the same in float64 and torch's float32."""

from __future__ import annotations

import pytest
import torch

from cvfast.functional import batch_norm
from cvfast.ops.batch_norm import composed
from cvfast.testing import assert_as_accurate
from tests.conftest import isas

SIZES = {  # even ones, which can be pooled, and what matters to vectors, blocks of channels and chains
    "usual": (4, 32, 14, 14), "few": (2, 3, 6, 10), "channels": (3, 130, 8, 2), "long": (2, 5, 36, 90),
    "one-channel": (2, 1, 8, 8), "one-sample": (1, 17, 34, 36), "odd": (5, 48, 7, 5), "pixel": (6, 4, 1, 1),
}  # fmt: skip
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SLOPES = {"relu": 0.0, "leaky_relu": 0.2, "none": 1.0}
FOLLOWED = ("nothing", "sum", "pooling")
BACKENDS = [("ext", isa) for isa in isas()] + [("native", None)]
EPS = 1e-5


def operands(size, followed="nothing", memory_format=torch.contiguous_format, dtype=torch.float32, affine=True):
    """Input, residual or None, weight and bias, all of which want gradients."""
    generator = torch.Generator().manual_seed(0)
    input, residual = (torch.randn(size, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(size[1], generator=generator) for _ in range(2))
    all_of_them = (
        2 * input + 3,
        residual if followed == "sum" else None,
        *((weight, bias) if affine else (None, None)),
    )

    def ready(t):
        t = t.to(dtype)
        return (t.contiguous(memory_format=memory_format) if t.dim() == 4 else t).requires_grad_()

    return [None if t is None else ready(t) for t in all_of_them]


def run(given, slope, pooled, backend):
    """Output, mean and variance."""
    input, residual, weight, bias = given
    return batch_norm(input, weight, bias, EPS, residual=residual, negative_slope=slope, pooled=pooled, backend=backend)


def results(output, given):
    """The output and its gradients, from one that has no structure."""
    present = [t for t in given if t is not None]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, present, grad)]


def cases():
    for name, size in SIZES.items():
        for followed in FOLLOWED:
            if followed != "pooling" or not (size[2] % 2 or size[3] % 2):
                yield pytest.param(size, followed, id=f"{name}-{followed}")


@pytest.mark.parametrize(("backend", "isa"), BACKENDS, indirect=["isa"])
@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("size", "followed"), cases())
def test_results_and_gradients(size, followed, memory_format, slope, backend, isa):
    given, pooled = operands(size, followed, memory_format), followed == "pooling"
    output, mean, variance = run(given, slope, pooled, backend)
    wide = operands(size, followed, memory_format, torch.float64)
    exact = results(composed(*wide, EPS, slope, pooled), wide)
    torchs = results(composed(*given, EPS, slope, pooled), given)
    for actual, native, wanted in zip(results(output, given), torchs, exact, strict=True):
        assert_as_accurate(actual, native, wanted, "batch_norm", bound=2e-6)
    assert output.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(mean, wide[0].mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, wide[0].var((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_mean_that_is_large_beside_the_deviation(isa):
    given = operands((8, 16, 12, 12))
    given[0] = (given[0].detach() + 1000).requires_grad_()
    output = run(given, 1.0, False, "ext")[0].detach()
    wide = [None if t is None else t.detach().double().requires_grad_() for t in given]
    exact, native = (composed(*t, EPS, 1.0, False).detach() for t in (wide, given))
    assert_as_accurate(output, native, exact, "batch_norm", bound=2e-6)


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize(("size", "followed"), cases())
def test_same_bits_in_both_formats_and_for_any_number_of_threads(size, followed, isa):
    threads, found = torch.get_num_threads(), []
    try:
        for memory_format in FORMATS.values():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                given = operands(size, followed, memory_format)
                output, mean, variance = run(given, 0.2, followed == "pooling", "ext")
                found.append([*results(output, given), mean, variance])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("followed", FOLLOWED)
@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
def test_second_gradients(slope, followed):
    pooled = followed == "pooling"
    size = (2, 3, 4, 6)

    def second(given, output):
        present = [t for t in given if t is not None]
        first = torch.autograd.grad(output.sin().sum(), present, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), present, allow_unused=True)

    given, wide = operands(size, followed), operands(size, followed, dtype=torch.float64)
    wanted = second(wide, composed(*wide, EPS, slope, pooled))
    for a, b in zip(second(given, run(given, slope, pooled, "ext")[0]), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_without_weight_and_with_gradients_that_nobody_wants():
    given = operands((2, 5, 6, 6), affine=False)
    wide = operands((2, 5, 6, 6), dtype=torch.float64, affine=False)
    exact, native = (composed(*t, EPS, 0.0, False).detach() for t in (wide, given))
    assert_as_accurate(run(given, 0.0, False, "ext")[0].detach(), native, exact, "batch_norm", bound=2e-6)
    frozen, _, weight, bias = operands((2, 5, 6, 6))
    output, _, _ = run([frozen.detach(), None, weight, bias], 0.0, False, "ext")
    output.sum().backward()
    assert frozen.grad is None and weight.grad is not None
    with torch.no_grad():
        assert not run(given, 0.0, False, "ext")[0].requires_grad


def test_a_nan_is_its_channels():
    input, _, weight, bias = operands((2, 3, 4, 4))
    with torch.no_grad():
        input[1, 2, 0, 1] = torch.nan
    output, _, _ = run([input, None, weight, bias], 0.0, True, "ext")
    assert output[:, 2].isnan().all() and not output[:, :2].isnan().any()


def test_gradients_and_residuals_of_another_format_and_views():
    given = operands((2, 6, 8, 8), "sum", torch.channels_last)
    wanted = results(run(given, 0.0, False, "ext")[0], given)
    strided = [t.detach().clone().requires_grad_() for t in given]
    strided[0] = torch.stack([given[0].detach()] * 2, -1)[..., 0].requires_grad_()
    strided[1] = given[1].detach().contiguous().requires_grad_()
    for a, b in zip(results(run(strided, 0.0, False, "ext")[0], strided), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda g: [g[0].detach().double(), *g[1:]], "other than float32"),
        (lambda g: [g[0].detach()[:, :, :3], *g[1:]], "even sizes"),
        (lambda g: [g[0].detach()[:0], *g[1:]], "not empty"),
        (lambda g: [g[0], g[0], *g[2:]], "without a residual"),
    ],
)
def test_calls_that_the_kernels_refuse(change, reason):
    with pytest.raises(RuntimeError, match=reason):
        run(change(operands((2, 4, 4, 4))), 0.0, True, "ext")


def test_compiled_functions_have_torchs_operators():
    given = operands((2, 4, 4, 4))
    compiled = torch.compile(lambda *t: run(t, 0.0, False, None)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), run(given, 0.0, False, None)[0])
