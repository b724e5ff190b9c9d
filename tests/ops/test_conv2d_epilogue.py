"""conv2d's epilogue, activation(result + residual), in every algorithm of the compiled kernels and on every backend."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cvfast
from cvfast.functional import ACTIVATIONS
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
    "no-samples": ((0, 4, 5, 5), (3, 4, 3, 3), {}),
}
BACKENDS = [("ext", isa) for isa in isas()] + [("native", None)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def operands(name: str, dtype: torch.dtype, memory_format: torch.memory_format):
    """Input, weight, bias and residual of a case, and its options."""
    generator = torch.Generator().manual_seed(0)
    input_size, weight_size, options = CASES[name]
    input, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (input_size, weight_size))
    bias = torch.randn(weight_size[0], generator=generator, dtype=torch.float64)
    size = cvfast.functional.conv2d(input, weight, **options).shape
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
    call = lambda **more: cvfast.functional.conv2d(input, weight, bias, **options, backend=backend, **more)  # noqa: E731
    plain = call()
    for activation, function in ACTIVATIONS.items():
        for added in (None, residual):
            result = call(activation=activation, negative_slope=0.2, residual=added)
            strides = zip(result.shape, result.stride(), plain.stride(), strict=True)
            assert result.numel() == 0 or all(ours == plains for size, ours, plains in strides if size > 1)
            total = plain if added is None else plain + added
            if activation in ("none", "relu", "relu6", "leaky_relu"):
                assert torch.equal(result, function(total, 0.2)), f"{activation}, {added is not None}"
            else:
                exact = function(total.double(), 0.2)
                assert_as_accurate(result, function(total, 0.2), exact, activation, bound=4 * torch.finfo(dtype).eps)


def test_one_pass_where_no_gradient_is_asked_for(monkeypatch):
    """The test above does run the kernel's epilogue; with gradients the parts are called, and differentiated twice."""
    calls = []
    from cvfast.backends.ext import conv2d as ext

    kernel = ext.epilogue_kernel
    monkeypatch.setattr(ext, "epilogue_kernel", lambda *args: (calls.append(args[4]), kernel(*args))[1])
    (input, weight, bias, residual), options = operands("winograd", torch.float32, torch.contiguous_format)
    cvfast.functional.conv2d(input, weight, bias, **options, activation="relu", residual=residual)
    assert calls == ["relu"]
    weight.requires_grad_()
    output = cvfast.functional.conv2d(input, weight, bias, **options, activation="tanh", residual=residual)
    (first,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert calls == ["relu"] and second.isfinite().all()


def test_gradients_of_the_epilogue():
    (input, weight, bias, residual), options = operands("direct", torch.float64, torch.contiguous_format)
    tensors = [t[..., :6, :6].detach().clone() if t is input else t.detach().clone() for t in (input, weight, bias)]
    tensors.append(residual[..., :2, :2].clone())
    function = lambda x, w, b, r: cvfast.functional.conv2d(x, w, b, **options, activation="silu", residual=r)  # noqa: E731
    tensors = [t.requires_grad_() for t in tensors]
    torch.autograd.gradcheck(function, tensors, fast_mode=True)
    torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh"])
def test_special_numbers(activation):
    """NaN and infinities come out where torch's activation puts them."""
    input = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e38, 1e38, -0.0, 3.0, -200.0]).view(1, 1, 2, 4)
    result = cvfast.functional.conv2d(input, torch.ones(1, 1, 1, 1), activation=activation, backend="ext")
    torch.testing.assert_close(result, ACTIVATIONS[activation](input, 0.01), equal_nan=True, rtol=1e-6, atol=1e-30)


def test_compiles_and_exports():
    (input, weight, bias, residual), options = operands("winograd", torch.float32, torch.contiguous_format)

    class Layer(torch.nn.Module):
        def forward(self, x, r):
            return cvfast.functional.conv2d(x, weight, bias, **options, activation="relu", residual=r)

    expected = Layer()(input, residual)
    torch.testing.assert_close(torch.compile(Layer(), backend="aot_eager", fullgraph=True)(input, residual), expected)
    torch.testing.assert_close(torch.export.export(Layer(), (input, residual)).module()(input, residual), expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'; allowed: none, relu, relu6"),
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
