"""accelerate() on every model of the zoo and on torchvision's architectures: none may become slower."""

from functools import partial

import torch

from benchmarks import architectures
from benchmarks.goals import Goal
from benchmarks.models import Inference, Models
from benchmarks.results import CVFAST, TORCH
from cvfast.models import create_model, example_inputs, list_models

SUBJECT = Models
FORMATS = ("contiguous", "channels_last")
COMPETITORS = CVFAST + TORCH


def zoo(name: str) -> Inference:
    def data(batch: int) -> list[torch.Tensor]:
        return list(example_inputs(name, batch).values())

    return Inference(name, partial(create_model, name), data)


def of_torchvision(name: str) -> Inference:
    return Inference(name, partial(architectures.make, name), lambda batch: [architectures.pictures(name, batch)])


GROUPS = {
    "zoo": [zoo(name) for name in list_models()],
    "torchvision": [of_torchvision(name) for name in architectures.names()],
}
TRAINING_GROUPS = {}
GOALS = (Goal("never slower than torch", tuple(GROUPS), "forward", each=0.97),)
