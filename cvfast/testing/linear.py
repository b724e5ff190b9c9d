"""The OpSpec of linear."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from cvfast import functional, reference
from cvfast.ops.conv2d import ONE_BY_ONE, rows_as_pixels
from cvfast.testing.conv2d import CPU_DTYPES
from cvfast.testing.spec import Case, ErrorCase, OpSpec, Sample, Shape


def case(name: str, input: Shape, outputs: int, bias: bool = True, layout: str = "dense") -> Case:
    """A case by the input's shape [*, I] and the number of outputs O."""
    shapes = {"input": input, "weight": (outputs, input[-1]), "bias": (outputs,) if bias else None}
    return Case(name, shapes, {}, layout)


CASES = (
    case("plain", (3, 5, 16), 8),
    case("no-bias", (7, 12), 9, bias=False),
    case("vector", (11,), 7),
    case("odd", (2, 3, 13, 17), 19),
    case("sliced", (5, 16), 8, layout="sliced"),
    case("expanded", (4, 3, 8), 5, layout="expanded"),
    case("one-element", (1, 1), 1),
    case("no-rows", (0, 4), 3),
    case("no-inputs", (2, 0), 3),
    case("no-outputs", (2, 4), 0),
)
WIDE_CASES = (
    case("tokens", (2, 197, 192), 70),
    case("several-blocks", (130, 300), 520),
    case("one-row", (1, 600), 300),
)
SMALL_CASES = (case("plain", (2, 3, 4), 3), case("no-bias", (2, 3), 2, bias=False))


def error(name: str, match: str, kind: type[Exception] = RuntimeError, **changed) -> ErrorCase:
    """A wrong call on zeros: shapes, tensors or options that differ from a right one's."""
    right = {"input": (2, 4), "weight": (3, 4), "bias": (3,)}

    def call(function):
        arguments = {**right, **changed}
        return function(**{n: torch.zeros(a) if isinstance(a, tuple) else a for n, a in arguments.items()})

    return ErrorCase(name, call, kind, match)


ERRORS = (
    error("sizes", "shapes cannot be multiplied \\(2x5 and 4x3\\)", input=(2, 5)),
    error("bias", "2|5", bias=(5,)),
    error("dtypes", "dtype", weight=torch.zeros(3, 4, dtype=torch.float64)),
    error("backend", "unknown backend 'cudnn'", ValueError, backend="cudnn"),
)


class LinearSpec(OpSpec):
    """linear; see OpSpec."""

    name = "linear"
    operator = "conv2d"
    formats = ("contiguous",)
    function = staticmethod(functional.linear)
    native = staticmethod(torch.nn.functional.linear)
    reference = staticmethod(reference.linear)
    gpu_dtypes = (torch.float32, torch.float64)
    dtypes = {"ext": CPU_DTYPES, "triton": gpu_dtypes, "native": CPU_DTYPES}
    cases = CASES
    wide_cases = WIDE_CASES
    small_cases = SMALL_CASES
    errors = ERRORS
    plain_case = "plain"
    batched = ("input",)
    random_cases = 12
    vmap_dims = (
        {"input": 0, "weight": None, "bias": None},
        {"input": None, "weight": 0, "bias": 0},
        {"input": 1, "weight": 1, "bias": None},
    )

    def random_case(self, rng: random.Random) -> Case:
        shape = tuple(rng.randint(1, 40) for _ in range(rng.randint(0, 2)))
        return case("random", (*shape, rng.randint(1, 300)), rng.randint(1, 200), rng.random() < 0.7)

    def operator_calls(self, sample: Sample) -> Iterator[tuple[str, tuple]]:
        input, weight, bias = sample.operands.values()
        pixels = rows_as_pixels(input.detach()).requires_grad_()
        yield "conv2d", (pixels, weight.detach()[:, :, None, None].requires_grad_(), bias, *ONE_BY_ONE)

    def flops(self, sample: Sample) -> int:
        input, weight, _ = sample.operands.values()
        return 2 * input.numel() * weight.shape[0]
