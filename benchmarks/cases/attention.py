"""Shapes of attention as they stand in networks."""

from benchmarks.goals import Goal
from cvfast.testing.attention import case, mask

SHAPES = (  # B, H, L, D
    (1, 12, 197, 64),
    (8, 12, 197, 64),
    (8, 8, 512, 64),
    (1, 8, 2048, 64),
    (32, 3, 50, 64),
    (2, 16, 1024, 128),
)


def square(b: int, h: int, length: int, d: int, kind: str = "", **options):
    """As many keys as queries."""
    return case(f"{b}x{h}x{length}x{d}{kind}", (b, h, length, d), length, **options)


RIVALS = ("torch contiguous", "torch.compile", "onnxruntime", "OpenVINO")
DATA = ("query", "key", "value")
BY_SAMPLE = ("attn_mask",)
BATCH_FIRST = True

GROUPS = {
    "full": [square(*shape) for shape in SHAPES],
    "causal": [square(*shape, "-causal", is_causal=True) for shape in SHAPES],
    "masks": [
        square(8, 8, 512, 64, "-padding", attn_mask=mask(8, 1, 1, 512)),
        square(8, 8, 512, 64, "-mask", attn_mask=mask(512, 512)),
        square(8, 8, 512, 64, "-bias", bias=(8, 512, 512)),
    ],
    "sizes": [square(2, 8, 512, d) for d in (32, 80, 96, 100, 256)],
}

GOALS = (
    Goal("against the best", ("full",), "forward", RIVALS, geomean=1.38, each=1.08),
    Goal("against the best", ("causal",), "forward", RIVALS, geomean=1.9, each=1.08),
    Goal("against the best", ("full", "causal"), "forward", RIVALS, geomean=1.6, together=True),
    Goal("training against torch", ("full", "causal"), "training", geomean=1.7, each=1.15, together=True),
)
