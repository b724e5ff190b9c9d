"""The form of an OpSpec: an operator's cases, its oracle, its cost and its wrong inputs, for tests and benchmarks."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """The arguments of one call: differentiable operands by name (None: left out) and options by name."""

    operands: dict[str, Tensor | None]
    options: dict[str, object]

    def call(self, function: Callable[..., Tensor], **more) -> Tensor:
        """Calls `function` with operands and options."""
        return function(**self.operands, **self.options, **more)

    def results(self, function: Callable, **more) -> tuple[Tensor, ...]:
        """As `call`, a single result as a tuple too."""
        result = self.call(function, **more)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def to(self, dtype: torch.dtype) -> Sample:
        """The same values in another dtype, on tensors of their own."""
        return self.map(lambda tensor: tensor.detach().to(dtype, copy=True))

    def requiring_grad(self) -> Sample:
        """The same values on leaves that require gradients."""
        return self.map(lambda tensor: tensor.detach().requires_grad_())

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The sample with `function` applied to every operand."""
        operands = {name: None if t is None else function(t) for name, t in self.operands.items()}
        return Sample(operands, self.options)

    def tensors(self) -> list[Tensor]:
        """The operands that are there."""
        return [t for t in self.operands.values() if t is not None]


@dataclass(frozen=True, eq=False)  # hashable by identity: options are a dict
class Case:
    """Shapes and options of one call. `layout` is how operands lie in memory:

    dense: contiguous in the memory format asked for; sliced: every second element of a larger tensor's last dimension,
    behind an offset; expanded: the first dimension repeated with stride 0.
    """

    name: str
    shapes: dict[str, Shape | None]
    options: dict[str, object] = field(default_factory=dict)
    layout: str = "dense"

    def sample(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        device: str = "cpu",
        seed: int = 0,
    ) -> Sample:
        """Normally distributed operands, the same values for every layout, format and dtype (up to rounding)."""
        generator = torch.Generator().manual_seed(seed)
        operands = {
            name: None if shape is None else self._operand(shape, dtype, memory_format, generator).to(device)
            for name, shape in self.shapes.items()
        }
        return Sample(operands, self.options)

    def _operand(
        self, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format, generator: torch.Generator
    ) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if values.dim() == 4:
            values = values.contiguous(memory_format=memory_format)
        if self.layout == "sliced":
            wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), torch.nan, dtype=dtype)
            if wide.dim() == 4:
                wide = wide.contiguous(memory_format=memory_format)
            view = wide[..., 1::2]
            view.copy_(values)
            return view
        if self.layout == "expanded" and len(shape) > 1:
            return values[:1].expand(shape)
        return values

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ErrorCase:
    """A call that the user got wrong: what is raised and what its text must match."""

    name: str
    call: Callable[[Callable[..., Tensor]], object]
    error: type[Exception]
    match: str

    def __str__(self) -> str:
        return self.name


class OpSpec(ABC):
    """Everything the tests and benchmarks must know of one operator."""

    name: str  # the operator's name in every room
    function: Callable[..., Tensor]  # cvfast.functional's; takes backend=
    native: Callable[..., Tensor]  # torch's own, same arguments
    reference: Callable[..., Tensor]  # cvfast.reference's
    dtypes: dict[str, tuple[torch.dtype, ...]]  # by backend
    cases: Sequence[Case]  # every option, odd sizes, layouts, one-element and empty operands
    wide_cases: Sequence[Case]  # more vectors, tiles and blocks than an interpreter has time for
    small_cases: Sequence[Case]  # few elements: gradcheck, gradgradcheck and interpreters
    errors: Sequence[ErrorCase]
    vmap_dims: Sequence[dict[str, int | None]]  # in_dims by operand name
    plain_case: str  # the name of a dense one of `cases`, with every operand there and several samples
    batched: Sequence[str]  # operands whose first of 4 dimensions is the samples (or 1)
    results: Sequence[str] = ("output",)  # names of the function's results
    formats: Sequence[str] = ("contiguous", "channels_last")  # memory formats that make a difference
    in_torchs_op_db: bool = True  # whether torch lists samples of the function
    random_cases: int = 40  # how many of `random_case` are tested
    slow_gradients: bool = False  # whether gradcheck takes one random projection of the Jacobian, not all elements
    saturates: bool = False  # whether an infinite operand leaves all results finite
    native_second_gradients: bool = True  # whether torch's own operator has them
    gpu_dtypes: Sequence[torch.dtype] = ()  # that the kernels for GPUs take, CUDA's and Triton's
    fixed_options: dict[str, object] = {}  # what replaces options of torch's samples that leave the result to chance

    @property
    def torch_name(self) -> str:
        """The function's name in torch.nn.functional."""
        return self.name

    @property
    def operator(self) -> str:
        """The operator that a call of the plain case runs."""
        return self.name

    def plain(self) -> Case:
        """The case called plain_case."""
        return next(c for c in self.cases if c.name == self.plain_case)

    @abstractmethod
    def random_case(self, rng: random.Random) -> Case:
        """A valid case of random shapes and options."""

    @abstractmethod
    def operator_calls(self, sample: Sample) -> Iterator[tuple[str, tuple]]:
        """(name, arguments) of each operator of the card that takes part in the call and its derivatives."""

    @abstractmethod
    def flops(self, sample: Sample) -> int:
        """Floating-point operations of the call's definition (a fused multiply-add counts as two)."""

    def exponentials(self, sample: Sample) -> int:
        """Exponentials of the call's definition; a sigmoid or a tanh counts as one."""
        return 0

    def bytes_per_step(self, sample: Sample) -> tuple[int, int]:
        """(steps, bytes): what each of the steps that wait for each other reads anew, such as a layer's weights."""
        return 0, 0

    def bound(self, sample: Sample, backend: str, result: str) -> float:
        """The relative error that an inexact algorithm of `backend` may have on `sample`; 0: only exact ones are taken.

        result: "output", or the name of the operand whose gradient is meant.
        """
        return 0.0

    def result_strides(self, sample: Sample) -> list[tuple[int, ...]]:
        """How the results of dense operands lie in memory: as torch's own."""
        return [result.stride() for result in sample.results(self.native)]

    def alone(self, sample: Sample, i: int) -> Sample:
        """Sample number `i` of the batch."""
        operands = {
            name: t[i : i + 1] if name in self.batched and t is not None and t.dim() == 4 and t.shape[0] > 1 else t
            for name, t in sample.operands.items()
        }
        return Sample(operands, sample.options)

    def samples_alone(self, sample: Sample) -> Iterator[tuple[Sample, Callable[[Sequence[Tensor]], list[Tensor]]]]:
        """Each sample of the batch, and a function that takes its share of the results of the whole batch."""
        first = sample.tensors()[0]
        for i in range(first.shape[0] if first.dim() == 4 else 0):
            yield self.alone(sample, i), lambda results, i=i: [r[i : i + 1] for r in results]

    def dynamic_dims(self) -> dict[str, int]:
        """The dimension of each batched operand of the plain case that is the samples."""
        return dict.fromkeys(self.batched, 0)

    def bytes(self, sample: Sample) -> int:
        """Bytes that must move at least: every operand and the results once."""
        tensors = [*sample.tensors(), *sample.results(self.native)]
        return sum(t.numel() * t.element_size() for t in tensors)
