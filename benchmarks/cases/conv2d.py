"""Shapes of convolutions as they stand in networks, grouped by what makes them fast or slow."""

from benchmarks.goals import Goal
from benchmarks.results import WINOGRAD_PEERS
from cvfast.testing.conv2d import case


def square(batch: int, channels: int, size: int, out: int, kernel: int, **options):
    """A square kernel on square images; `groups` among the options divides the channels."""
    groups = options.get("groups", 1)
    name = f"{batch}x{channels}x{size}x{size}-{out}-k{kernel}" + "".join(f"-{k[0]}{v}" for k, v in options.items())
    return case(name, (batch, channels, size, size), (out, channels // groups, kernel, kernel), **options)


def same(batch: int, channels: int, size: int, out: int, kernel: int = 3, **options):
    """As `square`, padded so that stride 1 keeps the size."""
    return square(batch, channels, size, out, kernel, padding=options.get("dilation", 1) * (kernel // 2), **options)


DATA = ("input",)
FORMATS = ("contiguous", "channels_last")
BATCH_FIRST = True

RESNET = ((64, 56, 64), (128, 28, 128), (256, 14, 256), (512, 7, 512))  # channels, size, channels out
VGG = ((64, 32, 64), (64, 16, 128), (128, 16, 128), (256, 8, 256))  # its 32x32 form

GROUPS = {
    "3x3": [same(b, c, s, k) for b in (1, 8, 64) for c, s, k in (*RESNET, *VGG)],
    "3x3-stride2": [same(8, c, s, 2 * c, stride=2) for c, s in ((64, 56), (128, 28), (256, 14))],
    "1x1": [
        *(square(8, c, s, k, 1) for c, s, k in ((64, 56, 256), (256, 56, 64), (512, 14, 1024))),
        square(8, 64, 56, 128, 1, stride=2),
    ],
    "stem": [
        square(1, 3, 224, 64, 7, stride=2, padding=3),
        square(8, 3, 224, 64, 7, stride=2, padding=3),
        square(8, 3, 224, 32, 3, stride=2, padding=1),
    ],
    "few-channels": [
        square(b, c, s, k, 5) for b, c, s, k in ((64, 3, 32, 6), (64, 1, 32, 6), (64, 6, 14, 16), (1, 3, 32, 6))
    ],
    "depthwise": [
        same(1, 96, 56, 96, 3, groups=96),
        same(8, 192, 28, 192, 3, groups=192),
        same(8, 144, 56, 144, 3, stride=2, groups=144),
        same(8, 120, 28, 120, 5, groups=120),
    ],
    "grouped": [same(8, c, s, c, 3, groups=32) for c, s in ((128, 28), (256, 14))],
    "dilated": [same(8, 64, 28, 64, dilation=2), same(2, 256, 28, 256, dilation=4)],
    "long": [case("4x16x4096x1-32-k512x1", (4, 16, 4096, 1), (32, 16, 512, 1))],
    "dcgan": [  # discriminator, 64x64 images; Radford et al. 2015
        layer
        for b in (1, 16)
        for layer in (
            *(
                square(b, c, s, k, 4, stride=2, padding=1)
                for c, s, k in ((3, 64, 64), (64, 32, 128), (128, 16, 256), (256, 8, 512))
            ),
            square(b, 512, 4, 1, 4),
        )
    ],
    "small": [same(1, 16, 8, 16), same(1, 8, 8, 8), same(8, 32, 8, 32)],
}

SLOW_GROUPS = ("few-channels", "depthwise", "grouped", "small")  # where torch is far from the peak
OTHER_GROUPS = ("3x3-stride2", "1x1", "stem", "dilated", "long")
NEVER_SLOWER = 0.97

GOALS = (
    Goal("3x3 against torch", ("3x3",), "forward", geomean=2.5, each=1.7),
    Goal("3x3 against MNN and ncnn", ("3x3",), "forward", WINOGRAD_PEERS, geomean=1.1, error=4e-6),
    Goal("against torch", SLOW_GROUPS, "forward", geomean=1.5, each=NEVER_SLOWER),
    Goal("against torch", OTHER_GROUPS, "forward", geomean=1.1, each=NEVER_SLOWER),
    Goal("training against torch", tuple(GROUPS), "training", geomean=1.7, each=NEVER_SLOWER, together=True),
    Goal("share of the peak, >= 64 channels", ("3x3-stride2", "1x1", "dilated"), "forward", peak_share=0.85),
)

OVERHEAD_GOALS = {"no grad": 3.0, "forward with grad": 15.0}  # µs over torch's operator on 1x8x8x8
MEMORY_GOAL_MB = 5.0  # resident memory, over 10 000 different shapes
