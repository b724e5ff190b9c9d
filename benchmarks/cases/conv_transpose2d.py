"""Shapes of transposed convolutions as they stand in networks, grouped by what makes them fast or slow."""

from benchmarks.goals import Goal
from cvfast.testing.conv_transpose2d import case


def square(batch: int, channels: int, size: int, out: int, kernel: int, **options):
    """A square kernel on square images."""
    name = f"{batch}x{channels}x{size}x{size}-{out}-k{kernel}" + "".join(f"-{k[0]}{v}" for k, v in options.items())
    weight = (channels, out // options.get("groups", 1), kernel, kernel)
    return case(name, (batch, channels, size, size), weight, **options)


DOUBLING = {"stride": 2, "padding": 1}  # 4x4 kernels: twice as high and wide

DATA = ("input",)
FORMATS = ("contiguous", "channels_last")
BATCH_FIRST = True

GROUPS = {
    "dcgan": [  # generator, 64x64 images; Radford et al. 2015
        layer
        for batch in (1, 16)
        for layer in (
            square(batch, 100, 1, 512, 4),
            *(square(batch, c, s, c // 2, 4, **DOUBLING) for c, s in ((512, 4), (256, 8), (128, 16))),
            square(batch, 64, 32, 3, 4, **DOUBLING),
        )
    ],
    "decoder": [  # U-Net's 2x2, and autoencoders' 3x3 that doubles the size
        *(square(1, c, s, c // 2, 2, stride=2) for c, s in ((512, 16), (128, 64))),
        square(8, 64, 28, 32, 3, stride=2, padding=1, output_padding=1),
        square(8, 128, 14, 128, 3, padding=1),
    ],
}

GOALS = (
    Goal("DCGAN against torch", ("dcgan",), "forward", geomean=1.5),
    Goal("training against torch", tuple(GROUPS), "training", geomean=1.7, each=0.97, together=True),
)
