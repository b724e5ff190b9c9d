"""linear by torch's own operator."""

import torch


def why_not(*args) -> list[str]:
    """Never refuses."""
    return []


def why_slower(*args) -> list[str]:
    """Nothing is left to be taken instead."""
    return []


run = torch.nn.functional.linear
