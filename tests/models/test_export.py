"""Every model of the zoo leaves as ONNX and as a torch.export program that compute the same, preparation included.

The small ones always; all of them, at their own sizes, with pytest tests/models --all-models.
"""

import pytest
import torch
from torch import nn

from cvfast.data import ImageData, Preparation
from cvfast.engine import Classifier, check_export, check_network, export, export_network
from cvfast.models import create_model, example_inputs, input_size, list_models

# Name -> a size that is quick; what is left out is a larger model of one of these families.
SMALL = {"cnn": 32, "resnet20_cifar": 32, "mobilenet_v2": 64, "unet_small": 32, "vit_tiny_cifar": 32,
         "cnn_attention": 32}  # fmt: skip
OTHERS = {  # models whose input is no image, or whose output no logits: options, if it is quick
    "dcgan_generator": ({"width": 8}, True),
    "dcgan_discriminator": ({"width": 8}, True),
    "srresnet": ({}, False),
    "cnn_lstm": ({}, True),
    "cnn_gru": ({}, False),
    "crnn": ({}, False),
    "show_attend_tell": ({}, False),
    "show_tell": ({}, False),
}
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


def agree(result, outputs):
    """To 1e-4, whatever the size of the outputs, of which the largest one's share is what a check tells."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [t for t in outputs if t is not None]
    return result.difference * max(1.0, *(t.abs().max().item() for t in outputs)) <= 1e-4


def check(name, size, tmp_path):
    classifier = classifier_of(name, size)
    images = torch.randint(256, (3, 1, 40, 36), dtype=torch.uint8)
    with torch.no_grad():
        logits = classifier(images)
    assert (logits[0] - logits[1]).abs().max() > 1e-3 * max(1, logits.abs().max())  # ten times what may differ
    data = ImageData(images, torch.zeros(3, dtype=torch.int64), classifier.classes)
    for format, file in {"onnx": "model.onnx", "torch": "model.pt2"}.items():
        result = check_export(export(classifier, tmp_path / file, format), classifier, data)
        assert agree(result, logits), f"{format}: {result}"


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name, tmp_path):
    check(name, SMALL[name], tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_all_models(name, tmp_path, request):
    if not request.config.getoption("--all-models", default=False):
        pytest.skip("needs --all-models")
    check(name, input_size(name), tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name, tmp_path, request):
    options, quick = OTHERS[name]
    if not quick and not request.config.getoption("--all-models", default=False):
        pytest.skip("needs --all-models")
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    inputs = example_inputs(name, 2, **options)
    with torch.no_grad():
        outputs = model(*inputs.values())
    for format, file in {"onnx": "model.onnx", "torch": "model.pt2"}.items():
        path = export_network(model, inputs, tmp_path / file, format)
        result = check_network(path, model, inputs)
        assert agree(result, outputs), f"{format}: {result}"


def test_the_check_of_a_network_notices_other_weights_and_other_outputs(tmp_path):
    model, other = (create_model("dcgan_generator", width=8) for _ in range(2))
    inputs = example_inputs("dcgan_generator", 3)
    path = export_network(model, inputs, tmp_path / "model.onnx")
    assert check_network(path, model, inputs).passed
    result = check_network(path, other, inputs)
    assert not result.passed and "3 inputs differ by at most" in str(result)
    assert not check_network(path, nn.Sequential(model, NaN()), inputs).passed
    with pytest.raises(RuntimeError, match="returns \\[3, 3, 64, 64\\], the network \\[3, 12288\\]"):
        check_network(path, nn.Sequential(model, nn.Flatten()), inputs)


class NaN(nn.Module):
    def forward(self, x):
        return x * float("nan")


@pytest.mark.parametrize(
    ("name", "options", "shapes"),
    [
        ("unet_small", {"in_chans": 1, "size": (16, 24)}, {"images": (2, 1, 16, 24)}),
        ("vit_tiny_cifar", {"image_size": 16}, {"images": (2, 3, 16, 16)}),
        ("row_lstm", {"width": 9}, {"images": (2, 1, 28, 9)}),
        ("cnn_gru", {"in_chans": 1}, {"videos": (2, 8, 1, 32, 32)}),
        ("dcgan_generator", {"width": 4, "latent": 7, "num_classes": 3}, {"z": (2, 7), "labels": (2,)}),
        ("dcgan_discriminator", {"width": 4, "image_size": 8, "num_classes": 3, "in_chans": 1},
         {"images": (2, 1, 8, 8), "labels": (2,)}),
        ("show_tell", {"num_classes": 3, "words": 4}, {"images": (2, 1, 56, 56), "sentences": (2, 4)}),
    ],
)  # fmt: skip
def test_example_inputs_fit_the_options(name, options, shapes):
    inputs = example_inputs(name, 2, **options)
    assert {key: tuple(tensor.shape) for key, tensor in inputs.items()} == shapes
    create_model(name, **{key: options[key] for key in options.keys() - {"size", "words"}})(*inputs.values())


def test_no_model_is_forgotten():
    assert sorted([*ALL, *OTHERS]) == list_models()


def test_every_family_is_checked():
    families = {type(classifier_of(name, SMALL.get(name, 32)).model) for name in SMALL}
    assert len(families) == len(SMALL)
