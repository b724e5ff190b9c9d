"""The zoo as a whole: names, published sizes, torchvision's state_dicts, training, wrong arguments."""

from functools import partial

import pytest
import torch
from torch import nn

import cvfast
from cvfast.models import create_model, list_models
from tests.models.oracle import torchvision_models

PUBLISHED = {  # parameters for 1000 classes (10 for CIFAR's), as the papers or torchvision's documentation give them
    "cnn": 62_006,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet20_cifar": 269_722,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}
TORCHVISION = [name for name in PUBLISHED if name != "cnn" and not name.endswith("_cifar")]


def on_meta(make):
    """A model without memory: names and shapes only."""
    with torch.device("meta"):
        return make()


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def randomize(model):
    """Statistics that batch-norm can't have by chance, and outputs of ordinary size."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    assert parameters(on_meta(partial(create_model, name))) == PUBLISHED[name]


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvisions(name):
    theirs = on_meta(getattr(torchvision_models(), name))
    assert list(shapes(on_meta(partial(create_model, name))).items()) == list(shapes(theirs).items())


@pytest.mark.parametrize(
    ("name", "theirs", "size"),
    [
        ("resnet18", lambda tv: tv.resnet18(num_classes=7), 64),
        ("resnet50", lambda tv: tv.resnet50(num_classes=7), 64),
    ],
)
def test_torchvisions_state_dict_gives_torchvisions_logits(name, theirs, size):
    torch.manual_seed(0)
    theirs = randomize(theirs(torchvision_models())).eval()
    ours = create_model(name, num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours.eval()(images), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_torchvisions_vgg_features_give_torchvisions():
    """The linear layers, whose names and shapes are compared above, have 100 million parameters."""
    vgg = torchvision_models().vgg
    torch.manual_seed(0)
    theirs = randomize(vgg.make_layers(vgg.cfgs["B"], batch_norm=True)).eval()
    ours = create_model("vgg_cifar").features.eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


SMALL = {  # a size that is quick, and options that make the model small
    "cnn": (32, {}),
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "resnet20_cifar": (32, {}),
    "vgg_cifar": (32, {}),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("num_classes", "in_chans"), [(5, 1), (3, 4)])
def test_a_step_reaches_every_parameter_and_lowers_the_loss(name, num_classes, in_chans):
    size, options = SMALL[name]
    torch.manual_seed(0)
    model = create_model(name, num_classes=num_classes, in_chans=in_chans, **options)
    images = torch.randn(4, in_chans, size, size)
    outputs = model(images)
    labels = torch.randint(num_classes, (4, *outputs.shape[2:]))
    assert outputs.shape[:2] == (4, num_classes)
    loss = nn.functional.cross_entropy(outputs, labels)
    loss.backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    assert all(p.grad.any() for key, p in model.named_parameters() if p.dim() > 1)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    torch.manual_seed(0)
    assert nn.functional.cross_entropy(model(images), labels) < loss


@pytest.mark.parametrize("name", SMALL)
def test_a_model_in_eval_mode_treats_each_image_alone(name):
    size, options = SMALL[name]
    torch.manual_seed(0)
    model = randomize(create_model(name, **options)).eval()
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image.unsqueeze(0)) for image in images])
    assert together.std() > 1e-3
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_layers_are_cvfasts(name):
    model = on_meta(partial(create_model, name))
    ours = {nn.Conv2d: cvfast.nn.Conv2d, nn.ConvTranspose2d: cvfast.nn.ConvTranspose2d,
            nn.MultiheadAttention: cvfast.nn.MultiheadAttention}  # fmt: skip
    for module in model.modules():
        for torchs, cvfasts in ours.items():
            assert not isinstance(module, torchs) or isinstance(module, cvfasts)


def test_list_models():
    assert list_models() == sorted(list_models()) and set(PUBLISHED) <= set(list_models())
    assert list_models("resnet*") == ["resnet18", "resnet20_cifar", "resnet34", "resnet50"]
    assert list_models("lenet") == []
    assert "cnn" in list_models(task="classification") and "cnn" not in list_models(task="segmentation")


@pytest.mark.parametrize("name", SMALL)
def test_wrong_arguments_are_refused(name):
    with pytest.raises(ValueError, match="num_classes.* must be positive, got 0"):
        create_model(name, num_classes=0)
    with pytest.raises(ValueError, match="in_chans.* must be positive, got .*-1"):
        create_model(name, in_chans=-1)
    with pytest.raises(TypeError, match=f"{name} takes no option 'colour'; it takes .*num_classes"):
        create_model(name, colour=1)


def test_a_vgg_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="11, 13, 16, 19 layers, got 12"):
        create_model("vgg_cifar", depth=12)


def test_the_shortcut_without_parameters_takes_every_second_pixel_and_pads_channels_with_zeros():
    shortcut = create_model("resnet20_cifar").layer2[0].downsample
    x = torch.randn(2, 16, 8, 8)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()
