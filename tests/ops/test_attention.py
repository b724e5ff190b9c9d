"""What attention promises beyond torch's operator and the OpSpec: hidden keys, empty rows, dropout, memory, exp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from cvfast import reference
from cvfast.functional import attention_statistics, packed_attention, scaled_dot_product_attention
from cvfast.ops.attention import PLAIN_ATTENTION, kept
from tests.conftest import isas


def attention(*args, **options):
    return scaled_dot_product_attention(*args, **options, backend="ext")


def operands(b=2, h=2, queries=40, keys=300, d=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(b, h, n, d, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(queries), draw(keys), draw(keys)


HIDING = {
    "lengths": {"key_lengths": torch.tensor([250, 0])},
    "mask-of-keys": {"attn_mask": (torch.arange(300) % 3 > 0).expand(2, 1, 1, 300)},
    "mask": {"attn_mask": torch.rand(40, 300, generator=torch.Generator().manual_seed(1)) < 0.3},
    "bias": {
        "attn_mask": torch.zeros(40, 300).masked_fill(
            torch.rand(40, 300, generator=torch.Generator().manual_seed(1)) < 0.6, -torch.inf
        )
    },
    "causal": {"is_causal": True},
    "window": {"window": (3, 5)},
}


def visible(options) -> torch.Tensor:
    """[2, 1, 40, 300]: found with one value per key, one query at a time, by the reference."""
    q, k = torch.zeros(2, 1, 40, 1, dtype=torch.float64), torch.zeros(2, 1, 300, 1, dtype=torch.float64)
    options = dict(options)
    if "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
        options["attn_mask"] = options["attn_mask"].double()
    eye = torch.eye(300, dtype=torch.float64).expand(2, 1, 300, 300)
    return reference.scaled_dot_product_attention(q, k, eye, **options) > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", HIDING.values(), ids=list(HIDING))
@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_what_hidden_keys_and_values_hold_does_not_matter(options, bad, isa):
    """One bad key and value: queries that don't see it have the result and gradient that they have without it."""
    q, k, v = operands()
    sees = visible(options)[..., 7].expand(2, 2, 40)
    expected = [t.requires_grad_() for t in (q, k, v)]
    bad_k, bad_v = k.detach().clone(), v.detach().clone()
    bad_k[:, :, 7, 3] = bad_v[:, :, 7, 5] = bad
    actual = [q.detach().clone().requires_grad_(), bad_k.requires_grad_(), bad_v.requires_grad_()]
    results = []
    for tensors in (expected, actual):
        output = attention(*tensors, **options)
        grad_q = torch.autograd.grad(output.masked_fill(sees[..., None], 0).square().sum(), tensors[0])[0]
        results.append((output[~sees], grad_q[~sees]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert not attention(*actual, **options)[sees].isfinite().all() or not sees.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_query_that_sees_nothing_gives_zero(dtype):
    """Result and gradients 0, whatever query, keys and values hold; lengths 0, a mask's row, a window off the end."""
    q, k, v = (t.requires_grad_() for t in operands(keys=30, dtype=dtype))
    mask = torch.ones(40, 30, dtype=torch.bool)
    mask[5] = False
    with torch.no_grad():
        q[:, :, 5] = torch.nan
        k[1], v[1] = torch.nan, torch.nan
    output = attention(q, k, v, mask, key_lengths=torch.tensor([30, 0]), window=(8, None))
    empty = torch.zeros(2, 1, 40, dtype=torch.bool)
    empty[1], empty[:, :, 5], empty[:, :, 38:] = True, True, True
    empty = empty.expand(2, 2, 40)
    assert torch.equal(output == 0, empty[..., None].expand_as(output))
    grads = torch.autograd.grad(output.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][empty] == 0).all()
    assert (grads[1][1] == 0).all()
    assert (grads[2][1] == 0).all()


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_is_the_twins_and_the_same_in_the_gradient(isa, dtype):
    """Values of one-hot rows read off the weights: the kernel drops where `kept` says, forward and backward."""
    q, k, _ = operands(queries=33, keys=50, dtype=dtype)
    v = torch.eye(50, dtype=dtype).expand(2, 2, 50, 50)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    torch.manual_seed(3)
    q.requires_grad_()
    dropped = attention(q, k, v, dropout_p=0.3)
    keep = kept(seed, 0.3, torch.arange(4).reshape(2, 2, 1, 1), torch.arange(33)[:, None], torch.arange(50))
    full = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    expected = full * keep / 0.7
    torch.testing.assert_close(dropped, expected)
    grads = [torch.autograd.grad(o.sin().sum(), q)[0] for o in (dropped, expected)]
    torch.testing.assert_close(*grads)


def test_dropout_is_fair():
    """Shares and neighbours' agreement over 2^20 places are within five standard deviations of chance."""
    keep = kept(torch.tensor([2**40 + 7]), 0.25, torch.tensor(3), torch.arange(1024)[:, None], torch.arange(1024))
    assert abs(keep.double().mean() - 0.75) < 5 * (0.25 * 0.75 / 2**20) ** 0.5
    agree = 0.75**2 + 0.25**2
    for one, two in ((keep[1:], keep[:-1]), (keep[:, 1:], keep[:, :-1]), (keep[1:, 1:], keep[:-1, :-1])):
        share = (one == two).double().mean()
        assert abs(share - agree) < 5 * (agree * (1 - agree) / one.numel()) ** 0.5
    other = kept(torch.tensor([2**40 + 8]), 0.25, torch.tensor(3), torch.arange(1024)[:, None], torch.arange(1024))
    assert abs((keep == other).double().mean() - agree) < 0.003


def test_all_dropped():
    q, k, v = (t.requires_grad_() for t in operands())
    output = attention(q, k, v, dropout_p=1.0)
    assert torch.equal(output, torch.zeros_like(output))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(output.sum(), (q, k, v)))


def test_second_gradients_with_dropout_and_of_log_sum():
    q, k, v = (t.requires_grad_() for t in operands(1, 2, 3, 4, 2, torch.float64))
    seed = torch.tensor([11])

    def both(q, k, v):
        return torch.ops.cvfast.attention(q, k, v, None, None, None, seed, 0.3, 0.5, 9, 9)

    assert torch.autograd.gradcheck(both, (q, k, v))
    assert torch.autograd.gradgradcheck(both, (q, k, v))


def test_third_gradient():
    q, k, v = (t.requires_grad_() for t in operands(1, 1, 2, 3, 2, torch.float64))

    def second(q, k, v):
        grads = torch.autograd.grad(attention(q, k, v).sin().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v), create_graph=True)

    assert torch.autograd.gradcheck(second, (q, k, v))


def test_second_gradients_in_several_tiles(monkeypatch):
    """Tiles of few queries give what one tile gives, for every gradient."""
    import cvfast.ops.attention as card

    results = []
    for elements in (2**20, 50):
        monkeypatch.setattr(card, "TILE_ELEMENTS", elements)
        q, k, v = (t.requires_grad_() for t in operands(1, 2, 7, 9, 4, torch.float64))
        bias = torch.linspace(-1, 1, 14, dtype=torch.float64).reshape(1, 2, 7, 1).requires_grad_()
        grads = torch.autograd.grad(attention(q, k, v, bias).sin().sum(), (q, k, v, bias), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, bias)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.float64, 2.0**-53)], ids=str)
def test_exponential(isa, dtype, unit):
    """2 ulp for 2^x, of two keys with scores 0 and x in units of log 2; then a sum, a quotient and a product round."""
    scale = 0.6931471805599453
    assert scale * 1.4426950408889634 == 1.0  # so that the kernel's scores are exactly x
    x = -torch.linspace(0, 60, 20001, dtype=torch.float64).to(dtype)
    k = torch.tensor([0.0, 1.0], dtype=dtype).reshape(1, 1, 2, 1)
    weight = attention(x.reshape(1, 1, -1, 1), k, k, scale=scale)[0, 0, :, 0].double()
    power = torch.exp2(x.double())
    assert ((weight / (power / (1 + power)) - 1).abs() <= (2 * 2 + 3 + (dtype == torch.float64)) * unit).all()


@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_exponential_of_what_is_hardly_a_number(isa):
    """Below the normal numbers' range a weight is less than the least of them, or 0; a NaN of any bits stays one."""
    x = torch.tensor([-126.25, -126.75, -127.0, -127.5, -1000.0])
    k, v = (torch.tensor([0.0, number]).reshape(1, 1, 2, 1) for number in (1.0, 2.0**126))
    weight = attention(x.reshape(1, 1, -1, 1), k, v, scale=0.6931471805599453)[0, 0, :, 0]  # times 2^126
    assert ((weight >= 0) & (weight < 1)).all() and weight[-1] == 0
    nans = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert attention(nans.reshape(1, 1, -1, 1), k, k).isnan().all()


def composed_weights(q, k, visible):
    """The definition's weights, in the operands' dtype."""
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


@pytest.mark.parametrize("tile", [2**20, 50])
def test_statistics(monkeypatch, tile):
    """Entropy, largest weights, sums of keys and means over heads are those of the weights, however they are tiled."""
    import cvfast._functional.attention_statistics as statistics

    monkeypatch.setattr(statistics, "TILE_ELEMENTS", tile)
    q, k, _ = operands(queries=11, keys=9, dtype=torch.float64)
    mask = torch.rand(2, 1, 11, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, :, 4] = False  # sees nothing
    lengths = torch.tensor([9, 5])
    weights = composed_weights(q, k, mask & (torch.arange(9) < lengths[:, None, None, None]))
    wanted = {"entropy": True, "top_k": 3, "key_sums": True, "mean_weights": True}
    found = attention_statistics(q, k, mask, key_lengths=lengths, **wanted)
    torch.testing.assert_close(found.entropy, torch.special.entr(weights).sum(-1))
    torch.testing.assert_close(found.top_weights, weights.topk(3).values)
    torch.testing.assert_close(weights.gather(-1, found.top_keys), found.top_weights)
    torch.testing.assert_close(found.key_sums, weights.sum(2))
    torch.testing.assert_close(found.mean_weights, weights.mean(1))
    assert found.entropy.shape == q.shape[:3]
    assert (found.entropy[:, :, 4] == 0).all()
    assert attention_statistics(q, k) == (None,) * 5


def test_statistics_with_bias_groups_of_heads_and_fewer_dimensions():
    q, k, _ = operands(queries=6, keys=6, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 1, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    found = attention_statistics(q, k[:, :1], is_causal=True, enable_gqa=True, key_sums=True)
    torch.testing.assert_close(found.key_sums, composed_weights(q, k[:, :1], causal).sum(2))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    found = attention_statistics(q, k, bias, entropy=True, mean_weights=True)
    torch.testing.assert_close(found.mean_weights, scores.softmax(-1).mean(1))
    found = attention_statistics(q[0], k[0], top_k=1, mean_weights=True)  # [N, L, D]: samples of one head
    assert found.top_weights.shape == (2, 6, 1)
    torch.testing.assert_close(found.mean_weights, composed_weights(q[0], k[0], torch.ones(6, 6, dtype=torch.bool)))
    with pytest.raises(RuntimeError, match="top_k must be from 0 to the number of keys, 6, got 7"):
        attention_statistics(q, k, top_k=7)


def test_packed_sequences():
    """Each sequence, empty ones too, gives result and gradients of a call of its own."""
    tokens = torch.randn(30, 4, 8, dtype=torch.float64, requires_grad=True)
    keys, values = (torch.randn(27, 2, size, dtype=torch.float64, requires_grad=True) for size in (8, 5))
    q_offsets, k_offsets = torch.tensor([0, 12, 12, 30]), [0, 7, 20, 27]
    options = {"is_causal": True, "enable_gqa": True}
    output = packed_attention(tokens, keys, values, q_offsets, k_offsets, **options, backend="ext")
    alone = [
        attention(*(t.transpose(0, 1)[None] for t in (tokens[a:b], keys[c:d], values[c:d])), **options)[0].transpose(
            0, 1
        )
        for a, b, c, d in ((0, 12, 0, 7), (12, 12, 7, 20), (12, 30, 20, 27))
    ]
    assert torch.equal(output, torch.cat(alone))
    operands_ = (tokens, keys, values)
    grads = (torch.autograd.grad(o.sin().sum(), operands_) for o in (output, torch.cat(alone)))
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [([0, 5], "ascend from 0 to 30"), ([0, 20, 10, 30], "ascend"), ([1, 30], "ascend"), ([0, 10, 30], "3 keys")],
)
def test_packed_offsets_that_do_not_fit(offsets, message):
    tokens = torch.zeros(30, 2, 4)
    with pytest.raises(RuntimeError, match=message):
        packed_attention(tokens, tokens[:3], tokens[:3], offsets, [0, 3])
    with pytest.raises(RuntimeError, match="must be \\[tokens, heads, size\\]"):
        packed_attention(tokens[0], tokens, tokens, offsets)


# The high-water mark is the process's own: getrusage's would begin with that of the process which started it.
PEAK = """
import torch
from pathlib import Path
from cvfast.functional import scaled_dot_product_attention as attention

def peak():
    return 1024 * next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)

q, k, v = (torch.randn(1, 8, 8192, 64, requires_grad=True) for _ in range(3))
bias = torch.zeros(1, 1, 1, 8192, requires_grad=True)
small = [t[:, :, :64].detach().requires_grad_() for t in (q, k, v)]
attention(*small).sum().backward()
cotangent = torch.ones_like(q)
Path("/proc/self/clear_refs").write_text("5")  # the mark comes down to what is used now
before = peak()
output = attention(q, k, v, bias, backend="ext")
grads = torch.autograd.grad(output, (q, k, v, bias), cotangent)
print(peak() - before - sum(t.numel() * 4 for t in (output, *grads)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its high-water mark")
def test_memory_grows_with_length_only():
    """Training with 8192 queries and keys and a bias that is learned: 64 MB beside results at most (L * S is 2048)."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=one_thread)
    assert 0 < int(result.stdout) < 64 * 2**20


@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_strides_do_not_change_the_bits(isa):
    """[B, L, H, D] seen as [B, H, L, D], transposed and reversed orders of memory: the same result and gradients."""
    tensors = operands(queries=70, keys=90, d=24)
    results = []
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
        views = [t.permute(order).contiguous().permute(*torch.tensor(order).argsort()) for t in tensors]
        views = [t.requires_grad_() for t in views]
        output = attention(*views, is_causal=True)
        assert output.stride() == views[0].stride()
        results.append([output, *torch.autograd.grad(output.sin().sum(), views)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_calls_from_many_threads_at_once():
    """Kernels keep no state but their thread's scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    calls = [operands(queries=n, keys=3 * n) for n in range(1, 60, 7)]
    expected = [attention(*c) for c in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            actual = list(pool.map(lambda c: attention(*c), calls))
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_without_derivatives_the_bits_are_the_same(isa, causal, dtype):
    for queries, size in ((1, 16), (7, 5), (0, 16), (40, 64), (300, 64)):
        heads_last = [t.transpose(1, 2) for t in operands(queries=queries, keys=queries, d=size, dtype=dtype)]
        for q, k, v in (heads_last, [t.contiguous() for t in heads_last]):
            options = {"is_causal": causal, "scale": 0.3}
            plain = attention(q, k, v, **options)
            derived = attention(q.detach().requires_grad_(), k, v, **options)
            assert derived.requires_grad and not plain.requires_grad
            assert torch.equal(plain, derived.detach()) and plain.stride() == derived.stride()


def test_the_kernel_without_derivatives_checks_its_operands():
    q, k, v = operands(keys=40)
    with pytest.raises(RuntimeError, match="as long as queries"):
        PLAIN_ATTENTION(q, k, v[..., :8], None, 3)
    with pytest.raises(RuntimeError, match="must not be negative"):
        PLAIN_ATTENTION(q, k, v, None, -1)
    with pytest.raises(RuntimeError, match="key has size"):
        PLAIN_ATTENTION(q, k[:1], v, None, 3)


@torch.no_grad()
def test_other_kinds_of_tensors_need_no_mode():
    with FakeTensorMode():
        fake = torch.empty(2, 3, 7, 8)
    assert attention(fake, fake, fake).shape == fake.shape
    two = TwoTensor(torch.rand(2, 3, 7, 8), torch.rand(2, 3, 7, 8))
    result = attention(two, two, two, is_causal=True)
    assert torch.equal(result.a, attention(two.a, two.a, two.a, is_causal=True))
    assert torch.equal(result.b, attention(two.b, two.b, two.b, is_causal=True))
