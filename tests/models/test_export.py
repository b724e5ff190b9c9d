"""Every model of the zoo leaves as ONNX and as a torch.export program that compute the same, preparation included.

The small ones always; all of them, at their own sizes, with pytest tests/models --all-models.
"""

import pytest
import torch
from torch import nn

from cvfast.data import ImageData, Preparation
from cvfast.engine import Classifier, check_export, export
from cvfast.models import input_size, list_models

# Name -> a size that is quick; what is left out is a larger model of one of these families.
SMALL = {"cnn": 32, "resnet20_cifar": 32, "mobilenet_v2": 64, "unet_small": 32, "vit_tiny_cifar": 32,
         "cnn_attention": 32}  # fmt: skip
ALL = [*list_models(task="classification"), *list_models(task="segmentation")]


def classifier_of(name, size):
    """The model with random weights, for three classes of images [1, 40, 36], and batch-norm that fits them."""
    torch.manual_seed(0)
    preparation = Preparation(size, mean=[0.5, 0.4, 0.6], std=[0.2, 0.3, 0.25])
    classifier = Classifier(name, ["a", "b", "c"], (1, 40, 36), preparation)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        classifier.train()(torch.randint(256, (4, 1, 40, 36), dtype=torch.uint8))
    return classifier.eval()


def check(name, size, tmp_path):
    classifier = classifier_of(name, size)
    images = torch.randint(256, (3, 1, 40, 36), dtype=torch.uint8)
    with torch.no_grad():
        logits = classifier(images)
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    data = ImageData(images, torch.zeros(3, dtype=torch.int64), classifier.classes)
    for format, file in {"onnx": "model.onnx", "torch": "model.pt2"}.items():
        result = check_export(export(classifier, tmp_path / file, format), classifier, data)
        assert result.difference <= 1e-4, f"{format}: {result}"


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name, tmp_path):
    check(name, SMALL[name], tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_all_models(name, tmp_path, request):
    if not request.config.getoption("--all-models", default=False):
        pytest.skip("needs --all-models")
    check(name, input_size(name), tmp_path)


def test_every_family_is_checked():
    families = {type(classifier_of(name, SMALL.get(name, 32)).model) for name in SMALL}
    assert len(families) == len(SMALL)
