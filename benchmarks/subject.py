"""What is measured: an operator with its cases file, and one case of it as the providers need it."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.goals import Goal
from cvfast.testing import SPECS, Case, OpSpec, Sample

MODELS = Path(__file__).parent.parent / "build" / "benchmarks"  # what was converted for other engines, kept


@dataclass(frozen=True)
class Subject:
    """An operator and what its cases file says: the names in capitals there, all but GROUPS optional."""

    spec: OpSpec
    groups: dict[str, list[Case]]
    goals: tuple[Goal, ...] = ()
    data: tuple[str, ...] = ("input",)  # operands that are given at each call; the others are constants of a model
    formats: tuple[str, ...] = ("contiguous",)  # memory formats in which torch and cvfast compete
    batch_first: bool = False  # samples are independent along the first dimension of data and result

    @classmethod
    def load(cls, name: str) -> Subject:
        module = importlib.import_module(f"benchmarks.cases.{name}")
        optional = ("goals", "data", "formats", "batch_first")
        given = {key: getattr(module, key.upper()) for key in optional if hasattr(module, key.upper())}
        return cls(SPECS[name], module.GROUPS, **given)


class ConstantModel(nn.Module):
    """The operator as a network of one layer: data comes in, everything else is kept as constants."""

    def __init__(self, subject: Subject, sample: Sample) -> None:
        super().__init__()
        self.function, self.options, self.data = subject.spec.native, sample.options, subject.data
        self.absent = [name for name, tensor in sample.operands.items() if tensor is None]
        for name, tensor in sample.operands.items():
            if tensor is not None and name not in subject.data:
                self.register_buffer(name, tensor)

    def forward(self, *data: Tensor) -> Tensor:
        operands = dict(self.named_buffers()) | dict(zip(self.data, data, strict=True))
        return self.function(**operands, **dict.fromkeys(self.absent), **self.options)


@dataclass(frozen=True)
class Work:
    """One case in one direction."""

    subject: Subject
    case: Case
    direction: str
    threads: int
    device: str = "cpu"

    @cached_property
    def sample(self) -> Sample:
        return self.case.sample(torch.float32, device=self.device)

    @property
    def batch(self) -> int:
        return self.sample.operands[self.subject.data[0]].shape[0]

    @cached_property
    def data(self) -> list[Tensor]:
        return [self.sample.operands[name] for name in self.subject.data]

    @cached_property
    def model(self) -> ConstantModel:
        return ConstantModel(self.subject, self.sample).eval()

    def ends(self, tensor: Tensor) -> Tensor:
        """First and last sample of a batch, by which results are judged; all of it where samples aren't independent."""
        return tensor[:: max(1, self.batch - 1)] if self.subject.batch_first else tensor

    def ends_of_sample(self) -> Sample:
        operands = {n: self.ends(t) if n in self.subject.data else t for n, t in self.sample.operands.items()}
        return replace(self.sample, operands=operands)

    @cached_property
    def exact(self) -> Tensor:
        """The float64 reference of the judged samples."""
        return self.ends_of_sample().to(torch.float64).call(self.subject.spec.reference)

    @cached_property
    def flops(self) -> int:
        return self.subject.spec.flops(self.sample) * (3 if self.direction == "training" else 1)

    def file(self, suffix: str) -> Path:
        """A file for this case's converted model; its name changes with the case and with torch, which exports it."""
        text = repr((self.case.name, self.case.shapes, self.case.options, torch.__version__))
        folder = MODELS / self.subject.spec.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.case.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{suffix}"

    def onnx(self, single: bool = False) -> Path:
        """The case as an ONNX file, made once; single: for one sample of the batch."""
        path = self.file("-single.onnx" if single else ".onnx")
        if not path.exists():
            data = tuple(tensor[:1] for tensor in self.data) if single else tuple(self.data)
            part = path.with_suffix(".part")  # what is interrupted is not taken for a file
            names = {"input_names": list(self.subject.data), "output_names": ["output"]}
            with warnings.catch_warnings():  # this exporter is quick, and said to go one day
                warnings.simplefilter("ignore")
                torch.onnx.export(self.model, data, part, dynamo=False, **names)
            part.replace(path)
        return path
