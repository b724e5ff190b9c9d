"""nn.Linear, its activation in one pass, and the choice between cvfast's product and torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cvfast
from cvfast import backend
from cvfast.backends.ext import linear as ext
from cvfast.functional import ACTIVATIONS
from cvfast.ops.conv2d import ONE_BY_ONE, conv2d_how
from cvfast.testing import assert_as_accurate


@pytest.fixture
def slow_mkl(monkeypatch):
    """As on a processor on which torch's product is slow: the rules of size decide."""
    monkeypatch.setattr(ext, "_INFERS_ON_MKL", False)
    monkeypatch.setattr(ext, "_TRAINS_ON_MKL", False)
    monkeypatch.setattr(ext, "_WEIGHT_GRADS_ON_MKL", False)
    monkeypatch.setattr(ext, "_LEAST_PRODUCTS", 2_000_000)
    monkeypatch.setattr(ext, "_LEAST_ROWS_TO_TRAIN", ext._LEAST_ROWS)


def chosen(*shape: int, outputs: int = 64, **more) -> str:
    layer, names = cvfast.nn.Linear(shape[-1], outputs, **more), []
    with backend.watch(lambda operator, module, args: names.append(backend.name_of(operator, module))):
        layer(torch.randn(shape, **more))
    return names[-1]


def test_large_products_in_float32_are_cvfasts(slow_mkl):
    assert chosen(1000, 64) == chosen(10, 100, 64) == "ext"
    assert chosen(10, 64) == chosen(15, 6400) == chosen(1000, 64, dtype=torch.float64) == "native"
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(1000, 64) == "native"


def test_few_rows_may_be_torchs_in_training_alone(slow_mkl, monkeypatch):
    monkeypatch.setattr(ext, "_LEAST_ROWS_TO_TRAIN", 1024)
    assert chosen(1000, 64) == "native" and chosen(1024, 64) == "ext"
    with torch.no_grad():
        assert chosen(1000, 64) == "ext"


def test_torchs_product_may_be_taken_in_training_alone(slow_mkl, monkeypatch):
    monkeypatch.setattr(ext, "_TRAINS_ON_MKL", True)
    assert chosen(1000, 64) == "native"
    with torch.no_grad():
        assert chosen(1000, 64) == "ext"


def test_without_vectors_of_32_bytes_torchs_product_is_taken(slow_mkl, monkeypatch):
    monkeypatch.setattr(ext, "_INFERS_ON_MKL", True)
    monkeypatch.setattr(ext, "_TRAINS_ON_MKL", True)
    assert chosen(1000, 64) == "native"
    with torch.no_grad():
        assert chosen(1000, 64) == "native"


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("name", ["ext", "native"])
def test_activation(activation, name):
    layer, x = cvfast.nn.Linear(40, 30), torch.randn(5, 7, 40)
    options = {"activation": activation, "negative_slope": 0.2, "backend": name}
    exact = ACTIVATIONS[activation](nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()), 0.2)
    with torch.no_grad():
        result = cvfast.functional.linear(x, layer.weight, layer.bias, **options)
    assert result.is_contiguous() and (result.double() - exact).abs().max() < 2e-6
    result = cvfast.functional.linear(x, layer.weight, layer.bias, **options)
    (grad,) = torch.autograd.grad(result.sum(), layer.weight)
    (expected,) = torch.autograd.grad(exact.sum(), layer.weight)
    assert (grad - expected).abs().max() < 1e-4


def test_beside_torchs_gradients_to_weights_many_rows_of_few_weights_are_cvfasts(slow_mkl, monkeypatch):
    monkeypatch.setattr(ext, "_WEIGHT_GRADS_ON_MKL", True)
    for rows, inputs, outputs, gains in (1536, 192, 192, True), (1535, 192, 192, False), (1536, 64, 64, False):
        assert ext.is_torchs(torch.empty(rows, inputs), torch.empty(outputs, inputs)) != gains
    assert ext.is_torchs(torch.empty(4096, 768), torch.empty(3072, 768))
    assert chosen(2000, 192, outputs=192) == "native"  # who watches sees torch's operator
    with torch.no_grad():
        assert chosen(2000, 192, outputs=192) == "ext"


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_training_with_torchs_product_for_the_weights_gradient(activation, slow_mkl, monkeypatch):
    """Gradients, also second ones, of ordinary calls and of rows that do not lie side by side."""
    monkeypatch.setattr(ext, "_WEIGHT_GRADS_ON_MKL", True)
    monkeypatch.setattr(ext, "_LEAST_PRODUCTS_BESIDE_MKL", 2_000_000)
    calls, kernel = [], ext.trained_linear
    monkeypatch.setattr(ext, "trained_linear", lambda *args: (calls.append(1), kernel(*args))[1])
    torch.manual_seed(0)
    x, weight, bias = torch.randn(64, 40, 50).transpose(0, 1), torch.randn(72, 50), torch.randn(72)
    grad = torch.randn(40, 64, 72)

    def derivatives(dtype, linear, needed):
        given = [t.to(dtype).requires_grad_(is_needed) for t, is_needed in zip((x, weight, bias), needed, strict=True)]
        output = linear(*given)
        first = torch.autograd.grad(output, [t for t in given if t.requires_grad], grad.to(dtype), create_graph=True)
        total = sum((g * g).sum() for g in first)
        inputs = [t for t in given if t.requires_grad]
        second = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else ()
        return [output, *first, *(s for s in second if s is not None)]

    def parts(*given):
        return ACTIVATIONS[activation](nn.functional.linear(*given), 0)

    for needed in (True, True, True), (False, True, True), (True, False, False), (True, True, False):
        results = derivatives(
            torch.float32, lambda *given: cvfast.functional.linear(*given, activation=activation), needed
        )
        exact = derivatives(torch.float64, parts, needed)
        assert len(results) == len(exact)
        for result, expected in zip(results, exact, strict=True):
            assert (result.double() - expected).norm() <= 2e-6 * expected.norm()
    assert len(calls) == 4

    def gradients(dtype, linear):  # which nobody differentiates: that to the input is a kernel's
        given = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(linear(*given).sin().sum(), given)

    own = gradients(torch.float32, lambda *given: cvfast.functional.linear(*given, activation=activation))
    for result, exact in zip(own, gradients(torch.float64, parts), strict=True):
        assert (result.double() - exact).norm() <= 3e-6 * exact.norm()


def test_unknown_activation():
    with pytest.raises(ValueError, match="linear: unknown activation 'swish'; allowed: none, relu"):
        cvfast.functional.linear(torch.zeros(2, 3), torch.zeros(4, 3), activation="swish")


def test_packed_weights_follow_every_change():
    layer, x = cvfast.nn.Linear(96, 80), torch.randn(50, 96)
    with torch.no_grad(), cvfast.use_backend("ext"):

        def check():
            exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
            for _ in range(3):  # the second call packs, the third reads
                assert_close(layer(x), exact)

        check()
        layer.weight.mul_(2)
        check()
        layer.weight.data = torch.randn(80, 96)
        check()
        layer.load_state_dict(nn.Linear(96, 80).state_dict())
        check()
        layer.weight = nn.Parameter(torch.randn(80, 96))
        check()


def assert_close(result, exact):
    assert (result.double() - exact).norm() <= 1e-6 * exact.norm()


class Mlp(nn.Sequential):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(nn.Linear(64, 128), activation, nn.Dropout(0.0), nn.Linear(128, 64))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=repr)
def test_accelerate_joins_a_layer_and_its_activation(activation, slow_mkl, monkeypatch):
    calls, kernel, plain = [], ext.linear_kernel, conv2d_how(*ONE_BY_ONE)
    monkeypatch.setattr(ext, "linear_kernel", lambda *args: (calls.append(args[3]), kernel(*args))[1])
    torch.manual_seed(0)
    model, x = Mlp(activation).eval(), torch.randn(4, 100, 64)
    exact = model.double()(x.double()).detach()
    model.float()
    state = model.state_dict()
    cvfast.accelerate(model, fuse=True)
    with torch.no_grad():
        for _ in range(3):
            assert_close(model(x), exact)
    assert len(calls) == 6 and sum(how != plain for how in calls) == 3
    seen = []
    handle = model[0].register_forward_hook(lambda *args: seen.append(1))  # somebody watches: the layers are called
    with torch.no_grad():
        assert_close(model(x), exact)
    handle.remove()
    assert seen == [1] and model.state_dict().keys() == state.keys()
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and model[0].weight.grad is not None
    assert type(cvfast.restore(model)[0]) is nn.Linear


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(64, 64), nn.Dropout(0.0)

    def forward(self, x, y):
        return y + self.dropout(self.layer(x))


@pytest.mark.parametrize("rows", [3, 200], ids=["torch's product", "cvfast's"])
def test_an_added_tensor_in_one_pass(rows, slow_mkl, monkeypatch):
    """Also behind dropout of nothing; tensors that are broadcast, gradients and changes give what the parts give."""
    model = Shortcut().eval()
    wide, calls = copy.deepcopy(model).double(), []
    cvfast.accelerate(model, fuse=True)
    run = ext.linear_kernel
    monkeypatch.setattr(ext, "linear_kernel", lambda *args: calls.append(args) or run(*args))
    x = torch.randn(4, rows, 64)

    def check(*shape: int) -> None:
        y = torch.randn(shape)
        exact = wide(x.double(), y.double()).detach()
        for _ in range(3):
            assert_close(model(x, y).detach(), exact)

    with torch.no_grad():
        check(4, rows, 64)
        added = [args for args in calls if len(args) == 7 and args[6] is not None]
        assert len(added) == (2 if rows == 200 else 0)  # the first call finds out
        for shape in ((rows, 64), (1, rows, 64), (64,), (4, 1, 64), (2, 4, rows, 64), (4, 1, rows, 64)):
            check(*shape)
        assert model(x, torch.randn(4, rows, 64, dtype=torch.float64)).dtype is torch.float64
    check(4, rows, 64)
    x.requires_grad_()
    y = torch.randn(4, rows, 64, requires_grad=True)
    grads = torch.autograd.grad(model(x, y).square().sum(), (x, y, *model.parameters()))
    exact = torch.autograd.grad(wide(x.double(), y.double()).square().sum(), (x, y, *wide.parameters()))
    for one, two in zip(grads, exact, strict=True):
        assert_close(one, two.double())
    with torch.no_grad():
        for drop in (model.dropout, wide.dropout):
            drop.p = 0.999
        check(4, rows, 64)  # in eval mode that is nothing, too
        model.train()
        assert (model(x, y) == y).float().mean() > 0.9
        model.eval().dropout.p = 0.0
        model.dropout.register_forward_hook(lambda module, args, output: output * 0)
        assert (model(x, y) == y).all()


def test_it_is_torchs_layer():
    ours, theirs = cvfast.nn.Linear(5, 3), nn.Linear(5, 3)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.Linear) and repr(ours) == repr(theirs)
    assert_as_accurate(ours(torch.ones(2, 5)), theirs(torch.ones(2, 5)), theirs.double()(torch.ones(2, 5).double()))


@pytest.mark.parametrize("rows", [3, 400], ids=["torch's product", "cvfast's"])
def test_a_prepared_call_follows_every_change(rows, slow_mkl):
    """The chain's calls after the first one, with what was found out then."""
    model, x = nn.Sequential(nn.Linear(64, 128), nn.GELU()).eval(), torch.randn(rows, 64)
    layer, gelu = model
    cvfast.accelerate(model, fuse=True)

    def check(x=x):
        exact = nn.functional.gelu(
            nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate=gelu.approximate
        )
        for _ in range(3):
            assert_close(model(x), exact)

    with torch.no_grad():
        check()
        layer.weight.mul_(2)
        check()
        layer.bias.data = torch.randn(128)
        check()
        layer.weight = nn.Parameter(torch.randn(128, 64))
        check()
        gelu.approximate = "tanh"
        check()
        check(x.view(1, rows, 64))
        check(torch.randn(64, rows).T)
        assert model(x[0]).shape == (128,) and model(x[:0]).shape == (0, 128)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            model(x[:, :63])
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
        handle = layer.register_forward_hook(lambda module, args, output: output * 0)
        assert not model(x).any()
        handle.remove()
        check()
    assert model(x).requires_grad
