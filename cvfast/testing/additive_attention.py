"""The OpSpec of additive attention."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cvfast import functional, reference
from cvfast.testing.attention import CPU_DTYPES, mask
from cvfast.testing.spec import Case, ErrorCase, OpSpec, Sample


def case(name: str, batch: int, queries: int | None, keys: int, size: int, query: int = 5, key: int = 6,
         value: int = 7, projected: bool = False, layout: str = "dense", **options) -> Case:  # fmt: skip
    """A case; queries None: one step. projected: keys are [B, S, A] already."""
    shapes = {
        "query": (batch, query) if queries is None else (batch, queries, query),
        "keys": (batch, keys, size if projected else key),
        "values": (batch, keys, value),
        "w_query": (size, query),
        "w_key": None if projected else (size, key),
        "v": (size,),
    }
    return ScaledCase(name, shapes, options, layout)


class ScaledCase(Case):
    """A case whose weights are as large as a layer's are: 1 / sqrt(their columns) instead of 1."""

    def sample(self, *args, **kwargs) -> Sample:
        sample = super().sample(*args, **kwargs)
        for name in ("w_query", "w_key", "v"):
            tensor = sample.operands[name]
            if tensor is not None and 0 not in tensor.stride():
                tensor.mul_(tensor.shape[-1] ** -0.5)
        return sample


CASES = (
    case("plain", 3, 4, 9, 16),
    case("one-step", 2, None, 9, 8),
    case("projected", 2, 3, 9, 8, projected=True),
    case("mask", 3, 4, 20, 12, mask=mask(3, 4, 20)),
    case("mask-of-keys", 3, 4, 20, 12, mask=mask(3, 20)),
    case("mask-one-step", 3, None, 20, 12, mask=mask(3, 20)),
    case("odd-size", 2, 3, 5, 13),
    case("sliced", 2, 3, 5, 16, layout="sliced"),
    case("expanded", 3, 3, 5, 16, layout="expanded"),
    case("one-element", 1, 1, 1, 1, 1, 1, 1),
    case("no-samples", 0, 2, 5, 8),
    case("no-queries", 2, 0, 5, 8),
)

WIDE_CASES = (
    case("several-blocks", 2, 3, 70, 300, 20, 30, 40),
    case("captioner", 2, None, 196, 512, 64, 64, 64),
    case("long-mask", 2, 5, 100, 140, mask=mask(2, 5, 100)),
)

SMALL_CASES = (
    case("plain", 2, 2, 3, 2, 2, 3, 2),
    case("mask", 2, 2, 3, 2, 2, 2, 2, mask=torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()),
    case("one-step-projected", 2, None, 3, 2, 2, value=2, projected=True),
)


def error(
    name: str, match: str, kind: type[Exception] = RuntimeError, options: dict | None = None, **shapes
) -> ErrorCase:
    """A wrong call on zeros; shapes or tensors by operand."""
    right = {"query": (2, 3, 5), "keys": (2, 4, 6), "values": (2, 4, 7), "w_query": (8, 5), "w_key": (8, 6), "v": (8,)}

    def call(function):
        operands = {n: torch.zeros(t) if isinstance(t, tuple) else t for n, t in {**right, **shapes}.items()}
        return function(**operands, **(options or {}))

    return ErrorCase(name, call, kind, match)


ERRORS = (
    error("query-4d", "expected query \\[B, T, Q\\].*query \\[2, 3, 5, 1\\]", query=(2, 3, 5, 1)),
    error("batch", "expected query.*keys \\[3, 4, 6\\]", keys=(3, 4, 6)),
    error("w-key", "w_key \\[8, 5\\]", w_key=(8, 5)),
    error("not-projected", "None with K = A.*keys \\[2, 4, 6\\]", w_key=None),
    error("dtypes", "one dtype and device.*v torch.float64", v=torch.zeros(8, dtype=torch.float64)),
    error("mask-size", "size \\[2, 4\\] or \\[2, 3, 4\\], but got torch.bool of size \\[2, 5\\]",
          options={"mask": mask(2, 5)}),
    error("mask-dtype", "a bool mask.*got torch.float32", options={"mask": torch.zeros(2, 4)}),
    error("backend", "unknown backend 'cudnn'", ValueError, options={"backend": "cudnn"}),
)  # fmt: skip


def native(query, keys, values, w_query, w_key, v, mask=None) -> tuple[Tensor, Tensor]:
    """Composed of torch's operators."""
    if query.dim() == 2:
        mask = mask[:, None] if mask is not None and mask.dim() == 2 else mask
        return tuple(t[:, 0] for t in native(query[:, None], keys, values, w_query, w_key, v, mask))
    k = keys if w_key is None else torch.nn.functional.linear(keys, w_key)
    scores = torch.tanh(torch.nn.functional.linear(query, w_query)[:, :, None] + k[:, None]) @ v
    if mask is None:
        weights = scores.softmax(-1)
    else:
        mask = mask[:, None] if mask.dim() == 2 else mask
        sees = mask.any(-1, keepdim=True)
        weights = scores.masked_fill(~mask & sees, -torch.inf).softmax(-1).masked_fill(~mask, 0)
    return weights @ values, weights


class AdditiveAttentionSpec(OpSpec):
    """additive_attention; see OpSpec."""

    name = "additive_attention"
    operator = "additive_weights"
    results = ("context", "weights")
    formats = ("contiguous",)
    random_cases = 12
    in_torchs_op_db = False
    saturates = True
    function = staticmethod(functional.additive_attention)
    native = staticmethod(native)
    reference = staticmethod(reference.additive_attention)
    dtypes = {"ext": CPU_DTYPES, "triton": (), "native": CPU_DTYPES}
    cases = CASES
    wide_cases = WIDE_CASES
    small_cases = SMALL_CASES
    errors = ERRORS
    plain_case = "plain"
    batched = ("query", "keys", "values")
    vmap_dims = (
        {"query": 0, "keys": 0, "values": 0, "w_query": None, "w_key": None, "v": None},
        {"query": 1, "keys": None, "values": None, "w_query": None, "w_key": None, "v": None},
        {"query": None, "keys": 0, "values": None, "w_query": 0, "w_key": None, "v": 0},
    )

    def random_case(self, rng: random.Random) -> Case:
        batch, queries, keys = rng.randint(1, 3), rng.choice((None, rng.randint(1, 9))), rng.randint(1, 70)
        options = {}
        if rng.random() < 0.5:
            shape = rng.choice(((batch, keys), (batch, keys) if queries is None else (batch, queries, keys)))
            options["mask"] = mask(*shape, seed=rng.randint(0, 99))
        return case("random", batch, queries, keys, rng.randint(1, 200), rng.randint(1, 20), rng.randint(1, 20),
                    rng.randint(1, 20), rng.random() < 0.3, **options)  # fmt: skip

    def operator_calls(self, sample: Sample) -> Iterator[tuple[str, tuple]]:
        query, keys, _, w_query, w_key, v = sample.operands.values()
        q = (query if query.dim() == 3 else query[:, None]) @ w_query.t()
        k = keys if w_key is None else keys @ w_key.t()
        q, k = (t.detach().requires_grad_() for t in (q, k))
        seen = sample.options.get("mask")
        seen = seen[:, None] if seen is not None and seen.dim() == 2 else seen
        yield "additive_weights", (q, k, v, seen)
        q, k, v = (t.detach() for t in (q, k, v))  # gradgradcheck sees second gradients
        weights = torch.ops.cvfast.additive_weights(q, k, v, seen)
        yield "additive_weights_backward", (torch.randn_like(weights), weights, q, k, v, seen)
        if q.dtype in (torch.float32, torch.float64):
            left, right = q.clone().requires_grad_(), k.clone().requires_grad_()
            yield "batched_product", (left, right, True)
            yield "batched_product", (left, right.detach().mT, False)

    def result_strides(self, sample: Sample) -> list[tuple[int, ...]]:
        return [result.contiguous().stride() for result in sample.results(self.native)]

    def samples_alone(self, sample: Sample) -> Iterator[tuple[Sample, Callable[[Sequence[Tensor]], list[Tensor]]]]:
        for i in range(sample.operands["query"].shape[0]):
            one = lambda t, i=i: t[i : i + 1]  # noqa: E731
            operands = {n: one(t) if n in self.batched else t for n, t in sample.operands.items()}
            options = {name: one(t) for name, t in sample.options.items()}
            yield Sample(operands, options), lambda results, one=one: [one(r) for r in results]

    def flops(self, sample: Sample) -> int:
        """Four operations per pair and feature (a tanh counts as one), the projections, the context."""
        query, keys, values, w_query, w_key, _ = sample.operands.values()
        steps = query.shape[1] if query.dim() == 3 else 1
        batch, count, value = values.shape
        projections = 2 * batch * (steps * w_query.numel() + (0 if w_key is None else count * w_key.numel()))
        return batch * steps * count * (4 * w_query.shape[0] + 2 * value) + projections
