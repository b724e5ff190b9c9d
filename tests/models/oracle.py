"""torchvision's own classes, as an oracle: only its Python runs, so any build of it does beside any build of torch."""

from __future__ import annotations

import pytest
import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = torch.library.Library("torchvision", "FRAGMENT")


def torchvision_models():
    """The module torchvision.models; skips the test where torchvision is not installed.

    A torchvision whose compiled operators don't load in this torch still wants to register their fakes, hence the
    schemas.
    """
    for schema in OPERATORS:
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            _library.define(schema)
    return pytest.importorskip("torchvision.models")
