"""Whole models of the zoo: inference against every other engine, training steps against torch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.goals import Goal
from benchmarks.models import Inference, Models, Training
from benchmarks.results import WINOGRAD_PEERS
from cvfast.models import create_model

SUBJECT = Models
FORMATS = ("contiguous", "channels_last")
BATCH_FIRST = True
RIVALS = ("torch contiguous", "torch channels_last", "torch.compile", "onnxruntime", "OpenVINO")


def inference(model: str, *shape: int, **options) -> Inference:
    """A model of the zoo in eval mode."""

    def data(batch: int) -> list[Tensor]:
        return [torch.randn(batch, *shape[1:])]

    return Inference(f"{model}-{'x'.join(map(str, shape))}", partial(create_model, model, **options), data, shape[0])


def classification(model: str, *shape: int, classes: int = 1000, **options) -> Training:
    """A step of a classifier."""

    def data() -> list[Tensor]:
        return [torch.randn(shape), torch.randint(classes, shape[:1])]

    def losses(network: nn.Module, inputs: Tensor, labels: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        yield network, F.cross_entropy(network(inputs), labels)

    make = partial(create_model, model, num_classes=classes, **options)
    return Training(f"{model}-{'x'.join(map(str, shape))}", make, data, losses)


def gan(batch: int, size: int, **options) -> Training:
    """A step of DCGAN's discriminator, then one of its generator."""

    def make() -> nn.Module:
        names = ("generator", "discriminator")
        return nn.ModuleDict({name: create_model(f"dcgan_{name}", image_size=size, **options) for name in names})

    def data() -> list[Tensor]:
        return [torch.randn(batch, 100), torch.randn(batch, 3, size, size)]

    def losses(networks: nn.Module, z: Tensor, real: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        generator, discriminator = networks["generator"], networks["discriminator"]
        fake = generator(z)
        scores = discriminator(real), discriminator(fake.detach())
        yield discriminator, F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
        yield generator, F.softplus(-discriminator(fake)).mean()

    return Training(f"dcgan-{batch}x3x{size}x{size}", make, data, losses)


def captioning(model: str, batch: int, size: int, words: int, vocabulary: int = 16) -> Training:
    """A step of a captioner on sentences of `words` words."""

    def data() -> list[Tensor]:
        return [torch.randn(batch, 1, size, size), torch.randint(3, vocabulary, (batch, words + 1))]

    def losses(network: nn.Module, images: Tensor, sentences: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        scores, _ = network(images, sentences[:, :-1])
        yield network, F.cross_entropy(scores.flatten(0, 1), sentences[:, 1:].flatten())

    make = partial(create_model, model, num_classes=vocabulary, dropout=0.0)
    return Training(f"{model}-{batch}x1x{size}x{size}-{words}", make, data, losses)


GROUPS = {
    "cnn-b1": [inference("cnn", 1, 3, 32, 32)],
    "cnn-b64": [inference("cnn", 64, 3, 32, 32)],
    "resnet18-b1": [inference("resnet18", 1, 3, 224, 224)],
    "resnet18-b8": [inference("resnet18", 8, 3, 224, 224)],
    "vgg_cifar": [inference("vgg_cifar", 32, 3, 32, 32)],
    "mobilenet_v2": [inference("mobilenet_v2", 1, 3, 224, 224)],
    "dcgan_generator": [inference("dcgan_generator", 16, 100)],
    "cnn_lstm": [inference("cnn_lstm", 4, 16, 3, 64, 64)],
    "vit_tiny-b1": [inference("vit_tiny", 1, 3, 224, 224)],
    "vit_tiny-b8": [inference("vit_tiny", 8, 3, 224, 224)],
}
TRAINING_GROUPS = {
    "resnet18": [classification("resnet18", 32, 3, 32, 32, classes=10)],
    "dcgan": [gan(16, 64)],
    "cnn_lstm": [classification("cnn_lstm", 4, 16, 3, 64, 64, classes=10)],
    "captioner": [captioning("show_attend_tell", 16, 56, 10)],
    "vit_tiny": [classification("vit_tiny", 8, 3, 224, 224)],
}


def against(groups: tuple[str, ...], ratio: float) -> Goal:
    return Goal("against the best", groups, "forward", RIVALS, each=ratio)


def against_winograd(group: str, ratio: float) -> Goal:
    return Goal("against MNN and ncnn, at less error than MNN's", (group,), "forward", WINOGRAD_PEERS, each=ratio,
                less_error_than="MNN")  # fmt: skip


def training(group: str, ratio: float) -> Goal:
    return Goal("training against torch", (group,), "training", each=ratio)


GOALS = (
    against(("resnet18-b1", "resnet18-b8"), 1.65),
    against(("cnn-b64", "dcgan_generator"), 1.5),
    against(("vgg_cifar",), 1.7),
    against(("mobilenet_v2",), 1.0),
    against(("cnn_lstm",), 1.4),
    against(("vit_tiny-b1", "vit_tiny-b8"), 1.1),
    against_winograd("resnet18-b1", 1.05),
    against_winograd("resnet18-b8", 1.1),
    against_winograd("vgg_cifar", 1.05),
    against_winograd("cnn-b64", 1.4),
    against_winograd("dcgan_generator", 1.4),
    training("resnet18", 1.5),
    training("dcgan", 1.4),
    training("cnn_lstm", 1.5),
    training("captioner", 1.8),
    training("vit_tiny", 1.15),
)
