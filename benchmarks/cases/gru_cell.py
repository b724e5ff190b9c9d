"""Shapes of gru_cell: B and H (inputs as many)."""

from cvfast.testing.recurrent import cell_case

DATA = ("input", "h")
GROUPS = {"cell": [cell_case("gru_cell", f"{b}-{h}", b, h, h) for b in (1, 8) for h in (128, 256, 512)]}
