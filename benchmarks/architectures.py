"""torchvision's architectures, where torchvision is installed: their names, and models of random weights."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor, nn

INSTALLED = importlib.util.find_spec("torchvision") is not None
LARGE = ("vit_h", "vit_l", "regnet_y_128gf", "regnet_x_32gf", "regnet_y_32gf", "convnext_large")  # to build takes long
BACKBONES = {
    "resnet18_fpn": ("resnet_fpn_backbone", {"backbone_name": "resnet18"}),
    "resnet50_fpn": ("resnet_fpn_backbone", {"backbone_name": "resnet50"}),
    "resnext50_fpn": ("resnet_fpn_backbone", {"backbone_name": "resnext50_32x4d"}),
    "mobilenet_v2_backbone": ("mobilenet_backbone", {"backbone_name": "mobilenet_v2", "fpn": False}),
    "mobilenet_v3_large_fpn": ("mobilenet_backbone", {"backbone_name": "mobilenet_v3_large", "fpn": True}),
}


def models() -> ModuleType:
    """torchvision.models; its compiled operators cannot load beside every torch, so their schemas come first."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models")


def names() -> list[str]:
    """Classifiers, networks for segmentation, and detection's backbones; none where torchvision is missing."""
    if not INSTALLED:
        return []
    of_module = [name for m in (models(), models().segmentation) for name in models().list_models(module=m)]
    return [*(name for name in of_module if not name.startswith(LARGE)), *BACKBONES]


def make(name: str) -> nn.Module:
    """The model with random weights, and batch-norm's scales such that deep networks keep numbers of the size of 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _make(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.25, 0.75)
            nn.init.normal_(module.bias, std=0.1)
    return model


def _make(name: str) -> nn.Module:
    if name in BACKBONES:
        function, options = BACKBONES[name]
        return getattr(models().detection.backbone_utils, function)(**options, weights=None, norm_layer=nn.BatchNorm2d)
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name in models().list_models(module=models().segmentation):
        options["weights_backbone"] = None
    return models().get_model(name, weights=None, **options)


def pictures(name: str, count: int) -> Tensor:
    """[count, 3, size, size], of the size that the architecture insists on, or a small one."""
    size = {"vit": 224, "max": 224, "inc": 299}.get(name[:3], 96)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
