"""What lstm, gru and rnn are measured with: T, B, I, H."""

from __future__ import annotations

from benchmarks.goals import Goal
from cvfast.testing import Case
from cvfast.testing.recurrent import layer_case

RIVALS = ("torch contiguous", "torch.compile", "onnxruntime", "OpenVINO")
FEW, MANY = "batch-1-2", "batch-8-64"


def groups(operator: str) -> dict[str, list[Case]]:
    """Cases by group, each named by its sizes."""

    def case(*sizes: int, **options) -> Case:
        name = "-".join(map(str, sizes)) + "".join(f"-{key}-{value}" for key, value in options.items())
        return layer_case(operator, name, *sizes, **options)

    return {
        FEW: [case(64, 1, 128, 128), case(135, 2, 256, 256, bidirectional=True), case(16, 1, 40, 256, layers=3)],
        MANY: [case(64, 8, 128, 256), case(64, 32, 256, 256), case(32, 16, 512, 512), case(128, 64, 512, 512)],
    }


def goals(geomean: float, training: float, each_training: float) -> tuple[Goal, ...]:
    """Of all cases together: geometric means against the best of the rivals and, in training, against torch."""
    both = (FEW, MANY)
    return (
        Goal("against the best", both, "forward", RIVALS, geomean=geomean, each=0.98, together=True),
        Goal("training against torch", both, "training", geomean=training, each=each_training, together=True),
    )
