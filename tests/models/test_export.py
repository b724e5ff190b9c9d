"""Every model of the zoo leaves as ONNX and as a torch.export program that compute the same, preparation included.

The small ones always; all of them, at their own sizes, with pytest tests/models --all-models.
"""

import onnxruntime
import pytest
import torch
from torch import nn

from cvfast.data import ImageData, Preparation
from cvfast.engine import Classifier, check_export, export, export_network
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


def check(name, size, tmp_path):
    classifier = classifier_of(name, size)
    images = torch.randint(256, (3, 1, 40, 36), dtype=torch.uint8)
    with torch.no_grad():
        logits = classifier(images)
    assert (logits[0] - logits[1]).abs().max() > 1e-3 * max(1, logits.abs().max())  # ten times what may differ
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


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name, tmp_path, request):
    options, quick = OTHERS[name]
    if not quick and not request.config.getoption("--all-models", default=False):
        pytest.skip("needs --all-models")
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    inputs = example_inputs(name, 2)
    with torch.no_grad():
        expected = [output for output in as_tuple(model(*inputs.values())) if output is not None]
    session = onnxruntime.InferenceSession(str(export_network(model, inputs, tmp_path / "model.onnx")))
    given = dict(zip([i.name for i in session.get_inputs()], [t.numpy() for t in inputs.values()], strict=True))
    program = torch.export.load(str(export_network(model, inputs, tmp_path / "model.pt2", "torch"))).module()
    exported = [output for output in as_tuple(program(*inputs.values())) if output is not None]
    for values, other, eager in zip(session.run(None, given), exported, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(values), eager, rtol=0, atol=1e-4)
        torch.testing.assert_close(other, eager, rtol=0, atol=1e-4)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_no_model_is_forgotten():
    assert sorted([*ALL, *OTHERS]) == list_models()


def test_every_family_is_checked():
    families = {type(classifier_of(name, SMALL.get(name, 32)).model) for name in SMALL}
    assert len(families) == len(SMALL)
