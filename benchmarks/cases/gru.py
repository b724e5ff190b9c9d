"""Shapes of gru layers."""

from benchmarks.recurrent import goals, groups

GROUPS = groups("gru")
GOALS = goals(1.15, 1.4, each_training=0.98)
