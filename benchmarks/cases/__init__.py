"""Cases to measure: one module per operator with GROUPS (a dict from a group's name to its cases) and its GOALS."""
