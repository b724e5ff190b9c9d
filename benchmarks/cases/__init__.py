"""Cases to measure: one module per operator with GROUPS, a dict from the group's name to its cases."""
