"""accelerate: layers of a transformer's encoder as one call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cvfast
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
