"""Additive attention as captioners and translators use it."""

from benchmarks.goals import Goal
from cvfast.testing.additive_attention import case

DATA = ("query", "keys", "values")
BATCH_FIRST = True

GROUPS = {
    "decode": [
        case(f"{batch}x1x196x512", batch, None, 196, 512, 512, 512, 512, projected=True) for batch in (1, 5, 32)
    ],
    "sequence": [case("8x20x50x256", 8, 20, 50, 256, 256, 256, 256)],
}

GOALS = (
    Goal("decoding against torch", ("decode",), "forward", geomean=2.5),
    Goal("training against torch", ("decode", "sequence"), "training", geomean=3),
)
