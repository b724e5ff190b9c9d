"""Shapes of rnn layers."""

from benchmarks.recurrent import goals, groups

GROUPS = groups("rnn")
GOALS = goals(1.15, 1.4, each_training=0.98)
