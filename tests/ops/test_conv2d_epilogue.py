"""conv2d's epilogue, activation(result + residual), in every algorithm of the compiled kernels and on every backend."""

from __future__ import annotations

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import cvfast
from cvfast.functional import ACTIVATIONS, POOLINGS
from cvfast.ops import conv2d as conv2d_module
from cvfast.ops.conv2d import TOLD_BY_RESULT, conv2d_how
from cvfast.testing import assert_as_accurate
from tests.conftest import isas

# One case per algorithm of csrc/cpu/kernels/conv2d.cpp, and per way of storing results: [input], [weight], options.
CASES = {
    "winograd": ((2, 17, 11, 10), (35, 17, 3, 3), {"padding": 1}),
    "winograd-groups": ((1, 32, 9, 9), (64, 16, 3, 3), {"padding": 1, "groups": 2}),
    "winograd-dilated": ((1, 16, 27, 26), (18, 16, 3, 3), {"padding": 2, "dilation": 2}),
    "winograd-phases": ((1, 16, 32, 32), (18, 16, 4, 4), {"padding": 1, "stride": 2}),
    "depthwise": ((2, 37, 9, 11), (37, 1, 3, 3), {"padding": 1, "groups": 37}),
    "depthwise-stride2": ((2, 21, 25, 27), (21, 1, 3, 3), {"padding": 1, "groups": 21, "stride": 2}),
    "direct": ((2, 3, 14, 13), (7, 3, 5, 5), {}),
    "direct-columns": ((1, 3, 40, 38), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    "direct-groups": ((2, 16, 9, 9), (16, 4, 3, 3), {"padding": 1, "groups": 4}),
    "plane": ((1, 1, 30, 40), (1, 1, 3, 3), {"padding": 1}),
    "column": ((2, 4, 90, 1), (5, 4, 31, 1), {}),
    "1x1": ((2, 70, 16, 16), (33, 70, 1, 1), {}),
    "gemm": ((2, 70, 9, 8), (130, 70, 3, 3), {"padding": 1, "stride": 2}),
    "few-pixels": ((1, 130, 4, 4), (70, 130, 4, 4), {}),
    "dot-products": ((2, 130, 4, 5), (2, 130, 4, 4), {"groups": 1}),
    "no-samples": ((0, 4, 5, 5), (3, 4, 3, 3), {}),
}
POOLED = {  # what matters to pooling besides: the last line and column, lines longer than vectors, few channels
    "direct-odd": ((2, 3, 15, 14), (7, 3, 4, 4), {}),
    "plane-odd": ((1, 1, 31, 41), (1, 1, 3, 3), {"padding": 1}),
    "few-channels": ((3, 5, 7, 6), (2, 5, 1, 1), {}),
    "wide": ((1, 2, 9, 77), (3, 2, 3, 3), {}),
    "1x1-wide": ((1, 33, 8, 75), (40, 33, 1, 1), {}),
    "one-pixel": ((1, 4, 3, 3), (3, 4, 2, 2), {}),
}
BACKENDS = [("ext", isa) for isa in isas()] + [("native", None)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


TRANSPOSED = {  # of conv_transpose2d: [input], [weight], options
    "winograd": ((2, 18, 9, 7), (18, 17, 3, 3), {"padding": 1}),
    "winograd-phases": ((1, 16, 10, 9), (16, 35, 4, 4), {"padding": 1, "stride": 2}),
    "winograd-dilated": ((1, 16, 27, 26), (16, 18, 3, 3), {"padding": 2, "dilation": 2}),
    "direct": ((2, 20, 8, 9), (20, 3, 4, 4), {"padding": 1, "stride": 2, "output_padding": 1}),
    "depthwise": ((2, 21, 7, 9), (21, 1, 3, 3), {"padding": 1, "groups": 21, "stride": 2}),
    "few-pixels": ((2, 130, 1, 1), (130, 70, 4, 4), {}),
    "gemm": ((1, 70, 9, 8), (70, 130, 2, 3), {"stride": (2, 1)}),
}


def operands(name: str, dtype: torch.dtype, memory_format: torch.memory_format, transposed: bool = False):
    """Input, weight, bias and residual of a case, and its options."""
    generator = torch.Generator().manual_seed(0)
    input_size, weight_size, options = TRANSPOSED[name] if transposed else (CASES | POOLED)[name]
    input, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (input_size, weight_size))
    function = cvfast.functional.conv_transpose2d if transposed else cvfast.functional.conv2d
    size = function(input, weight, **options).shape
    bias = torch.randn(size[1], generator=generator, dtype=torch.float64)
    residual = torch.randn(size, generator=generator, dtype=torch.float64)
    return [
        t.to(dtype).contiguous(memory_format=memory_format) if t.dim() == 4 else t.to(dtype)
        for t in (input, weight / max(1, weight[0].numel()) ** 0.5, bias, residual)
    ], options


@pytest.mark.parametrize(("backend", "isa"), BACKENDS, indirect=["isa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_epilogue_follows_the_convolution(case, memory_format, dtype, backend, isa, poisoned):
    (input, weight, bias, residual), options = operands(case, dtype, FORMATS[memory_format])
    check_epilogue(cvfast.functional.conv2d, input, weight, bias, residual, backend, options)


@pytest.mark.parametrize(("backend", "isa"), BACKENDS, indirect=["isa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", TRANSPOSED)
def test_epilogue_follows_the_transposed_convolution(case, memory_format, dtype, backend, isa, poisoned):
    (input, weight, bias, residual), options = operands(case, dtype, FORMATS[memory_format], transposed=True)
    check_epilogue(cvfast.functional.conv_transpose2d, input, weight, bias, residual, backend, options)


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", ["winograd", "depthwise", "direct", "direct-columns", "gemm", "few-pixels"])
def test_float16_is_rounded_once(case, memory_format, isa, poisoned):
    (input, weight, bias, residual), options = operands(case, torch.float16, FORMATS[memory_format])
    check_epilogue(cvfast.functional.conv2d, input, weight, bias, residual, "ext", options, ["none", "relu", "gelu"])


def check_epilogue(function, input, weight, bias, residual, backend, options, activations=tuple(ACTIVATIONS)):
    """activation(result + residual) of the results without it; of narrow dtypes rounded once by cvfast's kernels."""
    dtype = input.dtype
    compute = torch.float32 if backend == "ext" and dtype.itemsize == 2 else dtype
    wide = [t.to(compute) for t in (input, weight, bias)]
    plain = function(*wide, **options, backend=backend)
    for activation in activations:
        for added in (None, residual):
            more = {"activation": activation, "negative_slope": 0.2, "residual": added}
            result = function(input, weight, bias, **options, backend=backend, **more)
            strides = zip(result.shape, result.stride(), plain.stride(), strict=True)
            assert result.numel() == 0 or all(ours == plains for size, ours, plains in strides if size > 1)
            total = plain if added is None else plain + added.to(compute)
            expected = ACTIVATIONS[activation](total, 0.2).to(dtype)
            if activation in ("none", "relu", "relu6", "leaky_relu"):
                assert torch.equal(result, expected), f"{activation}, {added is not None}"
            else:
                exact = ACTIVATIONS[activation](total.double(), 0.2)
                assert_as_accurate(result, expected, exact, activation, bound=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("backend", "isa"), BACKENDS, indirect=["isa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", [*CASES, *POOLED])
def test_pooling_follows_the_activation(case, memory_format, dtype, backend, isa, poisoned):
    (input, weight, bias, _), options = operands(case, dtype, FORMATS[memory_format])
    call = lambda x, w, b, **more: cvfast.functional.conv2d(x, w, b, **options, backend=backend, **more)  # noqa: E731
    plain = call(input, weight, bias)
    for activation in ("none", "relu", "leaky_relu", "tanh"):
        for pooling in ("max", "average"):
            arguments = {"activation": activation, "negative_slope": -0.2, "pooling": pooling}
            if min(plain.shape[2:]) < 2:
                with pytest.raises(RuntimeError, match="too small to pool"):
                    call(input, weight, bias, **arguments)
                continue
            result = call(input, weight, bias, **arguments)
            expected = POOLINGS[pooling](ACTIVATIONS[activation](plain, -0.2))
            strides = zip(result.shape, result.stride(), expected.stride(), strict=True)
            assert result.numel() == 0 or all(ours == torchs for size, ours, torchs in strides if size > 1)
            if pooling == "max" and activation in ("none", "relu"):
                assert torch.equal(result, expected), activation
            else:
                exact = POOLINGS[pooling](ACTIVATIONS[activation](plain.double(), -0.2))
                assert_as_accurate(
                    result, expected, exact, f"{activation}, {pooling}", bound=4 * torch.finfo(dtype).eps
                )


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", ["winograd", "direct", "direct-columns", "1x1"])
def test_pooling_keeps_nan_and_infinity(case, memory_format, isa):
    """NaN wins over every number, as torch's max_pool2d has it, and is left by relu."""
    (input, weight, bias, _), options = operands(case, torch.float32, FORMATS[memory_format])
    input[0, 0, 0, 0], input[0, 1, 5, 5], input[0, 2, 8, 8] = float("nan"), float("inf"), -float("inf")
    plain = cvfast.functional.conv2d(input, weight, bias, **options, backend="ext")
    for pooling in ("max", "average"):
        result = cvfast.functional.conv2d(
            input, weight, bias, **options, activation="relu", pooling=pooling, backend="ext"
        )
        expected = POOLINGS[pooling](torch.relu(plain))
        assert expected.isnan().any() and expected.isinf().any() and expected.isfinite().any()
        torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", ["winograd", "winograd-groups", "winograd-dilated"])
def test_winograd_finishes_what_is_not_finite(case, memory_format, isa):
    """Channels of tiles that are computed again by the definition take the sum and the bounds, too."""
    (input, weight, bias, residual), options = operands(case, torch.float32, FORMATS[memory_format])
    input[0, 0, 0, 0], input[0, 1, 5, 5], input[0, 2, 8, 8] = float("nan"), float("inf"), -float("inf")
    plain = cvfast.functional.conv2d(input, weight, bias, **options, backend="ext")
    for activation in ("none", "relu", "relu6", "silu"):
        result = cvfast.functional.conv2d(
            input, weight, bias, **options, activation=activation, residual=residual, backend="ext"
        )
        expected = ACTIVATIONS[activation](plain + residual, 0.01)
        assert expected.isnan().any() and expected.isfinite().any()
        torch.testing.assert_close(result, expected, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["winograd", "winograd-dilated", "direct", "direct-columns", "1x1"])
def test_pooling_same_bits(case, threads):
    """For any number of threads, a sample alone or in its batch, both memory formats and any strides."""
    (input, weight, bias, _), options = operands(case, torch.float32, torch.contiguous_format)
    input = torch.cat((input, input.flip(2), input + 1))
    call = lambda x: cvfast.functional.conv2d(x, weight, bias, **options, activation="silu", pooling="average")  # noqa: E731
    threads(1)
    expected = call(input)
    strided = torch.zeros(*input.shape[:3], 2 * input.shape[3])[..., ::2].copy_(input)
    for other in (input.contiguous(memory_format=torch.channels_last), strided):
        assert torch.equal(call(other), expected)
    assert torch.equal(call(input[1:2]), expected[1:2])
    threads(2)
    assert torch.equal(call(input), expected) and torch.equal(call(input[1]), expected[1])


def test_one_pass_where_no_gradient_is_asked_for(monkeypatch):
    """The tests above do run the kernel's epilogue; with gradients, too, where the result tells the derivative."""
    calls = []
    from cvfast.backends.ext import conv2d as ext

    (input, weight, bias, residual), options = operands("winograd", torch.float32, torch.contiguous_format)
    plain = cvfast.functional.conv2d(input, weight, bias, **options)
    kernel = ext.epilogue_kernel
    numbers = ({"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options).values()
    names = {ext.conv2d_how(*numbers, name, "none"): name for name in ACTIVATIONS}
    for module in (ext, sys.modules["cvfast.ops.conv2d"]):
        monkeypatch.setattr(module, "epilogue_kernel", lambda *args: (calls.append(names[args[3]]), kernel(*args))[1])
    cvfast.functional.conv2d(input, weight, bias, **options, activation="relu", residual=residual)
    assert calls == ["relu"]
    result = cvfast.functional.conv2d(input, weight, bias, **options, residual=residual, pooling="max")
    assert calls.pop() == "none" and torch.equal(result, POOLINGS["max"](plain + residual))
    weight.requires_grad_()
    for activation in ("tanh", "silu"):
        cvfast.functional.conv2d(input, weight, bias, **options, activation=activation, residual=residual)
    assert calls == ["relu", "tanh"]


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_the_epilogue(activation, with_residual):
    (input, weight, bias, residual), options = operands("direct", torch.float64, torch.contiguous_format)
    tensors = [input[..., :6, :6], weight, bias, *([residual[..., :2, :2]] if with_residual else [])]
    tensors = [t.detach().clone().requires_grad_() for t in tensors]

    def function(input, weight, bias, residual=None):
        return cvfast.functional.conv2d(input, weight, bias, **options, activation=activation, residual=residual,
                                        pooling="average")  # fmt: skip

    torch.autograd.gradcheck(function, tensors, fast_mode=True)
    if activation != "hardsigmoid":  # torch's has no second derivative
        torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [*TOLD_BY_RESULT, "leaky_relu -1"])
def test_gradients_in_one_pass_are_those_of_the_parts(activation, dtype, memory_format):
    """Each one of them and some of them; a result without an activation may be changed in place."""
    activation, _, slope = activation.partition(" ")
    epilogue = {"activation": activation, "negative_slope": float(slope or 0.1)}
    tensors, options = operands("gemm", dtype, memory_format)  # exact
    for needed in [(0, 1, 2, 3), (1,), (3,), (0, 2)]:
        gradients = []
        for backend in ("ext", "native"):
            leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
            input, weight, bias, residual = leaves
            output = cvfast.functional.conv2d(
                input, weight, bias, **options, **epilogue, residual=residual, backend=backend
            )
            if activation == "none":
                output += 1
            output.square().sum().backward()
            gradients.append([t.grad for t in leaves])
            assert [t.grad is not None for t in leaves] == [i in needed for i in range(4)]
        for ours, theirs in zip(*gradients, strict=True):
            if ours is not None:
                distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
                assert distance < (1e-5 if dtype is torch.float32 else 3e-2)


def test_gradients_that_nobody_asks_for_are_not_computed(monkeypatch):
    """Of large convolutions: torch says so of Python's own operators only to those who ask."""
    computed = []
    kernel = conv2d_module._gradients_kernel
    monkeypatch.setattr(conv2d_module, "_gradients_kernel", lambda *args: computed.append(args[4:]) or kernel(*args))
    monkeypatch.setattr(conv2d_module, "_WORTH_ASKING", 1)
    sizes = (2, 4, 9, 9), (3, 4, 3, 3), (3,)
    leaves = leaf, weight, bias = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    gradients = torch.autograd.grad(F.conv2d(leaf, weight, bias).sin().sum(), leaves)
    wanted = dict(zip("iwb", gradients, strict=True))

    def check(names: str, inner: bool) -> None:
        """The gradients to some leaves are right, whether the convolution's input is one or not."""
        output = cvfast.functional.conv2d(leaf * 1 if inner else leaf, weight, bias).sin().sum()
        asked = [leaves["iwb".index(name)] for name in names]
        for got, name in zip(torch.autograd.grad(output, asked), names, strict=True):
            torch.testing.assert_close(got, wanted[name])

    for inner in (False, True):
        for names in ("i", "w", "b", "iw", "wb", "bi", "iwb"):
            check(names, inner)
            assert computed.pop() == tuple(name in names for name in "iwb")

    output = cvfast.functional.conv2d(leaf, weight, bias).sin().sum()
    output.backward(inputs=[weight], retain_graph=True)
    assert computed.pop() == (False, True, False) and leaf.grad is None and bias.grad is None
    torch.testing.assert_close(weight.grad, wanted["w"])
    output.backward()
    assert computed.pop() == (True, True, True)
    torch.testing.assert_close(leaf.grad, wanted["i"])
    torch.testing.assert_close(weight.grad, 2 * wanted["w"])
    (penalty,) = torch.autograd.grad(cvfast.functional.conv2d(leaf, weight, bias).sin().sum(), leaf, create_graph=True)
    (native,) = torch.autograd.grad(F.conv2d(leaf, weight, bias).sin().sum(), leaf, create_graph=True)
    got, expected = (torch.autograd.grad(p.pow(2).sum(), leaves) for p in (penalty, native))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu_everywhere(dtype, approximate, isa):
    """Each element against float64; far on the left, where torch's own loses all digits, too."""
    input = torch.linspace(-12, 12, 4096, dtype=torch.float64).to(dtype).view(1, 1, 64, 64)
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    result = cvfast.functional.conv2d(input, torch.ones(1, 1, 1, 1, dtype=dtype), activation=activation, backend="ext")
    x = input.double()
    exact = x * torch.erfc(x * -(0.5**0.5)) / 2 if approximate == "none" else ACTIVATIONS[activation](x, 0)
    eps = torch.finfo(dtype).eps
    scale = (
        exact.abs() * (4 + x.square() / 2) if approximate == "none" else x.abs()
    )  # exp magnifies the square's rounding
    assert ((result.double() - exact).abs() <= eps * scale + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("activation", [*list(ACTIVATIONS)[1:]])
def test_special_numbers(activation):
    """NaN and infinities come out where torch's activation puts them."""
    input = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e38, 1e38, -0.0, 3.0, -200.0]).view(1, 1, 2, 4)
    result = cvfast.functional.conv2d(input, torch.ones(1, 1, 1, 1), activation=activation, backend="ext")
    # torch's gelu of float32 makes a NaN of infinity, its gelu of float64 does not.
    expected = ACTIVATIONS[activation](input.double() if activation == "gelu" else input, 0.01).float()
    torch.testing.assert_close(result, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


def test_compiles_and_exports():
    (input, weight, bias, residual), options = operands("winograd", torch.float32, torch.contiguous_format)

    class Layer(torch.nn.Module):
        def forward(self, x, r):
            x = cvfast.functional.conv2d(x, weight, bias, **options, activation="relu", residual=r)
            return cvfast.functional.conv2d(x, weight[:, :1].repeat(1, 35, 1, 1), bias, pooling="max")

    expected = Layer()(input, residual)
    torch.testing.assert_close(torch.compile(Layer(), backend="aot_eager", fullgraph=True)(input, residual), expected)
    torch.testing.assert_close(torch.export.export(Layer(), (input, residual)).module()(input, residual), expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'; allowed: none, relu, relu6"),
        ({"pooling": "min"}, ValueError, "unknown pooling 'min'; allowed: none, max, average"),
        (
            {"residual": torch.zeros(2, 35, 11, 9)},
            RuntimeError,
            r"residual has size \[2, 35, 11, 9\].*\[2, 35, 11, 10\]",
        ),
        ({"residual": torch.zeros(2, 35, 11, 10, dtype=torch.float64)}, RuntimeError, "residual type"),
    ],
)
def test_wrong_epilogue(options, error, match):
    (input, weight, bias, _), case_options = operands("winograd", torch.float32, torch.contiguous_format)
    with pytest.raises(error, match=match):
        cvfast.functional.conv2d(input, weight, bias, **case_options, **options)


def brief(value: float, channels: int) -> torch.Tensor:
    """A result of 4 * channels KiB that is `value` everywhere, in the kept memory where that has room."""
    input = torch.full((1, 1, 32, 32), value)
    return cvfast.functional.conv2d(input, torch.ones(channels, 1, 1, 1), activation="relu", backend="ext")


def test_results_in_kept_memory_do_not_meet(poisoned):
    """More than the memory holds, in four threads, given back in any order; their places are used again."""

    def hold(seed: int) -> int:
        order, held, places = random.Random(seed), [], set()
        for i in range(300):
            value = float(1 + i + 1000 * seed)
            held.append((value, brief(value, order.choice((1, 4, 5, 63, 64, 129)))))
            places.add(held[-1][1].data_ptr())
            if len(held) > 150:
                value, result = held.pop(order.randrange(len(held)))
                assert bool((result == value).all())
        assert all(bool((result == value).all()) for value, result in held)
        return len(places)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(hold, range(4))) < 1200
    first, second = (brief(value, 64).data_ptr() for value in (1.0, 2.0))
    assert first == second


def test_kept_memory_in_a_forked_child():
    """Both go on with memory of their own, although the parent's is in use when it forks."""
    held = brief(3.0, 64)
    child = os.fork()
    if child == 0:
        right = bool((held == 3).all()) and bool((brief(4.0, 64) == 4).all())
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((held == 3).all())


def test_options_that_fit_no_number_are_computed_all_the_same():
    """A call's options are one number for the kernel where they are small; no other type slips in."""
    assert conv2d_how(1, (1, 1), 1, 1) == conv2d_how((1, 1), 1, (1, 1), 1, "none", "none")
    numbers = [conv2d_how(s, (p, q), 1, g, a, "max") for s in (1, 2) for p, q in ((0, 1), (1, 0)) for g in (1, 300)
               for a in ACTIVATIONS]  # fmt: skip
    assert len({*numbers}) == len(numbers) and None not in numbers
    others = [True, 1.0, (1, True), [1, 1], 0, -1, 1000, 1 << 70, (1,), "1", None]
    for options in [(other, 1, 1, 1) for other in others] + [(1, 1, 1, (1, 1)), (1, 1, 1, 1, "softmax", "none")]:
        assert conv2d_how(*options) is None
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    for options in (
        {"padding": 130},
        {"padding": [2, 1]},
        {"stride": 70, "padding": 70},
        {"padding": 70, "dilation": 65},
    ):
        expected = torch.relu(torch.nn.functional.conv2d(input.double(), weight.double(), **options))
        torch.testing.assert_close(
            cvfast.functional.conv2d(input, weight, **options, activation="relu").double(),
            expected,
            rtol=1e-5,
            atol=1e-5,
        )
    with pytest.raises(TypeError, match="True"):
        cvfast.functional.conv2d(input, weight, padding=True)
