"""Shapes of lstm layers."""

from benchmarks.goals import Goal
from benchmarks.recurrent import FEW, RIVALS, goals, groups

GROUPS = groups("lstm")
GOALS = (
    *goals(1.18, 1.35, each_training=1.04),
    Goal("against the best", (FEW,), "forward", RIVALS, geomean=1.35),
    Goal("training against torch", (FEW,), "training", geomean=1.6),
)
