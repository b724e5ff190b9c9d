"""The OpSpec of conv_transpose2d."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch

from cvfast import functional, reference
from cvfast.testing import conv2d
from cvfast.testing.spec import Case, Sample, Shape


def case(name: str, input: Shape, weight: Shape, layout: str = "dense", bias: bool = True, **options) -> Case:
    """A case from the shapes of input and weight [C, K/groups, R, S]."""
    channels = weight[1] * options.get("groups", 1)
    return Case(name, {"input": input, "weight": weight, "bias": (channels,) if bias else None}, options, layout)


CASES = (  # run on every backend, interpreted ones too: a few tiles each
    case("4x4-stride2", (2, 12, 4, 4), (12, 7, 4, 4), stride=2, padding=1),
    case("4x4-from-one-pixel", (3, 10, 1, 1), (10, 20, 4, 4)),
    case("3x3", (2, 8, 6, 7), (8, 5, 3, 3), padding=1),
    case("one-line", (2, 6, 1, 5), (6, 4, 3, 3), stride=2, padding=(0, 1)),
    case("one-column-few-channels", (2, 3, 5, 1), (3, 4, 3, 4), stride=(1, 3), padding=(0, 1), output_padding=(0, 2)),
    case("one-pixel-depthwise", (2, 5, 1, 1), (5, 1, 3, 3), padding=1, dilation=2, groups=5),
    case("3x3-no-bias", (2, 8, 6, 7), (8, 5, 3, 3), bias=False),
    case("3x3-stride2-output-padding", (2, 5, 5, 4), (5, 6, 3, 3), stride=2, padding=1, output_padding=1),
    case("2x2-stride2", (2, 6, 5, 3), (6, 4, 2, 2), stride=2),
    case("1x1", (2, 5, 7, 6), (5, 9, 1, 1)),
    case("1x1-stride3", (1, 5, 4, 3), (5, 6, 1, 1), stride=3, output_padding=2),
    case("5x5-stride3-odd-channels", (2, 7, 4, 5), (7, 13, 5, 5), stride=3, padding=2, output_padding=(2, 1)),
    case(
        "all-asymmetric", (2, 6, 5, 6), (6, 2, 3, 2),
        stride=(2, 1), padding=(2, 1), output_padding=(1, 2), dilation=(1, 3), groups=3,
    ),
    case("dilated", (2, 8, 6, 5), (8, 6, 3, 3), padding=2, dilation=2),
    case("output-padding-beyond-stride", (2, 4, 3, 4), (4, 3, 2, 3), dilation=4, output_padding=(2, 3)),
    case("output-padding-alone", (1, 3, 1, 1), (3, 2, 1, 1), padding=1, dilation=3, output_padding=2),
    case("groups", (2, 12, 5, 4), (12, 5, 3, 3), stride=2, padding=1, groups=4),
    case("depthwise", (2, 5, 6, 7), (5, 1, 3, 3), padding=1, groups=5),
    case("depthwise-stride2", (1, 6, 4, 5), (6, 1, 4, 4), stride=2, padding=1, groups=6),
    case("depthwise-multiplier", (1, 3, 5, 4), (3, 2, 3, 3), stride=2, groups=3),
    case("stride-beyond-kernel", (1, 3, 3, 4), (3, 4, 2, 2), stride=4, output_padding=3),
    case("padding-beyond-kernel", (1, 3, 6, 7), (3, 4, 2, 2), padding=3, stride=2),
    case("1x7", (2, 6, 4, 8), (6, 5, 1, 7), padding=(0, 3), stride=(1, 2)),
    case("7x1", (2, 6, 8, 4), (6, 5, 7, 1), padding=(3, 0), stride=(2, 1)),
    case("one-element", (1, 1, 1, 1), (1, 1, 1, 1)),
    case("unbatched", (5, 4, 6), (5, 7, 4, 4), stride=2, padding=1),
    case("no-images", (0, 5, 4, 6), (5, 7, 4, 4), stride=2, padding=1),
    case("sliced", (2, 8, 5, 6), (8, 9, 4, 4), "sliced", stride=2, padding=1),
    case("sliced-depthwise", (2, 8, 6, 5), (8, 1, 3, 3), "sliced", groups=8),
    case("expanded", (3, 8, 5, 6), (8, 9, 4, 4), "expanded", stride=2, padding=1),
)  # fmt: skip

WIDE_CASES = (  # more vectors, tiles and blocks; not for interpreters
    case("dcgan-first", (3, 100, 1, 1), (100, 70, 4, 4)),
    case("dcgan-middle", (2, 130, 8, 7), (130, 66, 4, 4), stride=2, padding=1),
    case("dcgan-last", (2, 64, 16, 15), (64, 3, 4, 4), stride=2, padding=1),
    case("3x3-many-tiles", (2, 36, 15, 14), (36, 40, 3, 3), padding=1),
    case("3x3-stride2-wide", (1, 48, 13, 12), (48, 35, 3, 3), stride=2, padding=1, output_padding=1),
    case("3x3-stride2-many-tiles", (1, 24, 16, 15), (24, 33, 3, 3), stride=2, padding=1, output_padding=1),
    case("3x3-few-channels", (2, 3, 20, 21), (3, 6, 3, 3), stride=2),
    case("2x2-wide", (2, 70, 13, 9), (70, 35, 2, 2), stride=2),
    case("depthwise-wide", (2, 37, 11, 20), (37, 1, 3, 3), stride=2, padding=1, output_padding=1, groups=37),
    case("groups-wide", (2, 64, 9, 8), (64, 4, 4, 4), stride=2, padding=1, groups=16),
)

SMALL_CASES = (  # few elements
    case("3x3", (2, 2, 3, 4), (2, 3, 3, 3), stride=2, padding=1, output_padding=1),
    case("output-padding-beyond-stride", (1, 2, 2, 3), (2, 2, 2, 2), dilation=3, output_padding=(2, 1)),
    case("depthwise", (2, 3, 3, 2), (3, 1, 2, 3), padding=(0, 1), groups=3),
    case("no-bias", (1, 2, 2, 2), (2, 1, 2, 2), bias=False, stride=2, groups=2),
)

error = partial(conv2d.error, weight=(4, 8, 3, 3))
ERRORS = (
    error("input-1d", "Expected 4-dimensional input.*got 1-dimensional.*size \\[4\\]", input=(4,)),
    error("weight-3d", "weight", weight=(4, 8, 3)),
    error("channels", "expected input\\[2, 5, 6, 6\\] to have 4 channels, but got 5", input=(2, 5, 6, 6)),
    error("groups-zero", "non-positive groups.*groups=0", groups=0),
    error("groups-do-not-divide", "expected weight to be at least 3 at dimension 0", groups=3),
    error("stride-zero", "non-positive stride.*\\(0, 0\\)", stride=0),
    error("padding-negative", "negative padding.*\\(-1, -1\\)", padding=-1),
    error("padding-text", "conv_transpose2d: padding must be an int", TypeError, padding="same"),
    error("dilation-zero", "dilation should be greater than zero.*\\(0, 0\\)", dilation=0),
    error("stride-three-numbers", "stride takes one number or two.*\\(1, 1, 1\\)", stride=(1, 1, 1)),
    error("output-padding-text", "output_padding must be an int", TypeError, output_padding="1"),
    error("output-padding-negative", "negative output_padding.*\\(0, -1\\)", output_padding=(0, -1)),
    error("output-padding-stride-1", "output padding must be smaller than either stride or dilation", output_padding=1),
    error("output-padding-width", "width output_padding 2, stride 2, dilation 1", stride=2, output_padding=(1, 2)),
    error("no-output", "Output size is too small: height 6, kernel 3 and padding 4 give 0", padding=4),
    error("no-pixels", "width of input and kernel must be positive, got 0 and 3", input=(2, 4, 6, 0)),
    error("empty-kernel", "height of input and kernel must be positive, got 6 and 0", weight=(4, 8, 0, 3)),
    error("bias-size", "expected bias to be 1-dimensional with 8 elements.*\\[7\\]", bias=(7,)),
    error("bias-groups", "expected bias to be 1-dimensional with 16 elements.*\\[8\\]", bias=(8,), groups=2),
    error("bias-2d", "expected bias to be 1-dimensional.*\\[8, 1\\]", bias=(8, 1)),
    error("dtypes", "should be the same", weight=torch.zeros(4, 8, 3, 3, dtype=torch.float64)),
    error("bias-dtype", "bias type .*float64.* should be the same", bias=torch.zeros(8, dtype=torch.float64)),
    error("devices", "should be the same", weight=torch.zeros(4, 8, 3, 3, device="meta")),
    error("backend", "unknown backend 'cudnn'; allowed: auto, ext, triton, native", ValueError, backend="cudnn"),
)


class ConvTranspose2dSpec(conv2d.Conv2dSpec):
    """conv_transpose2d; dtypes, vmap and bound are conv2d's, whose kernels it runs on. See OpSpec."""

    name = "conv_transpose2d"
    function = staticmethod(functional.conv_transpose2d)
    native = staticmethod(torch.nn.functional.conv_transpose2d)
    reference = staticmethod(reference.conv_transpose2d)
    cases = CASES
    wide_cases = WIDE_CASES
    small_cases = SMALL_CASES
    errors = ERRORS
    finer_result = "output"

    def random_case(self, rng: random.Random) -> Case:
        groups = rng.choice((1, 1, 1, 2, 3, 5))
        kernel, stride, dilation = (
            tuple(rng.choice(choices) for _ in range(2)) for choices in ((1, 2, 3, 4, 5), (1, 2, 2, 3), (1, 1, 2, 3))
        )
        output_padding = tuple(rng.randrange(max(pair)) for pair in zip(stride, dilation, strict=True))
        size = [rng.randint(1, 12) for _ in range(2)]
        reach = [(size[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + output_padding[i] for i in range(2)]
        channels = groups * rng.randint(1, 20)
        return case(
            "random",
            (rng.randint(1, 4), channels, *size),
            (channels, rng.randint(1, 12), *kernel),
            rng.choice(("dense", "dense", "sliced", "expanded")),
            rng.random() < 0.5,
            stride=stride,
            padding=tuple(rng.randint(0, min(4, r // 2)) for r in reach),
            output_padding=output_padding,
            groups=groups,
            dilation=dilation,
        )

    def _tiled_image(self, sample: Sample, result: str) -> torch.Tensor:
        return sample.call(self.native) if result == "output" else sample.operands["input"]

    def operator_calls(self, sample: Sample) -> Iterator[tuple[str, tuple]]:
        names = (("stride", 1), ("padding", 0), ("output_padding", 0))
        pads, dilation = [self._pair(sample, *name) for name in names], self._pair(sample, "dilation", 1)
        yield "conv_transpose2d", (*sample.operands.values(), *pads, sample.options.get("groups", 1), dilation)

    def flops(self, sample: Sample) -> int:
        weight = sample.operands["weight"]
        return 2 * sample.operands["input"].numel() * weight[0].numel()
