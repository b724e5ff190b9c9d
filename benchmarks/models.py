"""Whole models: inference of networks from the zoo, and training steps with an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import cvfast
from benchmarks.subject import Calls, Subject, Unable, Work
from cvfast.backend import use_backend
from cvfast.testing import assert_as_accurate, relative_error
from cvfast.testing.accuracy import largest_error

TORCHS = {
    getattr(cvfast.nn, name): getattr(nn, name)
    for name in ("Conv2d", "ConvTranspose2d", "Linear", "MultiheadAttention")
}
ACCURATE = 1e-5  # relative error that a whole model's result may have where torch's has less ...
WINOGRAD = 10.0  # ... and how many times torch's elsewhere, as docs/numerics.md says
# And its gradients: units that rounding switches, and maxima that another pixel wins, change them by about the root of
# their share; torch's own error, 1e-6 where there are none, reaches 8e-3.
ACCURATE_GRADIENTS = 1e-2


@dataclass(frozen=True)
class Inference:
    """A network, and what makes its data for so many samples, which do not meet."""

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[int], list[Tensor]]
    batch: int = 1

    def inputs(self) -> list[Tensor]:
        return self.data(self.batch)


@dataclass(frozen=True)
class Training:
    """What one step does.

    data: makes what is given at each step.
    losses: from network and data, one after the other, the part that is trained and its loss; each part's optimizer
        steps before the next loss is asked for.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], list[Tensor]]
    losses: Callable[..., Iterator[tuple[nn.Module, Tensor]]]

    def inputs(self) -> list[Tensor]:
        return self.data()


class Models(Subject):
    """Whole models."""

    def work(self, case: Inference | Training, direction: str, threads: int, device: str = "cpu") -> Work:
        return (InferenceWork if direction == "forward" else TrainingWork)(self, case, direction, threads, device)


class ModelWork(Work):
    """What both directions share."""

    bound: float  # the relative error that is allowed anyway
    factor = 0.0  # how many times torch's own error is, too

    @cached_property
    def data(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [tensor.to(self.device) for tensor in self.case.inputs()]

    @cached_property
    def network(self) -> nn.Module:
        """As the zoo makes it, on cvfast's layers, with random weights."""
        torch.manual_seed(1)
        return self.case.make().to(self.device)

    @cached_property
    def model(self) -> nn.Module:
        """The network on torch's layers; what stays cvfast's runs on torch's operators."""
        return on_torchs_layers(copy.deepcopy(self.network))

    def check(self, result: Tensor, who: str) -> None:
        native = self.judged_natively(torch.float32)
        attainable = max(relative_error(native, self.exact), largest_error(native, self.exact))
        bound = max(self.bound, self.factor * attainable)
        assert_as_accurate(result, native, self.exact, f"{who} on {self.case.name}", bound=bound)

    @cached_property
    def exact(self) -> Tensor:
        return self.judged_natively(torch.float64)

    def judged_natively(self, dtype: torch.dtype) -> Tensor:
        """The judged result of torch's operators in `dtype`."""
        raise NotImplementedError

    @property
    def identity(self) -> object:
        return repr(self.model), [tensor.shape for tensor in self.data]

    def in_format(self, memory_format: str) -> list[Tensor]:
        """The data; channels_last: so for the last three dimensions of images and videos."""
        return [channels_last(t) if memory_format == "channels_last" and t.dim() > 3 else t for t in self.data]


def channels_last(images: Tensor) -> Tensor:
    """[..., C, H, W] as memory has [..., H, W, C]."""
    return images.movedim(-3, -1).contiguous().movedim(-1, -3)


def converted(data: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in data]


def on_torchs_layers(network: nn.Module) -> nn.Module:
    """The network, whose layers become torch's; recurrent ones, which also take lengths, and what torch does not have
    stay cvfast's."""
    for module in network.modules():
        module.__class__ = TORCHS.get(type(module), type(module))
    return network


def settled(network: nn.Module, data: list[Tensor]) -> nn.Module:
    """The network in eval mode with batch-norm's statistics of this data and no logits that are 0: its numbers have the
    size of 1."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        network(*data)
    return network.eval()


def flat(output: object) -> Tensor:
    """A model's output; all tensors of several as one."""
    if isinstance(output, Tensor):
        return output
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.cat([tensor.flatten() for tensor in tensors])


class InferenceWork(ModelWork):
    """A network in eval mode; cvfast's is accelerate(model, fuse=True)."""

    bound, factor = ACCURATE, WINOGRAD

    @cached_property
    def network(self) -> nn.Module:
        return settled(super().network, [tensor.to(self.device) for tensor in self.case.data(4)])

    def calls(self, who: str, memory_format: str, compile: bool = False) -> Calls:
        model = self.model if who == "torch" else cvfast.accelerate(self.network, copy=True, fuse=True)
        if memory_format == "channels_last":
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        data = self.in_format(memory_format)

        def run() -> object:
            with torch.no_grad(), use_backend("native" if who == "torch" else "auto"):
                return model(*data)

        return run, lambda: flat(run())

    def judged_natively(self, dtype: torch.dtype) -> Tensor:
        model = copy.deepcopy(self.model).to(dtype)
        with torch.no_grad(), use_backend("native"):
            return flat(model(*converted([self.judged(tensor) for tensor in self.data], dtype)))

    @cached_property
    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:  # cvfast's layers: torch's attention hides its products
            self.infer(self.network)
        return counter.get_total_flops()


class TrainingWork(ModelWork):
    """Steps of a network in training mode, judged by its first gradients; cvfast's is accelerate(model, fuse=True)."""

    bound = ACCURATE_GRADIENTS

    def calls(self, who: str, memory_format: str, compile: bool = False) -> Calls:
        if compile:
            raise Unable("inference only, of whole models")
        model = copy.deepcopy(self.model if who == "torch" else self.network)
        if who == "cvfast":
            model = cvfast.accelerate(model, fuse=True)
        if memory_format == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        data, backend = self.in_format(memory_format), "native" if who == "torch" else "auto"
        optimizers: dict[nn.Module, torch.optim.Optimizer] = {}

        def run() -> None:
            with use_backend(backend):
                for part, loss in self.case.losses(model, *data):
                    if part not in optimizers:
                        optimizers[part] = torch.optim.Adam(part.parameters(), 1e-4, fused=True)
                    optimizers[part].zero_grad()
                    loss.backward()
                    optimizers[part].step()

        return run, lambda: self.gradients(model, data, backend)

    def gradients(self, model: nn.Module, data: list[Tensor], backend: str = "native") -> Tensor:
        """Of each part from its loss, all in one."""
        with use_backend(backend):
            parts = [
                torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
                for part, loss in self.case.losses(model, *data)
            ]
        return torch.cat([gradient.flatten() for part in parts for gradient in part])

    def judged(self, result: Tensor) -> Tensor:
        return result

    def judged_natively(self, dtype: torch.dtype) -> Tensor:
        return self.gradients(copy.deepcopy(self.model).to(dtype), converted(self.data, dtype))

    @cached_property
    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.gradients(copy.deepcopy(self.network), self.data)
        return counter.get_total_flops()
