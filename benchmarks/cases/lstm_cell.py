"""Shapes of lstm_cell: B and H (inputs as many)."""

from benchmarks.goals import Goal
from cvfast.testing.recurrent import cell_case

DATA = ("input", "h", "c")
GROUPS = {"cell": [cell_case("lstm_cell", f"{b}-{h}", b, h, h) for b in (1, 8) for h in (128, 256, 512)]}
GOALS = (Goal("against torch", ("cell",), "forward", geomean=2.3),)
