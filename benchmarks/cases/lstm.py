"""Shapes of lstm layers."""

from benchmarks.recurrent import goals, groups

GROUPS = groups("lstm")
GOALS = goals(1.35, 1.07, 1.6, 1.19, 1.04)  # all cases together: 1.18 and 1.35
