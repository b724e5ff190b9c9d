"""accelerate() on torchvision's architectures with random weights: numbers, state_dicts, and the way back.

They take minutes, hence run only with --torchvision, where torchvision is installed.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import cvfast
from cvfast.testing.accuracy import relative_error

pytestmark = pytest.mark.skipif(
    "not config.getoption('--torchvision', default=False)", reason="pytest tests/torchvision --torchvision runs these"
)

LARGE = ("vit_h", "vit_l", "regnet_y_128gf", "regnet_x_32gf", "regnet_y_32gf", "convnext_large")  # to build takes long
BACKBONES = {
    "resnet18_fpn": ("resnet_fpn_backbone", {"backbone_name": "resnet18"}),
    "resnet50_fpn": ("resnet_fpn_backbone", {"backbone_name": "resnet50"}),
    "resnext50_fpn": ("resnet_fpn_backbone", {"backbone_name": "resnext50_32x4d"}),
    "mobilenet_v2_backbone": ("mobilenet_backbone", {"backbone_name": "mobilenet_v2", "fpn": False}),
    "mobilenet_v3_large_fpn": ("mobilenet_backbone", {"backbone_name": "mobilenet_v3_large", "fpn": True}),
}


def torchvision():
    """The package; its compiled operators cannot load beside every torch, so their schemas are declared first."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("torchvision")


def names() -> list[str]:
    try:
        models = torchvision().models
    except pytest.skip.Exception:
        return ["torchvision is missing"]
    of_module = [name for m in (models, models.segmentation) for name in models.list_models(module=m)]
    return [*(name for name in of_module if not name.startswith(LARGE)), *BACKBONES]


def make(name: str) -> torch.nn.Module:
    """The model with weights and batch-norm statistics that keep numbers of the size of 1, in eval mode."""
    models = torchvision().models
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in BACKBONES:
            function, options = BACKBONES[name]
            backbone = getattr(models.detection.backbone_utils, function)
            model = backbone(**options, weights=None, norm_layer=torch.nn.BatchNorm2d)
        else:
            options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
            weights = {"weights_backbone": None} if name in models.list_models(module=models.segmentation) else {}
            model = models.get_model(name, weights=None, **weights, **options)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.weight, 0.25, 0.75)
            torch.nn.init.normal_(module.bias, std=0.1)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # a head that would make all outputs 0
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        model(pictures(name, 4))  # batch-norm's statistics
    return model.eval()


def pictures(name: str, count: int) -> torch.Tensor:
    size = {"vit": 224, "max": 224, "inc": 299}.get(name[:3], 96)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def flat(output) -> torch.Tensor:
    """All tensors of an output as one."""
    tensors, _ = torch.utils._pytree.tree_flatten(output)
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("name", names())
@torch.no_grad()
def test_architecture(name):
    model = make(name)
    inputs = pictures(name, 2)
    types, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    native = flat(model(inputs))
    exact = flat(model.double()(inputs.double()))
    model.float()

    cvfast.accelerate(model)
    limit, error = relative_error(native, exact), relative_error(flat(model(inputs)), exact)
    cvfast.set_precision("strict")
    try:
        strict = relative_error(flat(model(inputs)), exact)
    finally:
        cvfast.set_precision("fast")
    chains = sum(len(m.__dict__["_cvfast_plan"].chains) for m in model.modules() if "_cvfast_plan" in m.__dict__)
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    print(f"\n{name:<40} torch {limit:.1e}, cvfast {error:.1e}, strict {strict:.1e}; {chains} chains, {norms} norms")
    assert limit > 0
    assert error <= max(1e-5, 10 * limit)
    assert strict <= 2 * limit + 4 * torch.finfo(torch.float32).eps

    assert list(model.state_dict()) == list(state)
    assert not any(model.load_state_dict(state))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert cvfast.restore(model) is model
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(flat(model(inputs)), native)
