"""csrc/cuda/conv2d.cu, run: launchers as nvcc compiled them, kernels as PTX on the simulated device.

Shows that the three products are right for every case of the OpSpec (accuracy against the reference, as for every
backend), write exactly the elements of their results, stay within their operands, have no race, and give the same bits
whatever the order of threads and blocks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cvfast.testing import SPECS, Case, Sample, assert_as_accurate, widened
from tests.cuda_on_cpu import conv2d
from tests.cuda_on_cpu.simulator import CudaError, SimulationError, compile_module

SPEC = SPECS["conv2d"]
# String padding and unbatched input are cvfast.functional's business; the kernels get numbers and 4 dimensions.
CASES = [c for c in SPEC.cases if not isinstance(c.options.get("padding"), str) and len(c.shapes["input"]) == 4]
SEEDS = (0, 1, 2)


def geometry(options: dict) -> conv2d.Geometry:
    def pair(name: str, default: int) -> tuple[int, int]:
        value = options.get(name, default)
        return (value, value) if isinstance(value, int) else value

    return {
        "stride": pair("stride", 1), "padding": pair("padding", 0), "dilation": pair("dilation", 1),
        "groups": options.get("groups", 1),
    }  # fmt: skip


def gradients(function, sample: Sample, grad_output: Tensor) -> dict[str, Tensor]:
    """The result and the gradients to input and weight."""
    sample = sample.requiring_grad()
    output = sample.call(function)
    operands = [sample.operands["input"], sample.operands["weight"]]
    grads = torch.autograd.grad(output, operands, grad_output)
    return dict(zip(("output", "grad_input", "grad_weight"), (output.detach(), *grads), strict=True))


class Result:
    """Memory for a result, all NaN: dense, or for the layout "sliced" with a gap after each element."""

    def __init__(self, like: Tensor, layout: str, memory_format: torch.memory_format) -> None:
        sliced = layout == "sliced"
        width = 2 * like.shape[3] + 1 if sliced else like.shape[3]
        self._memory = (
            torch.empty(*like.shape[:3], width, dtype=like.dtype).to(memory_format=memory_format).fill_(torch.nan)
        )
        self.tensor = self._memory[..., 1::2] if sliced else self._memory
        self._gaps = self._memory[..., 0::2] if sliced else self._memory[..., :0]

    def assert_gaps_untouched(self) -> None:
        assert self._gaps.isnan().all(), "memory between the result's elements was written"


def run_all(
    module, sample: Sample, grad_output: Tensor, results: dict[str, Result], options: dict, **run
) -> dict[str, Tensor]:
    """The three launchers' results, written over NaN."""
    for result in results.values():
        result.tensor.fill_(torch.nan)
    input, weight, bias = (sample.operands[name] for name in ("input", "weight", "bias"))
    bias = None if bias is None else bias.contiguous()  # as the contract asks
    shape = geometry(options)
    conv2d.forward(module, input, weight, bias, results["output"].tensor, shape, **run)
    conv2d.input_grad(module, grad_output, weight, None, results["grad_input"].tensor, shape, **run)
    conv2d.weight_grad(module, grad_output, input, results["grad_weight"].tensor, shape, **run)
    for result in results.values():
        result.assert_gaps_untouched()
    return {name: result.tensor.clone() for name, result in results.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(torch.float32, torch.contiguous_format, id="f32-contiguous"),
        pytest.param(torch.float32, torch.channels_last, id="f32-channels_last"),
        pytest.param(torch.float64, torch.channels_last, id="f64-channels_last"),
    ],
)
def test_results(case: Case, dtype: torch.dtype, layout: torch.memory_format, conv2d_module):
    sample = case.sample(dtype, layout)
    grad_output = sample.call(SPEC.native)
    grad_output = torch.randn(grad_output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad_output = grad_output.to(dtype).contiguous(memory_format=layout)
    native = gradients(SPEC.native, sample, grad_output)
    exact = gradients(SPEC.reference, sample.map(widened), widened(grad_output))

    results = {name: Result(tensor, case.layout, layout) for name, tensor in native.items()}
    # The race check compares accesses whatever their order, so it need not look at every order of every case.
    all_checked = layout == torch.contiguous_format
    first, *others = (
        run_all(
            conv2d_module, sample, grad_output, results, case.options, seed=seed, check_races=all_checked or seed == 0
        )
        for seed in SEEDS
    )
    for name in native:
        assert_as_accurate(first[name], native[name], exact[name], f"{name} of {case}")
        for other in others:
            assert torch.equal(first[name], other[name]), f"{name}: the order of threads changes the result"


TRANSPOSED = SPECS["conv_transpose2d"]


@pytest.mark.parametrize("case", [c for c in TRANSPOSED.cases if len(c.shapes["input"]) == 4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transposed_results(case: Case, dtype: torch.dtype, conv2d_module):
    """conv_transpose2d is the input gradient's launcher with a bias; also where output_padding spans a stride."""
    sample = case.sample(dtype, torch.channels_last)
    input, weight, bias = (sample.operands[name] for name in ("input", "weight", "bias"))
    bias = None if bias is None else bias.contiguous()  # as the contract asks
    native = sample.call(TRANSPOSED.native)
    result = Result(native, case.layout, torch.channels_last)
    conv2d.input_grad(conv2d_module, input, weight, bias, result.tensor, geometry(case.options), check_races=True)
    result.assert_gaps_untouched()
    assert_as_accurate(result.tensor, native, sample.map(widened).call(TRANSPOSED.reference), str(case))


GEOMETRY = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def forward(module, input: Tensor, weight: Tensor, **run) -> tuple[Tensor, list]:
    output = torch.full_like(torch.nn.functional.conv2d(input, weight, padding=1), torch.nan)
    launches = conv2d.forward(module, input, weight, None, output, GEOMETRY, **run)
    return output, launches


def test_a_sample_alone_and_in_a_batch_gives_the_same_bits(conv2d_module):
    input, weight = torch.randn(3, 5, 6, 7), torch.randn(8, 5, 3, 3)
    batch, _ = forward(conv2d_module, input, weight)
    for i in range(3):
        alone, _ = forward(conv2d_module, input[i : i + 1], weight)
        assert torch.equal(alone[0], batch[i])


def test_long_sums_keep_their_accuracy(conv2d_module):
    """A weight gradient over 20,000 positions, all values near 1: a single running sum would lose the last bits."""
    generator = torch.Generator().manual_seed(0)
    grad_output, input = (1 + torch.rand(1, 1, 100, 200, generator=generator) for _ in range(2))
    grad_weight = torch.full((1, 1, 1, 1), torch.nan)
    conv2d.weight_grad(
        conv2d_module, grad_output, input, grad_weight, GEOMETRY | {"padding": (0, 0)}, check_races=False
    )
    exact = (grad_output.double() * input.double()).sum()
    assert abs(grad_weight.item() / exact - 1) < 1e-6


def test_nan_and_infinity_pass_through(conv2d_module):
    input, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 3, 3)
    input[0, 1, 2, 3], input[0, 0, 4, 5] = torch.nan, torch.inf
    output, _ = forward(conv2d_module, input, weight)
    expected = torch.nn.functional.conv2d(input.double(), weight.double(), padding=1)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())


def test_one_block_per_tile_on_the_callers_stream(conv2d_module):
    _, launches = forward(conv2d_module, torch.randn(2, 3, 9, 10), torch.randn(70, 3, 3, 3), stream=0x1234)
    # 180 columns and 70 rows in tiles of 64
    assert [(x.grid, x.block, x.stream) for x in launches] == [((3 * 2, 1, 1), (256, 1, 1), 0x1234)]


def test_fewer_blocks_than_tiles(conv2d_module):
    """As beyond 2^31 - 1 tiles: each block takes several."""
    input, weight = torch.randn(2, 3, 9, 10), torch.randn(70, 3, 3, 3)
    expected, (launch,) = forward(conv2d_module, input, weight)
    output = torch.full_like(expected, torch.nan)
    arguments = conv2d.Conv2dForward(
        conv2d.shape(input.shape, weight.shape, output.shape, GEOMETRY), conv2d.DTYPES[input.dtype],
        conv2d.Tensor4.of(input), conv2d.Tensor4.of(weight), None, conv2d.Tensor4.of(output),
    )  # fmt: skip
    for blocks in (1, 4):
        output.fill_(torch.nan)
        conv2d_module.launch(
            launch.kernel, (blocks, 1, 1), launch.block, bytes(arguments),
            reads={"input": input, "weight": weight}, writes={"output": output},
        )  # fmt: skip
        assert torch.equal(output, expected)


def test_nothing_to_write_launches_nothing(conv2d_module):
    input, weight, output = torch.randn(0, 3, 4, 4), torch.randn(2, 3, 3, 3), torch.empty(0, 2, 4, 4)
    assert conv2d.forward(conv2d_module, input, weight, None, output, GEOMETRY) == []


def test_an_empty_sum_is_zero(conv2d_module):
    """No images: the gradient of the weight is written, and is zero."""
    grad_weight = torch.full((2, 3, 3, 3), torch.nan)
    conv2d.weight_grad(conv2d_module, torch.empty(0, 2, 4, 4), torch.empty(0, 3, 4, 4), grad_weight, GEOMETRY)
    assert torch.equal(grad_weight, torch.zeros(2, 3, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype, conv2d_module):
    with pytest.raises(CudaError) as raised:
        forward(conv2d_module, torch.randn(1, 2, 4, 4, dtype=dtype), torch.randn(2, 2, 3, 3, dtype=dtype))
    assert raised.value.code == 1  # cudaErrorInvalidValue


@pytest.mark.parametrize(
    ("find", "replace", "message"),
    [
        pytest.param(
            "__syncthreads();\n#pragma unroll 4\n", "#pragma unroll 4\n", "is read before it was written|race",
            id="no-barrier-before-use",
        ),
        pytest.param("__syncthreads();\n      if ((k", "if ((k", "race: shared variable", id="no-barrier-after-use"),
        pytest.param(
            "column >= product.columns()", "column > product.columns()", "outside every buffer|race",
            id="one-column-more",
        ),
        pytest.param("h < shape.in_height", "h <= shape.in_height", "outside every buffer", id="one-row-more"),
    ],
)  # fmt: skip
def test_a_broken_kernel_is_caught(find: str, replace: str, message: str, conv2d_source: str, build_folder):
    """The kernel with one mistake in it must not pass, whatever the order of threads."""
    assert conv2d_source.count(find) == 1
    module = compile_module(conv2d_source.replace(find, replace), build_folder, only="7ForwardIfE")
    for seed in SEEDS:
        with pytest.raises(SimulationError, match=message):
            forward(module, torch.randn(1, 5, 6, 7), torch.randn(3, 5, 3, 3), seed=seed)
