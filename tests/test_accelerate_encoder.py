"""accelerate: layers of a transformer's encoder as one call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cvfast
from cvfast._accelerate.encoder import Halves
from cvfast.backends.ext import encoder, linear
from cvfast.models.vit import Encoder, EncoderBlock
from cvfast.ops.conv2d import ONE_BY_ONE, conv2d_how
from cvfast.ops.encoder import ENCODER, PREPARE_ENCODER
from cvfast.ops.sequence import SEQUENCE

WIDTH, HEADS, HIDDEN, LENGTH = 96, 3, 160, 90


@pytest.fixture(autouse=True)
def kernels_products(monkeypatch):
    """As on a processor on which cvfast's product is taken."""
    monkeypatch.setattr(linear, "_INFERS_ON_MKL", False)
    monkeypatch.setattr(linear, "_LEAST_PRODUCTS", 100_000)


@pytest.fixture
def calls(monkeypatch):
    """How many halves each of the kernels' calls took."""
    numbers, halves, prepare, run = [], {}, encoder.PREPARE_ENCODER, encoder.ENCODER

    def prepared(*args):
        result = prepare(*args)
        halves[result.data_ptr()] = len(args[3])
        return result

    monkeypatch.setattr(encoder, "PREPARE_ENCODER", prepared)
    monkeypatch.setattr(encoder, "ENCODER", lambda made, x: (numbers.append(halves[made.data_ptr()]), run(made, x))[1])
    return numbers


def make_block() -> EncoderBlock:
    torch.manual_seed(0)
    block = EncoderBlock(WIDTH, HEADS, HIDDEN, 0.0, 0.0).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block


BOTH = [2]


def test_a_layer_is_one_call_that_follow_every_change(calls):
    block, x = make_block(), torch.randn(2, LENGTH, WIDTH)
    wide = copy.deepcopy(block).double()
    cvfast.accelerate(block, fuse=True)

    def check(expected: list[int], x=x) -> None:
        wide.load_state_dict(block.state_dict())
        exact = wide(x.double()).detach()
        for _ in range(3):  # the first call finds out
            calls.clear()
            result = block(x)
            assert (result.double() - exact).norm() <= 2e-6 * exact.norm()
        assert calls == expected

    with torch.no_grad():
        check(BOTH)
        check(BOTH, x[:1])
        for parameter in block.parameters():
            parameter.mul_(1.1)
        check(BOTH)
        block.ln_1.weight = nn.Parameter(torch.randn(WIDTH))
        block.self_attention.in_proj_bias = None
        wide.self_attention.in_proj_bias = None
        check(BOTH)
        block.mlp[3].bias.data = torch.randn(WIDTH)
        check(BOTH)
        for one in (block, wide):
            one.ln_2.eps = 0.1
        check(BOTH)
        check([], torch.randn(LENGTH, 2, WIDTH).transpose(0, 1))  # not contiguous
        block.mlp[1].approximate = wide.mlp[1].approximate = "tanh"
        check(BOTH)
        for one in (block, wide):
            one.ln_2.weight = None
        check([])
    check([])  # with gradients
    block(x).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("name", ["ln_1", "self_attention", "ln_2", "mlp.0", "mlp.1", "mlp.3"])
def test_who_watches_a_layer_sees_it(name, calls):
    block, x, seen = make_block(), torch.randn(2, LENGTH, WIDTH), []
    cvfast.accelerate(block, fuse=True)
    with torch.no_grad():
        expected = [block(x) for _ in range(2)][-1]
        handle = block.get_submodule(name).register_forward_hook(lambda *args: seen.append(1))
        calls.clear()
        assert torch.allclose(block(x), expected, atol=1e-5) and seen == [1]
        assert not calls
        handle.remove()
        block(x), block(x), calls.clear(), block(x)
        assert calls == BOTH
        with nn.modules.module.register_module_forward_hook(lambda *args: seen.append(2)):
            calls.clear()
            block(x)
        assert not calls and seen.count(2) > 5


def test_a_named_backend_and_transforms_see_the_layers(calls):
    block, x = make_block(), torch.randn(2, LENGTH, WIDTH)
    cvfast.accelerate(block, fuse=True)
    with torch.no_grad():
        expected = [block(x) for _ in range(2)][-1]
        calls.clear()
        with cvfast.use_backend("native"):
            assert torch.allclose(block(x), expected, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype is not None
        assert torch.allclose(torch.func.vmap(block)(x[None])[0], expected, atol=1e-5)
        assert not calls
        block.double()
        assert block(x.double()).dtype is torch.float64 and not calls


def test_halves_of_the_encoder_are_found_in_the_model_around_it(calls):
    torch.manual_seed(0)
    model = Encoder(LENGTH, WIDTH, 0.0, [make_block() for _ in range(3)]).eval()
    wide, x = copy.deepcopy(model).double(), torch.randn(2, LENGTH, WIDTH)
    cvfast.accelerate(model, fuse=True)
    with torch.no_grad():
        model(x), calls.clear()
        exact = wide(x.double())
        assert (model(x).double() - exact).norm() <= 2e-6 * exact.norm()
    assert calls == [6]


class Other(EncoderBlock):
    """Where something lies between a norm and the sum, which might change the input."""

    def forward(self, x):
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x.mul_(2)
        x = x + y
        y = self.ln_2(x)
        return x + self.mlp(y) + y


def test_what_is_no_half_stays_as_it_is(calls):
    block = make_block()
    block.__class__ = Other
    wide, x = copy.deepcopy(block).double(), torch.randn(2, LENGTH, WIDTH)
    cvfast.accelerate(block, fuse=True)
    with torch.no_grad():
        exact = wide(x.double())
        for _ in range(3):
            assert (block(x.clone()).double() - exact).norm() <= 2e-6 * exact.norm()
    assert not calls


@pytest.mark.parametrize("size", [1, 7, 16, 100, 192, 1000])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_layer_norm(size, shift):
    """By an mlp whose products change nothing."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(40, size) + shift, torch.randn(size), torch.randn(size)
    one = torch.eye(size)
    result = encoder_mlp(x, weight, bias, one)
    exact = nn.functional.layer_norm(x.double(), (size,), weight.double(), bias.double(), 1e-6)
    torchs = nn.functional.layer_norm(x, (size,), weight, bias, 1e-6)
    allowed = 2 * (torchs - exact).abs().max() + 1e-6 * (1 + shift)
    assert (result - x - exact).abs().max() <= allowed


def encoder_mlp(x, weight, bias, matrix):
    how = conv2d_how(*ONE_BY_ONE, "none", "none")
    return ENCODER(PREPARE_ENCODER([weight, bias, matrix, None, matrix, None], [None, None], [1e-6], [0], [how]), x)


def test_only_what_was_prepared_is_run():
    w, m = torch.ones(8), torch.eye(8)
    made = PREPARE_ENCODER(
        [w, w, m, None, m, None], [None, None], [1e-6], [0], [conv2d_how(*ONE_BY_ONE, "none", "none")]
    )
    for other in (made.clone(), made[:8], torch.zeros(1)):
        with pytest.raises(RuntimeError, match="no encoder that was prepared"):
            ENCODER(other, torch.ones(2, 8))
        with pytest.raises(RuntimeError, match="no sequence that was prepared"):
            SEQUENCE(other, [torch.ones(1, 1, 1, 1)])
    with pytest.raises(RuntimeError, match="no sequence that was prepared"):
        SEQUENCE(made, [torch.ones(1, 1, 1, 1)])


def test_what_does_not_fit_is_refused():
    x, w, m = torch.randn(4, 8), torch.ones(8), torch.randn(8, 8)
    for args in (
        (x, w[:7], w, m),
        (x, w.double(), w, m),
        (x.T, w[:4], w[:4], m),
        (x, w, w, m[:, :7]),
        (x[:0], w, w, m),
    ):
        with pytest.raises(RuntimeError, match="cvfast encoder"):
            encoder_mlp(*args)


class Tokens(nn.Module):
    """Reads `read(results)` of an encoder's results."""

    def __init__(self, read, batch_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [EncoderBlock(WIDTH, HEADS, HIDDEN, 0.0, dropout) for _ in range(2)]
        self.encoder, self.head, self.read = Encoder(LENGTH, WIDTH, 0.0, blocks), nn.Linear(WIDTH, 5), read
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.1 if "weight" in name else 0.3)
        for block in blocks:
            block.self_attention.batch_first = batch_first


class First(Tokens):
    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])


class Second(Tokens):
    def forward(self, x):
        return self.head(self.encoder(x)[:, 1])


class FirstAndMean(Tokens):
    def forward(self, x):
        y = self.encoder(x)
        return self.head(y[:, 0] + y.mean(1))


@pytest.fixture
def results(monkeypatch):
    """The positions of the results of each row of halves."""
    sizes, call = [], Halves.__call__

    def watched(self, input):
        output = call(self, input)
        sizes.append(output.shape[1])
        return output

    monkeypatch.setattr(Halves, "__call__", watched)
    return sizes


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("model, kept", [(First, 1), (Second, LENGTH), (FirstAndMean, LENGTH)])
def test_positions_that_nobody_reads_are_left_out(model, kept, train, results):
    model = model(None).train(train)
    wide, x = copy.deepcopy(model).double(), torch.randn(3, LENGTH, WIDTH)
    cvfast.accelerate(model, fuse=True)
    for grad in (False, False, False, True):
        given, exact = x.clone().requires_grad_(grad), x.double().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            result, expected = model(given), wide(exact)
        assert (result.double() - expected).norm() <= 2e-6 * expected.norm()
    assert results == [kept] * 4
    own, others = [given, *model.parameters()], [exact, *wide.parameters()]
    gradients = [torch.autograd.grad(r.sin().sum(), t) for r, t in ((result, own), (expected, others))]
    for gradient, exact in zip(*gradients, strict=True):
        assert (gradient.double() - exact).norm() <= 1e-5 * exact.norm() + 1e-6  # keys' biases have none


def test_positions_are_not_left_out_where_somebody_would_see_it(results):
    model, x, seen = First(None), torch.randn(3, LENGTH, WIDTH), []
    cvfast.accelerate(model, fuse=True)

    def sizes() -> list[int]:
        results.clear()
        with torch.no_grad():
            model(x), model(x)
        model(x)
        return results[:]

    assert sizes() == [1] * 3
    for name in ("ln_2", "self_attention", "mlp.0", "mlp.1"):
        layer = model.encoder.layers[1].get_submodule(name)
        handle = layer.register_forward_hook(lambda *args: seen.append(args[1][0].shape[1]))
        sizes()
        assert set(seen) == {LENGTH}
        handle.remove()
        seen.clear()
    assert sizes() == [1] * 3
    with nn.modules.module.register_module_forward_hook(lambda *args: None):
        sizes()
        assert 1 not in results


@pytest.mark.parametrize("options", [{"batch_first": False}, {"dropout": 0.2}], ids=repr)
def test_positions_that_another_order_or_dropout_needs_are_not_left_out(options, results):
    model, x = First(None, **options).train(), torch.randn(3, LENGTH, WIDTH)
    plain = copy.deepcopy(model)
    cvfast.accelerate(model, fuse=True)
    torch.manual_seed(1)
    result = model(x)
    assert results == [LENGTH]
    torch.manual_seed(1)
    assert torch.allclose(result, plain(x), atol=1e-4)
