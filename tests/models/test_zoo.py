"""The zoo as a whole: names, published sizes, torchvision's state_dicts, training, wrong arguments."""

from functools import partial

import pytest
import torch
from torch import nn

import cvfast
from cvfast.models import create_model, example_inputs, list_models
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
    "mobilenet_v2": 3_504_872,
    "vit_tiny": 5_717_416,  # DeiT's figure
    "vit_small": 22_050_664,  # DeiT's figure
}
CONFIGURED = {  # transformers that torchvision has no name for: its class's arguments
    "vit_tiny": {"image_size": 224, "patch_size": 16, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768},
    "vit_small": {"image_size": 224, "patch_size": 16, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536},
    "vit_tiny_cifar": {"image_size": 32, "patch_size": 4, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768},
    "vit_small_cifar": {"image_size": 32, "patch_size": 4, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536},
}
NAMED = [name for name in PUBLISHED if name not in ("cnn", "resnet20_cifar", *CONFIGURED)]


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


def test_unets_convolutions_are_the_papers():
    """3x3: 64 to 1024 channels down, 1024 to 64 up; transposed 2x2; 1x1 to two classes."""
    down = [3, 64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024]
    up = [(1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64)]
    weights = 9 * sum(a * b for a, b in [*zip(down, down[1:], strict=False), *up])
    weights += 4 * sum(2 * c * c for c in (512, 256, 128, 64)) + 2 * 64
    model = on_meta(partial(create_model, "unet"))
    assert sum(p.numel() for p in model.parameters() if p.dim() == 4) == weights


@pytest.mark.parametrize("name", list_models())
def test_every_model_takes_its_example_inputs(name):
    def run():
        model, inputs = create_model(name).eval(), example_inputs(name, 2)
        assert all(len(value) == 2 for value in inputs.values())
        return model(*inputs.values())

    on_meta(run)


@pytest.mark.parametrize("name", NAMED)
def test_names_and_shapes_are_torchvisions(name):
    theirs = on_meta(getattr(torchvision_models(), name))
    assert list(shapes(on_meta(partial(create_model, name))).items()) == list(shapes(theirs).items())


@pytest.mark.parametrize("name", CONFIGURED)
def test_names_and_shapes_of_transformers_are_torchvisions(name):
    make = torchvision_models().VisionTransformer
    theirs = on_meta(partial(make, num_layers=12, num_classes=9, **CONFIGURED[name]))
    assert list(shapes(on_meta(partial(create_model, name, num_classes=9))).items()) == list(shapes(theirs).items())


def test_names_are_torchvisions_where_there_is_no_torchvision():
    """The pattern of its names, made here; the shapes follow from the published numbers of parameters."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    resnet = ["conv1.weight", *(f"bn1.{n}" for n in norm)]
    for stage in range(1, 5):
        for block in range(2):
            start = f"layer{stage}.{block}."
            for i in (1, 2):
                resnet += [f"{start}conv{i}.weight", *(f"{start}bn{i}.{n}" for n in norm)]
            if stage > 1 and block == 0:
                resnet += [f"{start}downsample.0.weight", *(f"{start}downsample.1.{n}" for n in norm)]
    assert list(shapes(on_meta(partial(create_model, "resnet18")))) == [*resnet, "fc.weight", "fc.bias"]

    both = ("weight", "bias")
    vit = ["class_token", *(f"conv_proj.{n}" for n in both), "encoder.pos_embedding"]
    for layer in range(12):
        start = f"encoder.layers.encoder_layer_{layer}."
        vit += [f"{start}ln_1.{n}" for n in both]
        vit += [f"{start}self_attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight",
                                                       "out_proj.bias")]  # fmt: skip
        vit += [f"{start}{part}.{n}" for part in ("ln_2", "mlp.0", "mlp.3") for n in both]
    vit += [f"{part}.{n}" for part in ("encoder.ln", "heads.head") for n in both]
    assert list(shapes(on_meta(partial(create_model, "vit_tiny")))) == vit

    vgg = [f"features.{i}.{n}" for i in (0, 3, 6, 8, 11, 13, 16, 18) for n in both]
    vgg += [f"classifier.{i}.{n}" for i in (0, 3, 6) for n in both]
    assert list(shapes(on_meta(partial(create_model, "vgg11")))) == vgg


@pytest.mark.parametrize(
    ("name", "theirs", "size"),
    [
        ("resnet18", lambda tv: tv.resnet18(num_classes=7), 64),
        ("resnet50", lambda tv: tv.resnet50(num_classes=7), 64),
        ("mobilenet_v2", lambda tv: tv.mobilenet_v2(num_classes=7), 96),
        ("vit_tiny_cifar", lambda tv: vit_with_a_head(tv), 32),
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


def vit_with_a_head(tv):
    """torchvision's heads begin as zeros, so that every image would get the same logits."""
    model = tv.VisionTransformer(num_layers=12, num_classes=7, **CONFIGURED["vit_tiny_cifar"])
    nn.init.normal_(model.heads.head.weight)
    nn.init.normal_(model.class_token)
    return model


SMALL = {  # a size that is quick, and options that make the model small
    "cnn": (32, {}),
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "resnet20_cifar": (32, {}),
    "vgg_cifar": (32, {}),
    "mobilenet_v2": (64, {"width": 0.5, "dropout": 0.0}),
    "unet_small": (16, {}),
    "vit_tiny": (32, {"image_size": 32, "num_layers": 2}),
    "vit_tiny_cifar": (32, {"num_layers": 2}),
    "cnn_attention": (32, {"width": 8}),
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
    slope = sum(p.grad.square().sum().item() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.01 * loss.item() / slope).step()  # the tangent promises 1 %
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
    assert "cnn" in list_models(task="classification")
    assert list_models(task="segmentation") == ["unet", "unet_small"]


@pytest.mark.parametrize("name", SMALL)
def test_wrong_arguments_are_refused(name):
    with pytest.raises(ValueError, match="num_classes.* must be positive, got 0"):
        create_model(name, num_classes=0)
    with pytest.raises(ValueError, match="in_chans.* must be positive, got .*-1"):
        create_model(name, in_chans=-1)
    with pytest.raises(TypeError, match=f"{name} takes no option 'colour'; it takes .*num_classes"):
        create_model(name, colour=1)


@pytest.mark.parametrize("name", ["vit_tiny", "unet"])
def test_images_of_another_size_are_refused(name):
    with pytest.raises(ValueError, match=r"(224x224 pixels|multiples of 16), got \[1, 3, 40, 40\]"):
        on_meta(partial(create_model, name))(torch.empty(1, 3, 40, 40, device="meta"))


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="must divide image_size, .* got 16 and 40, 3 and 192"):
        create_model("vit_tiny", image_size=40)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        create_model("mobilenet_v2", width=0)
    with pytest.raises(ValueError, match="width and depth must be positive, got .* and 0"):
        create_model("unet", depth=0)


def test_attention_pooling_is_a_weighted_mean_of_positions():
    torch.manual_seed(0)
    model = create_model("cnn_attention", width=8).eval()
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        logits, weights = model.explained(images)
        features = model.features(images)
        pooled = (features * weights.unsqueeze(1)).sum((2, 3))
        attention = model.attention
        scores = torch.tanh(features.flatten(2).mT @ attention.w_key.mT + attention.w_query[:, 0]) @ attention.v
    assert weights.shape == (2, 4, 6)
    torch.testing.assert_close(weights.flatten(1), scores.softmax(1))
    torch.testing.assert_close(logits, model.head(pooled))


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
