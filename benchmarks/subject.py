"""What is measured: a subject with its cases file, and one case of it as the providers need it."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import limits
from benchmarks.goals import Goal
from cvfast.backend import use_backend
from cvfast.testing import SPECS, Case, OpSpec, Sample, assert_as_accurate

MODELS = Path(__file__).parent.parent / "build" / "benchmarks"  # what was converted for other engines, kept
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Calls = tuple[Callable[[], object], Callable[[], Tensor]]  # what to time; the result by which it is judged


class Unable(Exception):
    """Why a provider does not measure a case."""


@dataclass(frozen=True)
class Subject(ABC):
    """What its cases file says: the names in capitals there, all but GROUPS optional."""

    name: str
    groups: dict[str, list[Any]]
    training_groups: dict[str, list[Any]] | None = None  # where training has cases of its own
    goals: tuple[Goal, ...] = ()
    data: tuple[str, ...] = ("input",)  # operands that are given at each call; the others are constants of a model
    by_sample: tuple[str, ...] = ()  # constants that may differ from sample to sample, broadcast against data
    formats: tuple[str, ...] = ("contiguous",)  # memory formats in which torch and cvfast compete
    batch_first: bool = False  # samples are independent along the first dimension of data and result
    competitors: tuple[str, ...] | None = None  # the providers that it is about, if not all

    def cases(self, direction: str) -> dict[str, list[Any]]:
        """The cases by group."""
        return self.groups if direction == "forward" or self.training_groups is None else self.training_groups

    @abstractmethod
    def work(self, case: Any, direction: str, threads: int, device: str = "cpu") -> Work:
        """One case in one direction."""


def load(name: str) -> Subject:
    """The subject of this name: an operator's, or of the kind that its cases file calls SUBJECT."""
    module = importlib.import_module(f"benchmarks.cases.{name}")
    optional = ("training_groups", "goals", "data", "by_sample", "formats", "batch_first", "competitors")
    given = {key: getattr(module, key.upper()) for key in optional if hasattr(module, key.upper())}
    return getattr(module, "SUBJECT", Operator)(name, module.GROUPS, **given)


@dataclass(frozen=True)
class Work(ABC):
    """One case in one direction."""

    subject: Subject
    case: Any
    direction: str
    threads: int
    device: str = "cpu"

    @property
    @abstractmethod
    def data(self) -> list[Tensor]:
        """What is given at each call."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The case as a network on torch's operators, in eval mode, which holds everything but the data."""

    @property
    @abstractmethod
    def exact(self) -> Tensor:
        """The float64 reference of the judged result."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Operations of the definition."""

    def least_ms(self, peak: float) -> float | None:
        """Milliseconds that the case takes at least on one core; peak: its GFLOP/s at the time (see limits.py)."""
        return None

    @abstractmethod
    def calls(self, who: str, memory_format: str, compile: bool = False) -> Calls:
        """The work as `who`, torch or cvfast, does it in one memory format; compile: by torch.compile, in training."""

    @abstractmethod
    def check(self, result: Tensor, who: str) -> None:
        """Raises AssertionError if cvfast's judged result is less accurate than it must be."""

    @property
    @abstractmethod
    def identity(self) -> object:
        """What a converted model hangs on, beside the case's name."""

    @property
    def batch(self) -> int:
        return self.data[0].shape[0]

    def judged(self, result: Tensor) -> Tensor:
        """First and last sample of a batch; all of it where samples aren't independent."""
        return result[:: max(1, self.batch - 1)] if self.subject.batch_first else result

    def infer(self, model: nn.Module) -> Tensor:
        """The result of a model on torch's operators."""
        with torch.no_grad(), use_backend("native"):
            return model(*self.data)

    def file(self, suffix: str) -> Path:
        """A file for this case's converted model; its name changes with the case and with torch, which exports it."""
        text = repr((self.case.name, self.identity, torch.__version__))
        folder = MODELS / self.subject.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.case.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{suffix}"

    def onnx(self, single: bool = False) -> Path:
        """The case as an ONNX file, made once; single: for one sample of the batch."""
        path = self.file("-single.onnx" if single else ".onnx")
        if not path.exists():
            data = tuple(tensor[:1] for tensor in self.data) if single else tuple(self.data)
            part = path.with_suffix(".part")  # what is interrupted is not taken for a file
            names = {"input_names": list(self.subject.data), "output_names": ["output"]}
            fast = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)  # one operator that no other engine knows
            with warnings.catch_warnings(), use_backend("native"):  # this exporter is quick, and said to go one day
                warnings.simplefilter("ignore")
                torch.onnx.export(self.model, data, part, dynamo=False, **names)
            torch.backends.mha.set_fastpath_enabled(fast)
            part.replace(path)
        return path


class Operator(Subject):
    """An operator, whose OpSpec is called as it is."""

    @property
    def spec(self) -> OpSpec:
        return SPECS[self.name]

    def work(self, case: Case, direction: str, threads: int, device: str = "cpu") -> OperatorWork:
        return OperatorWork(self, case, direction, threads, device)


def first_result(function: Callable) -> Callable[..., Tensor]:
    """An operator by the first of its results: a recurrent layer's output, a cell's h."""

    def call(*args, **kwargs) -> Tensor:
        result = function(*args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]

    return call


class ConstantModel(nn.Module):
    """The operator as a network of one layer: data comes in, everything else is kept as constants."""

    def __init__(self, subject: Operator, sample: Sample) -> None:
        super().__init__()
        self.function, self.options, self.data = first_result(subject.spec.native), sample.options, subject.data
        self.absent = [name for name, tensor in sample.operands.items() if tensor is None]
        for name, tensor in sample.operands.items():
            if tensor is not None and name not in subject.data:
                self.register_buffer(name, tensor)

    def forward(self, *data: Tensor) -> Tensor:
        operands = dict(self.named_buffers()) | dict(zip(self.data, data, strict=True))
        return self.function(**operands, **dict.fromkeys(self.absent), **self.options)


def inference(function: Callable, sample: Sample) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return sample.call(function)

    return run


def training(function: Callable, sample: Sample) -> Callable[[], object]:
    """Forward, and the gradients to every operand from a gradient of ones."""
    sample = sample.requiring_grad()
    cotangent = torch.ones_like(sample.call(function))
    return lambda: torch.autograd.grad(sample.call(function), sample.tensors(), cotangent)


class OperatorWork(Work):
    """An operator's case."""

    @cached_property
    def sample(self) -> Sample:
        return self.case.sample(torch.float32, device=self.device)

    @cached_property
    def data(self) -> list[Tensor]:
        return [self.sample.operands[name] for name in self.subject.data]

    @cached_property
    def model(self) -> ConstantModel:
        return ConstantModel(self.subject, self.sample).eval()

    def calls(self, who: str, memory_format: str, compile: bool = False) -> Calls:
        spec = self.subject.spec
        function = spec.native if who == "torch" else lambda **k: spec.function(**k, backend="ext")
        function = first_result(function)
        function = torch.compile(function) if compile else function
        sample = self.case.sample(torch.float32, FORMATS[memory_format], self.device)
        forward = inference(function, sample)
        return (forward if self.direction == "forward" else training(function, sample)), forward

    @cached_property
    def judged_sample(self) -> Sample:
        operands, options = (self.judged_arguments(a) for a in (self.sample.operands, self.sample.options))
        return replace(self.sample, operands=operands, options=options)

    def judged_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self.judged(value) if self.has_samples(name, value) else value for name, value in arguments.items()
        }

    def has_samples(self, name: str, value: Any) -> bool:
        """Whether an argument's first dimension is the batch; a mask's may be one of heads or queries, or of size 1."""
        if name in self.subject.data:
            return True
        like = self.data[0]
        return name in self.subject.by_sample and value.dim() == like.dim() and len(value) == len(like)

    @cached_property
    def exact(self) -> Tensor:
        return self.judged_sample.to(torch.float64).call(first_result(self.subject.spec.reference))

    def check(self, result: Tensor, who: str) -> None:
        """Held to the tolerance of the operator's tests."""
        sample, spec = self.judged_sample, self.subject.spec
        bound = spec.bound(sample, "ext", "output")
        assert_as_accurate(
            result, sample.call(first_result(spec.native)), self.exact, f"{who} on {self.case}", bound=bound
        )

    @cached_property
    def flops(self) -> int:
        return self.subject.spec.flops(self.sample) * (3 if self.direction == "training" else 1)

    def least_ms(self, peak: float) -> float | None:
        return limits.least_ms(self.subject.spec, self.sample, peak, self.direction == "training")

    @property
    def identity(self) -> object:
        return self.case.shapes, self.case.options
