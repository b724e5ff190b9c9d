"""The OpSpec of conv2d."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from cvfast import _library, functional, reference
from cvfast.testing.spec import Case, ErrorCase, OpSpec, Sample, Shape

WINOGRAD_ERROR = 4e-6  # relative, in float32 on normal data
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def case(name: str, input: Shape, weight: Shape, layout: str = "dense", bias: bool = True, **options) -> Case:
    """A case from the shapes of input and weight."""
    return Case(name, {"input": input, "weight": weight, "bias": (weight[0],) if bias else None}, options, layout)


CASES = (  # run on every backend, interpreted ones too: a few tiles each
    case("1x1", (2, 5, 7, 6), (9, 5, 1, 1)),
    case("1x1-stride2", (2, 24, 9, 8), (17, 24, 1, 1), stride=2),
    case("3x3", (2, 8, 10, 9), (16, 8, 3, 3), padding=1),
    case("3x3-no-bias", (2, 8, 10, 9), (16, 8, 3, 3), bias=False, padding=1),
    case("3x3-stride2-odd-channels", (3, 7, 11, 13), (13, 7, 3, 3), stride=2, padding=1),
    case("4x4-even", (2, 6, 9, 9), (8, 6, 4, 4), stride=2, padding=1),
    case("2x2-same", (2, 4, 6, 5), (5, 4, 2, 2), padding="same"),
    case("3x2-same-dilated", (2, 4, 8, 7), (5, 4, 3, 2), padding="same", dilation=(2, 1)),
    case("valid", (2, 4, 6, 5), (5, 4, 3, 3), padding="valid"),
    case("1x7", (2, 6, 8, 12), (10, 6, 1, 7), padding=(0, 3)),
    case("7x1", (2, 6, 12, 8), (10, 6, 7, 1), padding=(3, 0)),
    case("long-kernel", (1, 1, 45, 1), (6, 1, 40, 1), padding=(5, 0)),
    case("all-asymmetric", (2, 6, 15, 14), (9, 2, 3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3), groups=3),
    case("5x5-rgb", (2, 3, 9, 8), (6, 3, 5, 5)),
    case("depthwise", (2, 5, 6, 7), (5, 1, 3, 3), padding=1, groups=5),
    case("depthwise-stride2", (1, 6, 9, 8), (6, 1, 5, 5), stride=2, padding=2, groups=6),
    case("depthwise-multiplier", (1, 3, 7, 6), (6, 1, 3, 3), padding=1, groups=3),
    case("dilated", (2, 8, 15, 13), (8, 8, 3, 3), padding=2, dilation=2),
    case("groups", (2, 12, 9, 8), (20, 3, 3, 3), padding=1, groups=4),
    case("kernel-covers-image", (2, 9, 5, 4), (11, 9, 5, 4)),
    case("padding-beyond-kernel", (1, 3, 4, 5), (4, 3, 2, 2), padding=3),
    case("3x3-on-a-pixel", (3, 6, 1, 1), (9, 6, 3, 3), padding=1),
    case("3x3-stride2-on-2x3", (2, 5, 2, 3), (7, 5, 3, 3), stride=2, padding=1),
    case("5x5-groups-on-2x1", (2, 6, 2, 1), (8, 3, 5, 5), padding=2, groups=2),
    case("3x3-dilated-on-2x2", (2, 4, 2, 2), (5, 4, 3, 3), padding=2, dilation=2),
    case("depthwise-on-a-pixel", (2, 6, 1, 1), (6, 1, 3, 3), padding=1, groups=6),
    case("sliced-on-a-pixel", (2, 6, 1, 2), (8, 6, 3, 3), "sliced", padding=1),
    case("stride-beyond-kernel", (1, 3, 9, 11), (4, 3, 2, 2), stride=4),
    case("one-element", (1, 1, 1, 1), (1, 1, 1, 1)),
    case("unbatched", (5, 8, 9), (7, 5, 3, 3), padding=1),
    case("no-images", (0, 5, 8, 9), (7, 5, 3, 3), padding=1),
    case("sliced", (2, 8, 10, 9), (16, 8, 3, 3), "sliced", padding=1),
    case("sliced-depthwise", (2, 8, 10, 9), (8, 1, 3, 3), "sliced", groups=8),
    case("expanded", (3, 8, 10, 9), (16, 8, 3, 3), "expanded", padding=1),
)

WIDE_CASES = (  # more vectors, tiles and blocks; not for interpreters
    case("3x3-more-channels-than-a-block", (1, 130, 6, 7), (70, 130, 3, 3), padding=1),
    case("7x7-stem", (1, 3, 41, 37), (20, 3, 7, 7), stride=2, padding=3),
    case("5x5-rgb-batch", (4, 3, 32, 32), (6, 3, 5, 5)),
    case("5x5", (3, 6, 14, 14), (16, 6, 5, 5)),
    case("depthwise-wide", (2, 37, 20, 41), (37, 1, 3, 3), padding=1, groups=37),
    case("depthwise-5x5-stride2", (2, 35, 23, 38), (35, 1, 5, 5), stride=2, padding=2, groups=35),
    case("depthwise-multiplier-wide", (1, 12, 9, 35), (36, 1, 3, 3), padding=1, groups=12),
    case("depthwise-dilated", (1, 20, 16, 18), (20, 1, 7, 7), padding=6, dilation=2, groups=20),
    case("groups-wide", (2, 64, 14, 15), (64, 4, 3, 3), padding=1, groups=16),
    case("3x3-dilated-wide", (2, 17, 27, 26), (20, 17, 3, 3), padding=(3, 2), dilation=2),
    case("3x3-dilated-by-4", (2, 17, 17, 16), (20, 17, 3, 3), padding=4, dilation=4),
    case("3x3-short-tiles-and-two-blocks", (1, 130, 14, 14), (34, 130, 3, 3), padding=1),
    case("3x3-many-tiles", (2, 36, 30, 29), (40, 36, 3, 3), padding=1),
    case("3x3-padding-2", (1, 40, 13, 11), (33, 40, 3, 3), padding=2),
    case("3x3-padding-3", (1, 17, 9, 8), (20, 17, 3, 3), padding=3),
    case("3x3-on-a-pixel-wide", (3, 40, 1, 1), (50, 40, 3, 3), padding=1),
    case("3x3-stride2-on-2x2-wide", (2, 36, 2, 2), (70, 36, 3, 3), stride=2, padding=1),
    case("3x3-on-2x2-wide", (3, 90, 2, 2), (70, 90, 3, 3), padding=1),
    case("1x1-wide", (2, 70, 13, 17), (90, 70, 1, 1)),
    case("long-sums", (2, 130, 4, 5), (2, 130, 4, 4)),
    case("4x4-stride2-wide", (4, 40, 16, 15), (36, 20, 4, 4), stride=2, padding=1, groups=2),
    case("3x3-stride2-wide", (1, 40, 32, 31), (33, 40, 3, 3), stride=2, padding=1),
)

SMALL_CASES = (  # run on every backend, interpreted ones too: a few tiles each
    case("3x3", (2, 2, 4, 5), (3, 2, 3, 3), padding=1),
    case("stride-dilation-groups", (1, 4, 6, 5), (4, 2, 2, 2), stride=2, padding=1, dilation=2, groups=2),
    case("depthwise", (2, 3, 4, 3), (3, 1, 2, 3), padding=(0, 1), groups=3),
    case("no-bias", (1, 1, 3, 3), (1, 1, 2, 2), bias=False),
)


def error(
    name: str, match: str, error: type[Exception] = RuntimeError, *, input=(2, 4, 6, 6), weight=(8, 4, 3, 3), **options
):
    """A wrong call on zeros; `input`, `weight` and `bias` are shapes or tensors."""

    def call(function):
        as_tensor = lambda value: torch.zeros(value) if isinstance(value, tuple) else value  # noqa: E731
        operands = {"input": as_tensor(input), "weight": as_tensor(weight), "bias": as_tensor(options.get("bias"))}
        return function(**operands, **{k: v for k, v in options.items() if k != "bias"})

    return ErrorCase(name, call, error, match)


ERRORS = (
    error("input-1d", "Expected 4-dimensional input.*got 1-dimensional.*size \\[4\\]", input=(4,)),
    error("weight-3d", "weight", weight=(8, 4, 3)),
    error("channels", "expected input\\[2, 5, 6, 6\\] to have 4 channels, but got 5", input=(2, 5, 6, 6)),
    error("groups-zero", "non-positive groups.*groups=0", groups=0),
    error("groups-negative", "non-positive groups.*groups=-1", groups=-1),
    error("groups-do-not-divide", "expected weight to be at least 3 at dimension 0", groups=3),
    error("stride-zero", "non-positive stride.*\\(0, 0\\)", stride=0),
    error("padding-negative", "negative padding.*\\(-1, -1\\)", padding=-1),
    error("dilation-zero", "dilation should be greater than zero.*\\(0, 0\\)", dilation=0),
    error("stride-three-numbers", "stride takes one number or two.*\\(1, 1, 1\\)", stride=(1, 1, 1)),
    error("stride-text", "stride must be an int", TypeError, stride="2"),
    error("stride-float", "stride must be an int", TypeError, stride=(1.5, 1)),
    error("padding-text", "'valid', 'same' or numbers, got 'full'", padding="full"),
    error("same-strided", "padding='same' is not supported for strided", padding="same", stride=2),
    error("kernel-larger", "Kernel size can't be greater than actual input size", weight=(8, 4, 7, 7)),
    error("bias-size", "expected bias to be 1-dimensional with 8 elements.*\\[7\\]", bias=(7,)),
    error("bias-2d", "expected bias to be 1-dimensional.*\\[8, 1\\]", bias=(8, 1)),
    error("dtypes", "should be the same", weight=torch.zeros(8, 4, 3, 3, dtype=torch.float64)),
    error("bias-dtype", "bias type .*float64.* should be the same", bias=torch.zeros(8, dtype=torch.float64)),
    error("devices", "should be the same", weight=torch.zeros(8, 4, 3, 3, device="meta")),
    error("backend", "unknown backend 'cudnn'; allowed: auto, ext, triton, native", ValueError, backend="cudnn"),
)


def _winograd_on_phases(kernel_height: int, kernel_width: int, height: int, width: int, batch: int | None) -> bool:
    """Whether Winograd's F(4x4, 2x2) takes a convolution with stride 2; height x width: a phase of the result.

    batch: that of a gradient to the weight, None for the others.
    """
    taps, tiles = kernel_height * kernel_width, -(-height // 4) * -(-width // 4)
    enough = tiles >= (4 if taps == 16 else 16) if batch is None else batch * tiles >= 16
    return (
        {kernel_height, kernel_width} <= {3, 4}
        and enough
        and 3 * (kernel_height + 6) * (kernel_width + 6) * tiles <= 2 * taps * height * width
    )


class Conv2dSpec(OpSpec):
    """conv2d; see OpSpec."""

    name = "conv2d"
    function = staticmethod(functional.conv2d)
    native = staticmethod(torch.nn.functional.conv2d)
    reference = staticmethod(reference.conv2d)
    gpu_dtypes = (torch.float32, torch.float64)
    dtypes = {"ext": CPU_DTYPES, "triton": gpu_dtypes, "native": CPU_DTYPES}
    cases = CASES
    wide_cases = WIDE_CASES
    small_cases = SMALL_CASES
    errors = ERRORS
    plain_case = "3x3"
    batched = ("input",)
    vmap_dims = (
        {"input": 0, "weight": None, "bias": None},
        {"input": 2, "weight": 0, "bias": None},
        {"input": None, "weight": 1, "bias": 0},
        {"input": 1, "weight": None, "bias": 1},
    )

    def random_case(self, rng: random.Random) -> Case:
        groups = rng.choice((1, 1, 1, 2, 3, 5))
        kernel = [rng.randint(1, 5) for _ in range(2)]
        dilation = tuple(rng.choice((1, 1, 2, 3)) for _ in range(2))
        padding = tuple(rng.randint(0, 4) for _ in range(2))
        size = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) + rng.randint(0, 20) for i in range(2)]
        in_channels, out_channels = groups * rng.randint(1, 12), groups * rng.randint(1, 20)
        return case(
            "random",
            (rng.randint(1, 4), in_channels, *size),
            (out_channels, in_channels // groups, *kernel),
            rng.choice(("dense", "dense", "sliced", "expanded")),
            rng.random() < 0.5,
            stride=tuple(rng.choice((1, 1, 2, 3)) for _ in range(2)),
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    def operator_calls(self, sample: Sample) -> Iterator[tuple[str, tuple]]:
        input, weight, bias = sample.operands.values()
        pairs = [
            self._pair(sample, name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
        ]
        options = (*pairs, sample.options.get("groups", 1))
        grad = torch.randn_like(sample.call(self.native))
        yield "conv2d", (input, weight, bias, *options)
        yield "conv2d_input_grad", (grad, weight, list(input.shape), *options)
        yield "conv2d_weight_grad", (grad, input, list(weight.shape), *options)

    @staticmethod
    def _pair(sample: Sample, name: str, default: int) -> tuple[int, int]:
        value = sample.options.get(name, default)
        return (value, value) if isinstance(value, int) else value

    def _tiled_image(self, sample: Sample, result: str) -> torch.Tensor:
        """What Winograd cuts into tiles for `result`: the result, or for the weights the output's gradient."""
        return sample.operands["input"] if result == "input" else sample.call(self.native)

    finer_result = "input"  # the one that a stride makes larger than the other image

    def bound(self, sample: Sample, backend: str, result: str) -> float:
        """Winograd's, where csrc/cpu/kernels/conv2d_winograd.h or conv2d_winograd_weight_grad.h takes the result."""
        weight, groups = sample.operands["weight"], sample.options.get("groups", 1)
        stride, dilation = (self._pair(sample, name, 1) for name in ("stride", "dilation"))
        possible = (
            backend == "ext"
            and not _library.C.strict_precision()
            and result != "bias"
            and weight.dtype != torch.float64
            and (dilation == (1, 1) or stride == (1, 1))
            and min(weight.shape[0] // groups, weight.shape[1]) >= 16
        )
        if not possible:
            return 0.0
        height, width = self._tiled_image(sample, result).shape[-2:]
        if stride == (2, 2):
            if result == self.finer_result:
                height, width = (height + 1) // 2, (width + 1) // 2
            batch = sample.operands["input"][..., 0, 0, 0].numel() if result == "weight" else None
            taken = _winograd_on_phases(*weight.shape[2:], height, width, batch)
            few_channels = weight.shape[2:].numel() < 16 and weight.shape[1] <= 32
            taken = taken and not (result == self.finer_result and few_channels)
        else:
            tiles = -(-height // (4 * dilation[0])) * -(-width // (4 * dilation[1]))
            taken = weight.shape[2:] == (3, 3) and stride == (1, 1) and height * width >= 16
            enough = 6 * tiles * dilation[0] * dilation[1] <= height * width
            taken = taken and (dilation == (1, 1) or enough)
        return WINOGRAD_ERROR if taken else 0.0

    def flops(self, sample: Sample) -> int:
        output = sample.call(self.native)
        return 2 * output.numel() * sample.operands["weight"][0].numel()
