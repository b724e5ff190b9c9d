"""Shapes of convolutions as they stand in networks, grouped by what makes them fast or slow."""

from cvfast.testing.conv2d import case


def square(batch: int, channels: int, size: int, out: int, kernel: int, **options):
    """A square kernel on square images; `groups` among the options divides the channels."""
    groups = options.get("groups", 1)
    name = f"{batch}x{channels}x{size}x{size}-{out}-k{kernel}" + "".join(f"-{k[0]}{v}" for k, v in options.items())
    return case(name, (batch, channels, size, size), (out, channels // groups, kernel, kernel), **options)


def same(batch: int, channels: int, size: int, out: int, kernel: int = 3, **options):
    """As `square`, padded so that stride 1 keeps the size."""
    return square(batch, channels, size, out, kernel, padding=options.get("dilation", 1) * (kernel // 2), **options)


GROUPS = {
    "3x3": [
        *(same(b, c, s, c) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)) for b in (1, 8)),
        same(64, 64, 32, 64),
    ],
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
