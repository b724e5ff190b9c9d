"""conv2d's Triton kernels in the strict interpreter, and what its backend says of itself.

Every case also shows that no kernel leaves its tensors, leaves an element unwritten or lets two programs meet.
tests/ops runs the operator's full list of cases on this backend, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from cvfast import _env
from cvfast.backends.triton import conv2d
from cvfast.testing import assert_as_accurate

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "expanded": lambda t: t[:1].expand(t.shape),
}

# name: (input, weight, (stride, padding, dilation, groups)); tiles are 32 x 32, a step of the sum is 16.
CASES = {
    "one-element": ((1, 1, 1, 1), (1, 1, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "exactly-one-tile": ((2, 16, 4, 4), (32, 16, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "one-more-than-a-tile": ((1, 33, 3, 11), (33, 33, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "rgb-asymmetric-kernel": ((2, 3, 9, 7), (5, 3, 3, 2), ((1, 1), (1, 0), (1, 1), 1)),
    "all-asymmetric": ((2, 6, 7, 5), (9, 2, 3, 2), ((2, 1), (2, 1), (1, 3), 3)),
    "stride-beyond-kernel": ((1, 3, 9, 11), (4, 3, 2, 2), ((4, 3), (0, 0), (1, 1), 1)),
    "padding-beyond-kernel": ((1, 2, 4, 5), (4, 2, 2, 2), ((1, 1), (3, 4), (1, 1), 1)),
    "depthwise": ((1, 5, 6, 7), (10, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 5)),
    "more-pixels-than-a-chunk": ((3, 2, 14, 14), (3, 2, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
}


def operands(case: str, dtype: torch.dtype, layout: str = "contiguous") -> tuple:
    """input, weight, bias, a gradient of the output, and the options."""
    input_size, weight_size, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    input, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (input_size, weight_size, weight_size[:1])
    )
    output_size = torch.nn.functional.conv2d(input, weight, None, *options).shape
    grad = torch.randn(output_size, generator=generator, dtype=torch.float64)
    arrange = LAYOUTS[layout]
    return arrange(input.to(dtype)), arrange(weight.to(dtype)), bias.to(dtype), arrange(grad.to(dtype)), options


def triton_results(
    input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, options: tuple
) -> dict[str, Tensor]:
    ops = torch.ops.cvfast_triton
    return {
        "output": ops.conv2d(input, weight, bias, *options),
        "gradient of input": ops.conv2d_input_grad(grad, weight, input.shape, *options),
        "gradient of weight": ops.conv2d_weight_grad(grad, input, weight.shape, *options),
    }


def torch_results(
    input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, options: tuple
) -> dict[str, Tensor]:
    stride, padding, dilation, groups = options
    input_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, True, False)
    )
    output = torch.nn.functional.conv2d(input, weight, bias, *options)
    return {"output": output, "gradient of input": input_grad, "gradient of weight": weight_grad}


def check(input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, options: tuple) -> None:
    actual = triton_results(input, weight, bias, grad, options)
    native = torch_results(input, weight, bias, grad, options)
    exact = torch_results(*(None if t is None else t.double() for t in (input, weight, bias, grad)), options)
    for name in actual:
        assert_as_accurate(actual[name], native[name], exact[name], what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results(case, dtype, poisoned):
    check(*operands(case, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, poisoned):
    """Any strides are read in place; without a bias, too."""
    input, weight, _, grad, options = operands("all-asymmetric", torch.float32, layout)
    check(input, weight, None, grad, options)


def test_zero_sizes():
    options = ((1, 1), (1, 1), (1, 1), 1)
    input, weight, grad = torch.ones(0, 3, 5, 4), torch.ones(6, 3, 3, 3), torch.ones(0, 6, 5, 4)
    results = triton_results(input, weight, torch.ones(6), grad, options)
    assert results["output"].shape == grad.shape
    assert results["gradient of input"].shape == input.shape
    assert torch.equal(results["gradient of weight"], torch.zeros_like(weight))  # a sum over no pixels


def test_a_sample_alone_has_the_bits_it_has_in_a_batch():
    input, weight, bias, grad, options = operands("all-asymmetric", torch.float32)
    batch = triton_results(input, weight, bias, grad, options)
    alone = triton_results(input[1:], weight, bias, grad[1:], options)
    assert torch.equal(alone["output"], batch["output"][1:])
    assert torch.equal(alone["gradient of input"], batch["gradient of input"][1:])


def test_64_bit_offsets_change_no_bit(monkeypatch):
    args = operands("all-asymmetric", torch.float32)
    narrow = triton_results(*args)
    monkeypatch.setattr(conv2d, "OFFSETS_32", 0)
    for name, result in triton_results(*args).items():
        assert torch.equal(result, narrow[name]), name


def test_tensors_beyond_32_bit_offsets(tmp_path, monkeypatch):
    """Samples 2 GiB apart, the last one beyond 2**31 elements (in a file with holes: it takes no room)."""
    samples, distance = 6, 2**29
    _, weight, bias, grad, options = operands("rgb-asymmetric-kernel", torch.float32)
    grad = grad[:1].expand(samples, -1, -1, -1)
    file = torch.from_file(str(tmp_path / "holes"), shared=True, size=samples * distance, dtype=torch.float32)
    input = file.as_strided((samples, 3, 9, 7), (distance, 63, 7, 1))
    input.copy_(torch.randn(input.shape, generator=torch.Generator().manual_seed(0)))
    assert (samples - 1) * distance > 2**31
    check(input, weight, bias, grad, options)

    monkeypatch.setattr(conv2d, "OFFSETS_32", 2**62)  # proves that it takes 64 bits
    with pytest.raises(InterpreterError, match="load of [0-9]+ elements outside"):
        conv2d.forward(input, weight, bias, *options)


def test_other_dtypes_are_refused():
    input, weight = torch.ones(1, 1, 3, 3, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    options = ((1, 1), (0, 0), (1, 1), 1)
    assert conv2d.why_not(input, weight, None, *options) == ["no kernel for torch.bfloat16"]
    with pytest.raises(NotImplementedError, match="no kernel for torch.bfloat16"):
        conv2d.run(input, weight, None, *options)
    with torch.autocast("cpu"):
        assert conv2d.why_not(input.float(), weight.float(), None, *options) == ["no kernel for torch.bfloat16"]
        assert conv2d.why_not(input.double(), weight.double(), None, *options) == []


def cuda_like(**attributes) -> SimpleNamespace:
    """What why_not looks at, of a tensor on a GPU."""
    defaults = {"device": torch.device("cuda:1"), "layout": torch.strided, "dtype": torch.float32}
    return SimpleNamespace(**(defaults | attributes))


def test_where_it_runs(monkeypatch):
    """GPUs of 8.0 and later; the CPU in the interpreter only; nothing without the package."""
    asked = []

    def gpu(major, minor):
        def properties(device):
            asked.append(device)
            return SimpleNamespace(major=major, minor=minor)

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    on_cpu, on_gpu = cuda_like(device=torch.device("cpu")), cuda_like()
    assert conv2d.why_not(on_cpu, on_cpu, None) == []
    monkeypatch.setattr(_env, "triton_interpret", False)
    assert conv2d.why_not(on_cpu, on_cpu, None) == [
        "Triton kernels run on CUDA tensors (or with TRITON_INTERPRET=1 on the CPU), not on 'cpu'"
    ]
    gpu(8, 0)
    assert conv2d.why_not(on_gpu, on_gpu, None) == []
    gpu(7, 5)
    assert conv2d.why_not(on_gpu, on_gpu, None) == ["Triton kernels need compute capability 8.0, this GPU has 7.5"]
    assert asked == [on_gpu.device] * 2
    sparse = cuda_like(layout=torch.sparse_coo)
    assert conv2d.why_not(sparse, on_gpu, None) == ["sparse and other unusual layouts are torch's"]
    monkeypatch.setattr(conv2d, "INSTALLED", False)
    assert conv2d.why_not(on_gpu, on_gpu, None) == ["the package triton is not installed"]


def test_auto_leaves_it_to_others():
    args = operands("rgb-asymmetric-kernel", torch.float32)
    assert conv2d.why_slower(*args[:3], *args[4]) == ["Triton's interpreter is for tests"]


def test_without_the_interpreter():
    """Importing cvfast imports no triton, and the operators have no kernel for the CPU."""
    program = """
import sys, torch, cvfast
assert "triton" not in sys.modules, "imported"
try:
    torch.ops.cvfast_triton.conv2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), None, [1, 1], [0, 0], [1, 1], 1)
except NotImplementedError as error:
    assert "CPU" in str(error)
else:
    raise AssertionError("ran")
"""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
