"""accelerate() on every model of the zoo, made of torch's layers: numbers, state_dicts, and the way back.

The quick ones always; all of them with pytest tests/models --all-models.
"""

import pytest
import torch

from benchmarks.models import on_torchs_layers, settled
from cvfast.models import create_model, example_inputs, list_models
from tests.accelerated import check_accelerated

LARGE = ("vgg11", "vgg13", "vgg16", "vgg19", "resnet34", "resnet50", "vit_small", "vit_small_cifar", "unet")


def is_large(name):
    return name.removesuffix("_bn") in LARGE


@pytest.mark.parametrize("name", list_models())
def test_accelerated(name, request):
    if is_large(name) and not request.config.getoption("--all-models", default=False):
        pytest.skip("needs --all-models")
    torch.manual_seed(0)
    model = on_torchs_layers(create_model(name))
    settled(model, list(example_inputs(name, 4).values()))
    check_accelerated(model, list(example_inputs(name, 2).values()), name)
