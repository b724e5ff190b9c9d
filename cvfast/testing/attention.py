"""The OpSpec of attention."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from cvfast import functional, reference
from cvfast.testing.spec import Case, ErrorCase, OpSpec, Sample, Shape

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UNLIMITED = 2**62


def case(name: str, query: Shape, keys: int, value: int | None = None, layout: str = "dense", heads: int | None = None,
         bias: Shape | None = None, **options) -> Case:  # fmt: skip
    """A case from query's shape, the number of keys, value's size (default: query's) and the number of key heads.

    bias: the shape of an additive attn_mask; a boolean one is an option.
    """
    leading = query[:-2] if heads is None else (*query[:-3], heads)
    shapes = {
        "query": query,
        "key": (*leading, keys, query[-1]),
        "value": (*leading, keys, query[-1] if value is None else value),
    }
    if heads is not None:
        options["enable_gqa"] = True
    return Case(name, shapes if bias is None else {**shapes, "attn_mask": bias}, options, layout)


def mask(*shape: int, seed: int = 0) -> Tensor:
    """A boolean mask, half of it True."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


CASES = (
    case("plain", (2, 3, 17, 16), 17),
    case("cross", (2, 2, 9, 8), 21, 12),
    case("bias", (2, 3, 19, 8), 18, bias=(2, 3, 19, 18)),
    case("bias-of-keys", (2, 2, 19, 8), 18, bias=(2, 1, 1, 18)),
    case("bias-of-heads", (2, 2, 20, 8), 18, bias=(1, 2, 20, 18)),
    case("bias-2d", (2, 2, 20, 8), 18, bias=(20, 18)),
    case("causal", (2, 2, 40, 8), 40, is_causal=True),
    case("causal-50", (2, 2, 50, 64), 50, is_causal=True),
    case("causal-more-keys", (1, 2, 20, 8), 40, is_causal=True),
    case("causal-more-queries", (1, 2, 40, 8), 20, is_causal=True),
    case("scale", (1, 2, 7, 8), 9, scale=0.7),
    case("negative-scale", (1, 2, 7, 8), 9, scale=-0.5),
    case("mask", (2, 2, 21, 8), 23, attn_mask=mask(2, 2, 21, 23)),
    case("mask-of-keys", (2, 2, 21, 8), 40, attn_mask=mask(2, 1, 1, 40)),
    case("mask-of-queries", (2, 2, 21, 8), 14, attn_mask=mask(21, 1)),
    case("mask-of-heads", (2, 3, 21, 8), 14, attn_mask=mask(3, 21, 14)),
    case("mask-transposed", (2, 3, 21, 8), 14, attn_mask=mask(14, 21).t()),
    case("lengths", (4, 2, 10, 8), 12, key_lengths=torch.tensor([12, 5, 0, 30])),
    case("window", (2, 2, 40, 8), 40, window=(5, 3)),
    case("window-left-causal", (2, 2, 40, 8), 40, window=(5, None), is_causal=True),
    case("window-mask-lengths", (2, 2, 30, 8), 30, window=(9, 4), attn_mask=mask(2, 1, 30, 30),
         key_lengths=torch.tensor([25, 11])),
    case("window-bias", (2, 2, 30, 8), 30, window=(9, 4), bias=(2, 1, 30, 30)),
    case("gqa", (2, 6, 11, 8), 13, heads=2),
    case("gqa-causal-bias", (2, 4, 20, 8), 20, heads=1, is_causal=False, window=(None, 0), bias=(4, 20, 20)),
    case("odd-sizes", (1, 2, 33, 13), 35, 7),
    case("one-query", (2, 2, 1, 16), 37),
    case("one-key", (2, 2, 5, 16), 1),
    case("one-element", (1, 1, 1, 1), 1),
    case("3d", (3, 17, 8), 19),
    case("2d", (17, 8), 19),
    case("5d", (2, 2, 2, 9, 8), 11),
    case("3d-mask", (3, 17, 8), 19, attn_mask=mask(3, 17, 19)),
    case("5d-bias", (2, 2, 2, 9, 8), 11, bias=(2, 1, 2, 1, 11)),
    case("sliced", (2, 2, 18, 16), 20, layout="sliced"),
    case("expanded", (3, 2, 18, 16), 20, layout="expanded"),
    case("no-samples", (0, 2, 5, 8), 6),
    case("no-queries", (2, 2, 0, 8), 6),
)  # fmt: skip

WIDE_CASES = (
    case("vit", (1, 3, 197, 64), 197),
    case("several-blocks", (1, 2, 300, 64), 700),
    case("several-blocks-causal", (1, 2, 530, 32), 530, is_causal=True),
    case("wide-head", (1, 1, 70, 256), 300, 200),
    case("head-of-80", (1, 2, 70, 80), 150),
    case("head-of-96-100", (1, 2, 50, 96), 150, 100),
    case("key-padding", (2, 2, 70, 32), 900, attn_mask=mask(2, 1, 1, 900)),
    case("mask-per-query", (1, 2, 300, 32), 400, attn_mask=mask(300, 400)),
    case("long-window", (1, 2, 600, 32), 600, window=(100, 20)),
    case("long-bias", (2, 2, 300, 32), 400, bias=(1, 2, 300, 400)),
)

SMALL_CASES = (
    case("plain", (1, 2, 3, 2), 4, 3),
    case("bias", (1, 2, 3, 2), 4, bias=(2, 1, 4)),
    case("causal", (1, 1, 4, 2), 4, is_causal=True),
    case("mask", (1, 2, 3, 2), 4, attn_mask=torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()),
    case("gqa-lengths", (2, 4, 3, 2), 3, heads=2, key_lengths=torch.tensor([2, 0])),
    case("gqa-window-bias", (1, 2, 4, 2), 4, heads=1, window=(1, 1), bias=(1, 2, 4, 1)),
)


def error(name: str, match: str, error: type[Exception] = RuntimeError, *, query=(2, 2, 5, 4), key=(2, 2, 6, 4),
          value=(2, 2, 6, 4), **options):  # fmt: skip
    """A wrong call on zeros; operands are shapes or tensors."""

    def call(function):
        operands = {"query": query, "key": key, "value": value}
        return function(**{n: torch.zeros(t) if isinstance(t, tuple) else t for n, t in operands.items()}, **options)

    return ErrorCase(name, call, error, match)


ERRORS = (
    error("1d", "at least 2 dimensional, but got query.dim: 1", query=(4,)),
    error("sizes", "same last dimension.*\\[2, 2, 5, 3\\]", query=(2, 2, 5, 3)),
    error("keys", "same number of keys.*\\[2, 2, 7, 4\\]", value=(2, 2, 7, 4)),
    error("dtypes", "same dtype.*float64", key=torch.zeros(2, 2, 6, 4, dtype=torch.float64)),
    error("devices", "same device type.*meta", key=torch.zeros(2, 2, 6, 4, device="meta")),
    error("heads", "size of tensor|broadcast|[Ss]hape mismatch", key=(2, 3, 6, 4)),
    error("gqa-heads", "must divide the number of heads in query", query=(2, 3, 5, 4), enable_gqa=True),
    error("dropout", "between 0 and 1, but got 1.5", dropout_p=1.5),
    error("mask-and-causal", "should not be set when is_causal=True", attn_mask=mask(5, 6), is_causal=True),
    error("mask-dtype", "bool or float or to match query dtype.*int64", attn_mask=torch.ones(5, 6, dtype=torch.int64)),
    error("mask-size", "attn_mask of size \\[5, 7\\] cannot be broadcast", attn_mask=mask(5, 7)),
    error("mask-device", "attn_mask is on meta", attn_mask=torch.ones(5, 6, device="meta")),
    error("lengths-type", "key_lengths must be an int64 tensor", TypeError, key_lengths=[1, 2]),
    error("lengths-number", "one number for each of 2 samples.*\\[3\\]", key_lengths=torch.tensor([1, 2, 3])),
    error("window-type", "window must be a pair.*3", TypeError, window=3),
    error("window-side", "whole numbers or None, got 1.5", TypeError, window=(1.5, None)),
    error("window-negative", "must not be negative, got \\(-1, 2\\)", window=(-1, 2)),
    error("backend", "unknown backend 'cudnn'; allowed: auto, ext, triton, native", ValueError, backend="cudnn"),
)


def native(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False,
           key_lengths=None, window=None):  # fmt: skip
    """torch's own, with the rules that it lacks as a mask."""
    left, right = window or (None, None)
    if key_lengths is None and window is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    i, j = torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])
    visible = (j <= i) if is_causal else torch.ones(len(i), len(j), dtype=torch.bool)
    visible = visible if left is None else visible & (j >= i - left)
    visible = visible if right is None else visible & (j <= i + right)
    if key_lengths is not None:
        visible = visible & (j < key_lengths[:, None, None, None])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        visible = attn_mask.masked_fill(~visible, -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, visible, dropout_p, False, scale=scale, enable_gqa=enable_gqa
    )


class AttentionSpec(OpSpec):
    """attention; see OpSpec."""

    name = "attention"
    torch_name = "scaled_dot_product_attention"
    function = staticmethod(functional.scaled_dot_product_attention)
    native = staticmethod(native)
    reference = staticmethod(reference.scaled_dot_product_attention)
    dtypes = {"ext": CPU_DTYPES, "triton": (), "native": CPU_DTYPES}
    cases = CASES
    wide_cases = WIDE_CASES
    small_cases = SMALL_CASES
    errors = ERRORS
    plain_case = "bias"
    formats = ("contiguous",)
    random_cases = 20
    fixed_options = {"dropout_p": 0.0}
    native_second_gradients = False
    batched = ("query", "key", "value", "attn_mask")
    vmap_dims = (
        {"query": 0, "key": 0, "value": 0},
        {"query": 1, "key": None, "value": None},
        {"query": None, "key": 2, "value": 0},
    )

    def random_case(self, rng: random.Random) -> Case:
        batch, heads, size = rng.randint(1, 3), rng.choice((1, 2, 4)), rng.randint(1, 70)
        queries, keys = rng.randint(1, 90), rng.randint(1, 400)
        options: dict[str, object] = {}
        bias = None
        kind = rng.choice(("none", "none", "causal", "mask", "bias"))
        broadcast = tuple(rng.choice((1, full)) for full in (batch, heads, queries, keys))
        if kind == "causal":
            options["is_causal"] = True
        elif kind == "mask":
            options["attn_mask"] = mask(*broadcast, seed=rng.randint(0, 99))
        elif kind == "bias":
            bias = (*broadcast[:3], keys)  # one per query alone would have gradient 0
        if rng.random() < 0.3:
            options["key_lengths"] = torch.tensor([rng.randint(0, keys) for _ in range(batch)])
        if rng.random() < 0.3:
            options["window"] = (rng.choice((None, 0, rng.randint(0, 50))), rng.choice((None, 0, rng.randint(0, 50))))
        return case(
            "random",
            (batch, heads, queries, size),
            keys,
            rng.choice((size, rng.randint(1, 70))),
            rng.choice(("dense", "dense", "sliced", "expanded")),
            rng.choice((None, 1, heads)),
            bias,
            **options,
        )

    def operator_calls(self, sample: Sample) -> Iterator[tuple[str, tuple]]:
        query, key, value = (sample.operands[name] for name in ("query", "key", "value"))
        attn_mask = sample.operands.get("attn_mask", sample.options.get("attn_mask"))
        if attn_mask is not None:
            attn_mask = attn_mask.reshape(*(1 for _ in range(4 - attn_mask.dim())), *attn_mask.shape)
        bias, bool_mask = (None, attn_mask) if attn_mask is None or attn_mask.dtype == torch.bool else (attn_mask, None)
        left, right = (UNLIMITED if side is None else side for side in sample.options.get("window", (None, None)))
        right = 0 if sample.options.get("is_causal") else right
        shared = (query, key, value, bias, bool_mask, sample.options.get("key_lengths"))
        seed, dropout_p = (None, 0.0) if bias is None else (torch.tensor([5]), 0.25)
        args = (*shared, seed, dropout_p, 0.5, left, right)
        yield "attention", args
        args = [t.detach() if isinstance(t, Tensor) else t for t in args]  # gradgradcheck sees second gradients
        output, log_sum = torch.ops.cvfast.attention(*args)
        yield "attention_backward", (torch.randn_like(output), None, output, log_sum, *args, bias is not None)

    def alone(self, sample: Sample, i: int) -> Sample:
        options = dict(sample.options)
        options.update({name: options[name][i : i + 1] for name in ("key_lengths",) if name in options})
        bool_mask = options.get("attn_mask")
        if bool_mask is not None and bool_mask.dim() == 4 and bool_mask.shape[0] > 1:
            options["attn_mask"] = bool_mask[i : i + 1]
        return Sample(super().alone(sample, i).operands, options)

    def flops(self, sample: Sample) -> int:
        """2 (D + Dv) for each pair of a query and a key that it sees."""
        return 2 * self.exponentials(sample) * (sample.operands["query"].shape[-1] + sample.operands["value"].shape[-1])

    def exponentials(self, sample: Sample) -> int:
        """One for each pair of a query and a key that it sees."""
        query, key = sample.operands["query"], sample.operands["key"]
        visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        if sample.options.get("is_causal"):
            visible = visible.tril()
        attn_mask = sample.options.get("attn_mask")
        return int((visible if attn_mask is None else visible & attn_mask).expand(*query.shape[:-1], -1).sum())
