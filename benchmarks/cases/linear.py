"""Products as vision transformers, captioners and classifiers have them."""

from benchmarks.goals import Goal
from cvfast.testing.linear import case

BATCH_FIRST = True


def product(rows: tuple[int, ...], inputs: int, outputs: int):
    return case(f"{'x'.join(map(str, rows))}x{inputs}-{outputs}", (*rows, inputs), outputs)


GROUPS = {
    "tokens": [
        product((batch, 197), *sizes)
        for batch in (1, 8)
        for sizes in ((192, 576), (192, 192), (192, 768), (768, 192), (384, 1536))
    ],
    # Those that "auto" leaves to torch, but for the third.
    "heads": [product((1,), 512, 1000), product((8,), 512, 1000), product((64,), 400, 120), product((64,), 120, 84)],
}

GOALS = (
    Goal("inference against torch", ("tokens",), "forward", geomean=1.0, each=0.97),
    Goal("training against torch", ("tokens",), "training", geomean=1.0, each=0.97),
)
