"""accelerate() and restore(): the same model, its own numbers, and back again; override(), explain() and tune()."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from typer.testing import CliRunner

import cvfast
from cvfast import _choices, _env, _packed, backend
from cvfast._accelerate import chains, measure
from cvfast.backends.ext import conv2d
from cvfast.cli import app
from cvfast.models import create_model, example_inputs
from cvfast.testing.accuracy import relative_error

NEAR = 2e-6  # relative L2 error in float32 of a few layers, Winograd's included


class Block(nn.Module):
    """A residual block as torchvision writes it, with what makes batch-norm more than the identity."""

    def __init__(self, channels=16, activation=None, shortcut=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = activation or nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if shortcut else None
        )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def lively(model, mode=False):
    """The model with batch-norm that changes numbers, in the given mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.train(mode)


def everything():
    """One of each layer that is swapped, used one after the other."""

    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.lstm, self.gru, self.rnn = nn.LSTM(12, 8), nn.GRU(8, 8, bidirectional=True), nn.RNN(16, 8)
            self.cells = nn.ModuleList([nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)])
            self.attention = nn.MultiheadAttention(8, 2)
            self.head, self.end = nn.Linear(8, 2), nn.Softmax(-1)

        def forward(self, x):
            x = self.up(self.conv(x)).flatten(0, 1)
            for layer in (self.lstm, self.gru, self.rnn):
                x, _ = layer(x)
            x, _ = self.attention(x, x, x, need_weights=False)
            x, _ = self.cells[0](x[-1])
            return self.end(self.head(self.cells[2](self.cells[1](x))))

    torch.manual_seed(0)
    return Everything()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
PICTURE = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(1))


def types(model):
    return [type(module) for module in model.modules()]


def exact(model, *inputs):
    """The float64 result of a copy on torch's operators."""
    twin = cvfast.restore(copy.deepcopy(model)).double()
    with torch.no_grad():
        return twin(*(x.double() for x in inputs))


def error(actual, expected):
    return relative_error(actual.detach(), expected)


def fused(model):
    """Module name -> its chains, as text."""
    plans = {name: m.__dict__.get("_cvfast_plan") for name, m in model.named_modules()}
    return {name: [str(c) for c in plan.chains] for name, plan in plans.items() if plan is not None}


def test_layers_become_cvfasts_and_torchs_again():
    model = everything()
    expected, before = exact(model, X), types(model)
    state, dictionary = {k: v.data_ptr() for k, v in model.state_dict().items()}, model.attention.__dict__.copy()
    text = repr(model)
    assert cvfast.accelerate(model) is model
    swapped = [m for m in model.modules() if type(m).__module__ == "cvfast._accelerate.layers"]
    assert len(swapped) == 10 and all(isinstance(m, getattr(cvfast.nn, type(m).__name__)) for m in swapped)
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state and repr(model) == text
    assert error(model(X).detach(), expected) < NEAR
    assert cvfast.restore(model) is model
    assert types(model) == before and model.attention.__dict__ == dictionary


def test_it_runs_cvfasts_kernels():
    model = cvfast.accelerate(everything())
    with torch.profiler.profile() as profile:
        model(X)
    ran = {event.key for event in profile.key_averages()}
    operators = ("conv2d_epilogue", "conv_transpose2d", "lstm", "gru", "rnn_tanh", "attention", "lstm_cell", "gru_cell")
    assert {f"cvfast_kernels::{name}" for name in operators} <= ran


def test_the_model_itself_may_be_a_layer():
    layer = nn.Conv2d(3, 4, 3)
    assert type(cvfast.accelerate(layer)) is not nn.Conv2d and type(cvfast.restore(layer)) is nn.Conv2d


@pytest.mark.parametrize("make", [everything, lambda: Block()])
def test_a_copy_leaves_the_model_alone_and_shares_what_it_learns(make):
    model = make()
    before = types(model)
    twin = cvfast.accelerate(model, copy=True)
    assert types(model) == before and types(twin) != before
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(twin, kind)()), dict(getattr(model, kind)())
        assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in theirs)
    assert not set(twin.modules()) & set(model.modules())


@torch.no_grad()
def test_a_fused_copy_sees_what_the_model_learns():
    model = lively(Block())
    twin = cvfast.accelerate(model, copy=True, fuse=True)
    for _ in range(3):
        before = twin(PICTURE)
    model.conv1.weight.add_(0.5)
    model.bn1.running_var.mul_(3)
    assert error(before, exact(model, PICTURE)) > 1e-3
    assert error(twin(PICTURE), exact(model, PICTURE)) < NEAR
    assert error(model(PICTURE), exact(model, PICTURE)) < NEAR


def test_cvfasts_own_layers_stay_when_it_restores():
    model = nn.Sequential(cvfast.nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    cvfast.restore(cvfast.accelerate(cvfast.accelerate(model)))
    assert types(model)[1:] == [cvfast.nn.Conv2d, nn.Conv2d]


def test_subclasses_and_replaced_forwards_are_not_swapped():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Own(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].forward = lambda x: x
    before, expected = types(model), model(X)
    cvfast.accelerate(model)
    assert types(model) == before and torch.equal(model(X), expected)


@torch.no_grad()
def test_subclasses_without_code_of_their_own_stay_torchs():
    class Same(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

    class Scores(nn.Linear):
        pass

    model = lively(nn.Sequential(Same(3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), Scores(192, 4)))
    before, expected = types(model), model(X)
    cvfast.accelerate(model)
    assert types(model) == before and torch.equal(model(X), expected)
    rows = {row.name: row for row in cvfast.explain(model, X).rows}
    for name, cls in {"0": "Same", "4": "Scores"}.items():
        assert (rows[name].type, rows[name].backend) == (cls, "torch")
        assert rows[name].reason == f"{cls} is not one of torch's layers that cvfast has, but a class of its own"


def test_every_kind_of_hook_still_runs():
    layer, seen = nn.Conv2d(3, 4, 3), []
    layer.register_forward_pre_hook(lambda m, a: seen.append("forward_pre"))
    layer.register_forward_hook(lambda m, a, o: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda m, g: seen.append("backward_pre"))
    layer.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    layer.register_state_dict_pre_hook(lambda *a: seen.append("state_dict_pre"))
    layer.register_load_state_dict_post_hook(lambda *a: seen.append("load_state_dict_post"))
    for change in (cvfast.accelerate, cvfast.restore):
        seen.clear()
        change(layer)(X.clone().requires_grad_()).sum().backward()
        layer.load_state_dict(layer.state_dict())
        assert seen == ["forward_pre", "forward", "backward_pre", "backward", "state_dict_pre", "load_state_dict_post"]


def test_tied_weights_shared_modules_and_references():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    model.append(model[0])
    held = model[0]
    cvfast.accelerate(model)
    assert model[0] is held is model[2] and model[0].weight is model[1].weight
    expected = exact(model, PICTURE[:, :4])
    assert error(model(PICTURE[:, :4]), expected) < NEAR
    cvfast.restore(model)
    assert types(model)[1:] == [nn.Conv2d] * 2


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        torch.nn.utils.spectral_norm,
        pytest.param(torch.nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")),
    ],
    ids=lambda wrap: f"{wrap.__module__.split('.')[-1]}.{wrap.__name__}",
)
def test_parametrizations_stay(wrap):
    torch.manual_seed(0)
    layer = wrap(nn.Conv2d(3, 8, 3)).eval()
    cls, expected, keys = type(layer), layer(X), list(layer.state_dict())
    cvfast.accelerate(layer)
    assert isinstance(layer, cvfast.nn.Conv2d) and list(layer.state_dict()) == keys
    torch.testing.assert_close(layer(X), expected)
    if parametrize.is_parametrized(layer):  # torch cannot copy the others
        torch.testing.assert_close(copy.deepcopy(layer)(X), expected)
    layer(X).sum().backward()
    cvfast.restore(layer)
    assert type(layer) is cls and torch.equal(layer(X), expected)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrizations_that_come_and_go_meanwhile():
    """Registered or removed while the layer is cvfast's; a copy made before keeps its own."""
    layer = parametrize.register_parametrization(nn.Conv2d(3, 4, 3), "weight", Doubled())
    twin, expected = copy.deepcopy(layer), layer(X)
    cvfast.accelerate(layer)
    parametrize.register_parametrization(layer, "bias", Doubled())
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(twin(X), expected) and type(twin).__bases__ == (nn.Conv2d,)
    cvfast.restore(layer)
    assert type(layer).__bases__ == (nn.Conv2d,) and parametrize.is_parametrized(layer, "bias")
    torch.testing.assert_close(layer(X), twin(X) + layer.bias.view(-1, 1, 1) / 2)
    parametrize.remove_parametrizations(cvfast.accelerate(layer), "bias")
    assert type(cvfast.restore(layer)) is nn.Conv2d


def test_wrong_arguments():
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got Tensor"):
        cvfast.accelerate(X)


# Fusion


def test_fusion_is_the_default_without_gradients_in_eval_mode():
    assert fused(cvfast.accelerate(Block().eval())) == {}
    with torch.no_grad():
        assert fused(cvfast.accelerate(Block())) == {}
        assert fused(cvfast.accelerate(Block().eval(), fuse=False)) == {}
        model = cvfast.accelerate(Block().eval())
    assert fused(model) == {"": ["conv1 + bn1 + relu", "conv2 + bn2 + add + relu"]}
    assert fused(cvfast.accelerate(model)) == {}


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh(),
    nn.Hardswish(), nn.Hardsigmoid(),
]  # fmt: skip


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.Softplus()], ids=repr)
@pytest.mark.parametrize("shortcut", [False, True])
def test_residual_blocks(activation, shortcut):
    model = lively(Block(activation=activation, shortcut=shortcut))
    expected, before, keys = exact(model, PICTURE), types(model), list(model.state_dict())
    cvfast.accelerate(model, fuse=True)
    known = activation in ACTIVATIONS
    first, second = "conv1 + bn1", "conv2 + bn2"
    if known or not shortcut:  # what an unknown activation gives might be changed before the sum
        second += " + add"
    third = ["downsample.0 + downsample.1"] * shortcut
    assert fused(model)[""] == [first + " + relu" * known, second + " + relu" * known, *third]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert error(model(PICTURE), expected) < NEAR
    assert list(model.state_dict()) == keys
    cvfast.restore(model)
    assert types(model) == before and "_cvfast_plan" not in model.__dict__


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("convolution", [nn.Conv2d, nn.ConvTranspose2d, "reflect"])
def test_sequential(convolution, affine, groups):
    options = {"padding_mode": convolution, "padding": 1} if convolution == "reflect" else {}
    cls = nn.Conv2d if options else convolution
    layers = [cls(16, 8, 3, groups=groups, **options), nn.BatchNorm2d(8, affine=affine), nn.LeakyReLU(0.2, True)]
    model = lively(nn.Sequential(*layers, nn.MaxPool2d(2)))
    expected = exact(model, PICTURE)
    cvfast.accelerate(model, fuse=True)
    assert fused(model) == {"": ["0 + 1 + 2 + 3"]}
    with torch.no_grad():
        assert error(model(PICTURE), expected) < NEAR
        assert error(model.to(memory_format=torch.channels_last)(PICTURE), expected) < NEAR


def test_gradients_are_those_of_the_separate_layers():
    model, x = lively(Block()), PICTURE.double().requires_grad_()
    model.double()
    wanted = torch.autograd.grad(model(x).sin().sum(), (x, *model.parameters()))
    cvfast.accelerate(model, fuse=True)
    torch.testing.assert_close(torch.autograd.grad(model(x).sin().sum(), (x, *model.parameters())), wanted)


def trained(model, steps=2):
    """The state after some steps, the last one's result and gradients."""
    model.train()
    for _ in range(steps):
        model.zero_grad()
        result = model(PICTURE)
        result.square().mean().backward()
    return [result.detach(), *[p.grad for p in model.parameters()], *model.state_dict().values()]


def chosen(model):
    """The operators that a step chose backends for, in order."""
    operators = []
    with backend.watch(lambda operator, *_: operators.append(operator)):
        trained(model, 1)
    return operators


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("fused_in_training", [False, True])
def test_batch_norm_that_trains_takes_along_what_follows(activation, fused_in_training):
    model = lively(Block(activation=activation, shortcut=True), fused_in_training)
    twin = copy.deepcopy(model)
    cvfast.accelerate(model, fuse=True)
    for actual, wanted in zip(trained(model), trained(twin), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
    model.eval(), twin.eval()
    with torch.no_grad():
        assert error(model(PICTURE), twin(PICTURE)) < 1e-5
    assert chosen(model).count("batch_norm") == 3


@pytest.mark.parametrize("pooling", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(2, ceil_mode=True)], ids=repr)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("size", [3, 4])
def test_pooling_behind_batch_norm_that_trains(pooling, options, size):
    layers = [nn.Conv2d(16, 8, size), nn.BatchNorm2d(8, **options), nn.ReLU(inplace=True), pooling]
    model = lively(nn.Sequential(*layers))
    twin = copy.deepcopy(model)
    cvfast.accelerate(model, fuse=True)
    for actual, wanted in zip(trained(model), trained(twin), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
    assert "batch_norm" in chosen(model)


def test_batch_norm_that_trains_alone():
    """Where it is torch's: watched, in another dtype or backend, and without a pixel too many."""
    model = cvfast.accelerate(lively(Block(), True), fuse=True)
    with cvfast.use_backend("native"):
        assert "batch_norm" not in chosen(model)
    handle = model.bn1.register_forward_hook(lambda *_: None)
    assert chosen(model).count("batch_norm") == 1
    handle.remove()
    layer = cvfast.accelerate(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), fuse=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3, 1, 1))
    doubled = layer.double()(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert doubled.dtype is torch.float64


def changed_weight(model):
    model.conv1.weight.mul_(2)


def swapped_data(model):
    model.conv1.weight.data = model.conv1.weight.data * 2


def data_in_place(model):
    model.conv1.weight.data.mul_(2)


def averaged_by_data(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(tensor * 0.5)


def by_numpy(model):
    model.bn1.running_mean.numpy()[:] += 1


def new_parameter(model):
    model.conv1.weight = nn.Parameter(model.conv1.weight * 2)


def loaded(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def other_statistics(model):
    model.bn1.running_var.mul_(3)


def other_eps(model):
    model.bn1.eps = 0.5


def hook(model):
    model.conv1.register_forward_hook(lambda m, args, output: output * 2)


def pre_hook(model):
    model.bn2.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def replaced_layer(model):
    model.conv2 = nn.Conv2d(16, 16, 1)


def other_options(model):
    model.conv1.padding, model.conv1.dilation = (2, 2), (2, 2)


def no_norm(model):
    model.bn1 = nn.Identity()


def a_shortcut(model):
    model.downsample = nn.Conv2d(16, 16, 1)


def parametrized(model):
    parametrize.register_parametrization(model.conv1, "weight", Doubled())


def norm_in_training(model):
    model.bn1.train().momentum = None


def cast(model):
    model.half().float()


CHANGES = [
    changed_weight, swapped_data, data_in_place, averaged_by_data, by_numpy, new_parameter, loaded, other_statistics,
    other_eps, other_options, hook, pre_hook, replaced_layer, no_norm, a_shortcut, parametrized, norm_in_training, cast,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_after_fusion_are_seen(change):
    model = lively(Block())
    cvfast.accelerate(model, fuse=True)
    for _ in range(3):  # at the third one the chains are one call
        before = model(PICTURE)
    change(model)
    expected = exact(model, PICTURE)
    output = model(PICTURE)
    assert error(output, expected) < NEAR
    assert error(before, expected) > 1e-3 or change is cast


@torch.no_grad()
def test_nested_modules_are_part_of_the_graph_while_nobody_watches_them():
    """A sum across modules is fused; a hook, another forward or class of a module within it is seen."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()))
            self.inner.append(nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)))

        def forward(self, x):
            return x + self.inner(x)

    class Reversed(nn.Sequential):
        def forward(self, x):
            return -super().forward(x)

    model = lively(nn.Sequential(Around(), Around()))
    cvfast.accelerate(model, fuse=True)
    first, second = "inner.0.0 + inner.0.1 + inner.0.2", "inner.1.0 + inner.1.1 + add"
    chains = [
        " + ".join(f"{i}.{p}" if p != "add" else p for p in c.split(" + ")) for i in "01" for c in (first, second)
    ]
    assert fused(model)[""] == chains and fused(model)["0"] == [first, second]
    inner = model[0].inner[1]
    before = model(PICTURE)
    torch.testing.assert_close(before, exact(model, PICTURE).float(), rtol=1e-4, atol=1e-4)
    seen = []
    handle = inner.register_forward_hook(lambda m, args, output: seen.append(output) or output * 2)
    for _ in range(2):
        assert error(model(PICTURE), exact(model, PICTURE)) < NEAR
    assert len(seen) == 4 and error(model(PICTURE), before) > 1e-3
    handle.remove()
    with_global = torch.nn.modules.module.register_module_forward_hook(lambda m, args, output: seen.append(m))
    seen.clear()
    model(PICTURE)
    with_global.remove()
    assert inner in seen and model[1].inner[0] in seen
    inner.__class__ = Reversed
    assert error(model(PICTURE), before) > 1e-3
    inner.__class__ = nn.Sequential
    inner.forward = lambda x: x
    assert error(model(PICTURE), before) > 1e-3


def test_hooks_of_blocks_and_layers_see_what_they_saw():
    """A hook on a block that holds chains, and hooks on a chain's layers: the same values as without fusion."""
    model = lively(nn.Sequential(Block(), Block()))
    cvfast.accelerate(model, fuse=True)
    seen = []
    for name in ("0", "1.conv1", "1.bn2"):
        model.get_submodule(name).register_forward_hook(lambda m, a, output: seen.append(output.clone()))
    with torch.no_grad():
        model(PICTURE)
        first, seen = seen, []
        cvfast.restore(model)(PICTURE)
    assert len(first) == 3
    torch.testing.assert_close(first, seen, rtol=1e-4, atol=1e-4)


class Shape(nn.Module):
    """What keeps chains from being fused: `forward` is given by the test."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)
        self.kept, self.flag, self.table = [], True, {}
        self.function = forward


class UsedTwice(Shape):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class TwoEnds(nn.Module):
    """Chains in a row whose results others see, too: of the first and of the third."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.BatchNorm2d(16))
            for groups in (1, 16, 1, 4)
        )

    def forward(self, x):
        first = torch.relu(self.layers[0](x))
        second = torch.relu(self.layers[1](first))
        third = torch.relu(self.layers[2](second) + first)
        return torch.relu(self.layers[3](third)), third.sigmoid(), first.sigmoid()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_chains_in_a_row_are_one_call(memory_format, monkeypatch):
    """With the same bits, whoever else sees results between; and separately where there are gradients or errors."""
    model, calls, lengths = lively(TwoEnds()), [], {}
    prepare, run = conv2d.PREPARE_SEQUENCE, conv2d.SEQUENCE

    def prepared(weights, *others):
        result = prepare(weights, *others)
        lengths[result.data_ptr()] = len(weights)
        return result

    def counted(result, inputs):
        calls.append(lengths[result.data_ptr()])
        return run(result, inputs)

    monkeypatch.setattr(conv2d, "PREPARE_SEQUENCE", prepared)
    monkeypatch.setattr(conv2d, "SEQUENCE", counted)
    cvfast.accelerate(model, fuse=True)
    for picture in (PICTURE, PICTURE[:, :, :7]):
        x = picture.contiguous(memory_format=memory_format)
        expected = model(x)
        model(x)
        calls.clear()
        results = [model(x) for _ in range(2)]
        assert calls == [2, 2] and all(torch.equal(a, b) for r in results for a, b in zip(r, expected, strict=True))
    with torch.enable_grad():
        assert model(x)[0].requires_grad and calls == [2, 2]
    with pytest.raises(RuntimeError, match="channels"):
        model(x[:, :15])


@torch.no_grad()
def test_chains_in_a_row_pack_freed_weights_again():
    model = lively(nn.Sequential(*(nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)) for _ in range(2))))
    cvfast.accelerate(model, fuse=True)
    x = torch.randn(1, 64, 8, 8)
    expected = [model(x) for _ in range(3)][0]
    weights = [weight for i in range(2) for weight in chains.folded(model[i][0])]
    kept = _packed.packed_bytes(weights)
    _packed.free(weights)
    assert kept > 0 and _packed.packed_bytes(weights) == 0
    assert all(torch.equal(model(x), expected) for _ in range(3)) and _packed.packed_bytes(weights) == kept


class Elsewhere(Shape):
    def forward(self, x):
        y = self.conv(x)
        x = F.relu(x, inplace=True)
        return self.bn(y) + x


class Asks(Shape):
    def forward(self, x):
        return self.bn(self.conv(x)) if x.shape[0] > 1 else self.conv(x)


class AsksTensors(Shape):
    def forward(self, x):
        return self.bn(self.conv(x)) if self.bn.weight is not None and self.bn.eps < self.bn.momentum else x


class AsksOneOfItsTensors(Shape):
    def __init__(self, forward):
        super().__init__(forward)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.scale > 0:
            x = x * self.scale
        return x


class ComparesInVain(Shape):
    def forward(self, x):
        if self.flag or self.flag < "one":
            return self.bn(self.conv(x))
        return x


class AsksForNothing(Shape):
    def forward(self, x, mask=None):
        y = self.bn(self.conv(x))
        return y if mask is None else y * mask


class Keeps(Shape):
    def forward(self, x):
        x = self.bn(self.conv(x))
        self.kept.append(x)
        return x


class Sets(Shape):
    def forward(self, x):
        self.last = self.conv(x)
        return self.bn(self.last)


class Random(Shape):
    def forward(self, x):
        return self.bn(self.conv(x)) + torch.rand(1)


class Context(Shape):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x)
        return self.bn(x)


class Unread(Shape):
    forward = eval("lambda self, x: self.bn(self.conv(x))")


class Decorated(Shape):
    @torch.no_grad()
    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("cls", "expected_chains"),
    [
        (UsedTwice, None), (Elsewhere, ["conv + bn"]), (Asks, None), (AsksForNothing, None),
        (AsksTensors, ["conv + bn"]), (AsksOneOfItsTensors, None), (ComparesInVain, None), (Keeps, None),
        (Sets, None), (Random, None), (Context, None), (Unread, None), (Decorated, None),
    ],
)  # fmt: skip
def test_what_is_not_proved_is_not_fused(cls, expected_chains):
    torch.manual_seed(0)
    model = lively(cls(None))
    expected = exact(model, PICTURE.clone())
    cvfast.accelerate(model, fuse=True)
    assert fused(model) == ({} if expected_chains is None else {"": expected_chains})
    if cls is not Random:
        with torch.no_grad():
            assert error(model(PICTURE.clone()), expected) < NEAR


@torch.no_grad()
def test_parts_of_a_model_that_is_not_proved_are_fused():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.blocks = nn.ModuleList([Block(), Block(shortcut=True)])

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x) if x.mean() > 0 else -x
            return x

    torch.manual_seed(0)
    model = lively(Root())
    expected = exact(model, PICTURE)
    cvfast.accelerate(model)
    assert "" not in fused(model) and fused(model).keys() >= {"stem", "blocks.0", "blocks.1"}
    assert error(model(PICTURE), expected) < NEAR
    explanation = cvfast.explain(model, PICTURE)
    assert "x.mean()" in explanation.notes[""]
    assert [(row.name, row.backend, row.fused) for row in explanation.rows] == [
        ("stem.0", "ext", "stem.1 + stem.2"),
        ("blocks.0.conv1", "ext", "blocks.0.bn1 + blocks.0.relu"),
        ("blocks.0.conv2", "ext", "blocks.0.bn2 + add + blocks.0.relu"),
        ("blocks.1.conv1", "ext", "blocks.1.bn1 + blocks.1.relu"),
        ("blocks.1.downsample.0", "ext", "blocks.1.downsample.1"),
        ("blocks.1.conv2", "ext", "blocks.1.bn2 + add + blocks.1.relu"),
    ]


class Pools(nn.Module):
    """Pooling of 2x2 pixels in all its spellings, each after a convolution."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))
        self.bn, self.relu = nn.BatchNorm2d(16), nn.ReLU()
        self.max, self.average = nn.MaxPool2d(2), nn.AvgPool2d((2, 2), stride=2)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=3)
        x = self.max(self.relu(self.bn(self.convs[0](x))))
        x = F.max_pool2d(torch.tanh(self.convs[1](x)), (2, 2), stride=2)
        x = F.avg_pool2d(self.convs[2](x) + x, 2)
        return self.average(self.convs[3](x))


class PoolsOtherwise(nn.Module):
    """Pooling that no chain can have: other windows, ceil_mode, indices, two users."""

    def __init__(self):
        super().__init__()
        self.conv, self.max = nn.Conv2d(16, 16, 1), nn.MaxPool2d(2, ceil_mode=True)
        self.indices, self.average = nn.MaxPool2d(2, return_indices=True), nn.AvgPool2d(2, divisor_override=3)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x), 2, stride=1) + self.max(self.conv(F.pad(x, (5, 5, 5, 5))))
        x = (
            self.average(self.conv(x))
            + F.max_pool2d(self.conv(x), 2, 2, 1)[..., :5, :5]
            + self.indices(self.conv(x))[0]
        )
        y = self.conv(x)
        return F.max_pool2d(y, 2), y


@torch.no_grad()
def test_pooling_is_fused():
    model = lively(Pools())
    expected = exact(model, PICTURE)
    cvfast.accelerate(model, fuse=True)
    chains_found = [
        "convs.0 + bn + relu + max",
        "convs.1 + (tanh) + (max)",
        "convs.2 + add + (average)",
        "convs.3 + average",
    ]
    assert fused(model) == {"": chains_found}
    assert error(model(PICTURE), expected) < NEAR
    assert [row.fused for row in cvfast.explain(model, PICTURE).rows] == [
        "bn + relu + max", "tanh + max", "add + average", "average",
    ]  # fmt: skip
    seen = []
    hook = model.max.register_forward_hook(lambda *_: seen.append(1))
    assert error(model(PICTURE), expected) < NEAR and seen == [1]
    hook.remove()
    model.max.stride = 1  # no longer what a chain knows: the layers run one by one
    assert error(model(PICTURE), exact(model, PICTURE)) < NEAR


@torch.no_grad()
def test_other_pooling_is_not_fused():
    model = PoolsOtherwise().eval()
    expected = model(PICTURE)
    cvfast.accelerate(model, fuse=True)
    assert fused(model) == {}
    torch.testing.assert_close(model(PICTURE), expected)


class PoolsAll(nn.Module):
    """Average pooling of whole images behind a chain."""

    def __init__(self, size=1):
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.AdaptiveAvgPool2d(size)

    def forward(self, x):
        return torch.flatten(self.pool(self.bn(self.conv(x))), 1)


@pytest.mark.parametrize("size", [1, (1, 1), 2, (1, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_of_whole_images(size, memory_format):
    model = lively(PoolsAll(size))
    x = torch.randn(2, 3, 9, 8).to(memory_format=memory_format)
    expected = exact(model, x)
    cvfast.accelerate(model, fuse=True)
    assert error(model(x), expected) < NEAR
    with torch.no_grad():
        assert error(model(x), expected) < NEAR and error(model(x[:1]), expected[:1]) < NEAR
        seen = []
        hook = model.pool.register_forward_hook(lambda *_: seen.append(1))
        assert error(model(x), expected) < NEAR and seen == [1]
        hook.remove()
        model.pool.output_size = 3
        assert error(model(x), exact(model, x)) < NEAR


class Asked(Shape):
    def forward(self, x):
        x = self.run(x)
        if self.flag:
            return torch.relu(x)
        return x

    def run(self, x):
        return self.bn(self.conv(x))


class OwnNumber(Shape):
    """A parameter of its own and a number read from a buffer, anew at each call."""

    def __init__(self, forward):
        super().__init__(forward)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x):
        shift, scale = self.shift, self.scale
        return torch.relu(self.bn(self.conv(x))).mul(scale).flatten(1) + shift.item()


class Auxiliary(Shape):
    """As GoogLeNet of torchvision: in training it gives another head's result, too, and TorchScript has its own way."""

    def forward(self, x):
        both = self.training and self.flag
        x, other = self.bn(self.conv(x)), None
        if self.other is not None and self.training:
            other = self.other(x)
        if torch.jit.is_scripting():
            if not both:
                warnings.warn("always a pair", stacklevel=2)
            return Pair(x, other)
        else:
            return self.results(x, other)

    @torch.jit.unused
    def results(self, x, other):
        if self.training and self.flag:
            return Pair(x, other)
        return torch.relu(x)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@torch.no_grad()
def test_ways_that_are_not_taken_need_no_proof():
    model = lively(Auxiliary(None))
    cvfast.accelerate(model, fuse=True)
    assert fused(model) == {"": ["conv + bn + (relu)"]}
    assert error(model(PICTURE), exact(model, PICTURE)) < NEAR
    model.training = True  # alone: the norm goes on as in eval mode
    result = model(PICTURE)
    model.flag = False
    assert type(result) is Pair and error(model(PICTURE), result.first.relu()) < NEAR
    model.training, model.flag, model.other = False, True, None
    assert error(model(PICTURE), result.first.relu()) < NEAR


class Twice(Shape):
    def forward(self, x):
        return self.bn(self.conv(self.bn(self.conv(x))))


@pytest.mark.parametrize(
    ("cls", "expected_chains"),
    [(Asked, ["conv + bn + (relu)"]), (OwnNumber, ["conv + bn + (relu)"]), (Twice, ["conv + bn"] * 2)],
)
@torch.no_grad()
def test_attributes_methods_and_shared_layers(cls, expected_chains):
    model = lively(cls(None))
    cvfast.accelerate(model, fuse=True)
    assert fused(model) == {"": expected_chains}
    for flag in (True, False):
        model.flag = flag
        assert error(model(PICTURE), exact(model, PICTURE)) < NEAR
        if cls is OwnNumber:
            model.scale.mul_(2)
            model.shift.add_(1)
            assert error(model(PICTURE), exact(model, PICTURE)) < NEAR


def test_a_sequential_that_grows():
    model = lively(nn.Sequential(nn.Conv2d(16, 4, 3), nn.BatchNorm2d(4)))
    cvfast.accelerate(model, fuse=True)
    model.append(nn.Flatten())
    with torch.no_grad():
        assert model(PICTURE).shape == (2, 400)


def test_what_batch_norm_refuses_is_refused():
    model = cvfast.accelerate(lively(nn.Sequential(nn.Conv2d(16, 4, 3), nn.BatchNorm2d(4))), fuse=True)
    with pytest.raises(ValueError, match="expected 4D input"):
        model(PICTURE[0])


@torch.no_grad()
def test_torchs_encoder_layers():
    """In eval mode torch computes them without calling their attention; in training it calls cvfast's."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.arange(5) > torch.tensor([[4], [2]])
    expected = exact(model, x)
    cvfast.accelerate(model)
    for mode in (False, True):
        assert error(model.train(mode)(x), expected) < NEAR
    assert error(model(x, src_key_padding_mask=mask)[0], expected[0]) < NEAR


def test_a_layer_called_by_itself_is_only_itself():
    model = lively(Block())
    conv, expected = model.conv1, exact(model.conv1, PICTURE)
    cvfast.accelerate(model, fuse=True)
    model(PICTURE)
    assert error(conv(PICTURE), expected) < NEAR


# What else is done with models


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("fusing", [False, True])
def test_copies(copied, fusing):
    model = cvfast.accelerate(lively(nn.Sequential(Block(), nn.Sequential(Block()))), fuse=fusing)
    twin = copied(model)
    with torch.no_grad():
        assert torch.equal(twin(PICTURE), model(PICTURE))
    assert types(twin) == types(model) and fused(twin) == fused(model)
    assert types(cvfast.restore(twin))[1] is Block


def test_saved_with_torch_save(tmp_path):
    model = cvfast.accelerate(lively(Block()), fuse=True)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(twin(PICTURE), model(PICTURE)) and fused(twin) == fused(model)


@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad):
    model = cvfast.accelerate(lively(Block(shortcut=True)), fuse=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        assert error(compiled(PICTURE), exact(model, PICTURE)) < NEAR
        model.conv1.weight.data.mul_(2)
        assert error(compiled(PICTURE), exact(model, PICTURE)) < NEAR
    compiled.train()
    compiled(PICTURE).sum().backward()


def test_export():
    model = cvfast.accelerate(lively(Block()), fuse=True)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (PICTURE,), dynamic_shapes={"x": {0: batch}})
    more = torch.cat((PICTURE, PICTURE))
    assert error(program.module()(more), exact(model, more)) < NEAR
    assert set(program.state_dict) == set(model.state_dict())


def test_functional_call_and_vmap_over_ensembles():
    model = cvfast.accelerate(lively(Block()), fuse=True)
    state = {k: torch.stack((v, 2 * v)) for k, v in model.state_dict().items() if v.is_floating_point()}
    run = lambda state: torch.func.functional_call(model, state, (PICTURE,))  # noqa: E731
    outputs = torch.func.vmap(run)(state)
    for i in range(2):
        expected = torch.func.functional_call(
            cvfast.restore(copy.deepcopy(model)).double(),
            {k: v[i].double() for k, v in state.items()},
            (PICTURE.double(),),
        )
        assert error(outputs[i], expected) < NEAR


def test_inference_mode():
    """What is kept from a call in inference mode serves calls with gradients."""
    with torch.inference_mode():
        model = cvfast.accelerate(lively(Block()))
        born_there = cvfast.accelerate(lively(Block()))
        expected = model(PICTURE)
        assert error(born_there(PICTURE), exact(born_there, PICTURE)) < NEAR
    assert fused(model)
    with torch.no_grad():
        assert torch.equal(model(PICTURE), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_and_autocast(dtype):
    model = lively(Block())
    eps = torch.finfo(dtype).eps
    expected = exact(model, PICTURE)
    cvfast.accelerate(model, fuse=True)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert error(model(PICTURE), expected) < 4 * eps
    with torch.no_grad():
        assert error(model.to(dtype)(PICTURE.to(dtype)), expected) < 4 * eps


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, twin = lively(Block(), mode=True), lively(Block(), mode=True)
        twin.load_state_dict(model.state_dict())
        parallel = nn.parallel.DistributedDataParallel(cvfast.accelerate(model))
        for m in (parallel, twin):
            m(PICTURE).square().mean().backward()
        torch.testing.assert_close(model.conv1.weight.grad, twin.conv1.weight.grad, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            cvfast.accelerate(parallel.eval())
            assert fused(parallel) and error(parallel(PICTURE), exact(model, PICTURE)) < NEAR
    finally:
        dist.destroy_process_group()


# override()


def test_override_sends_functions_to_cvfast():
    class Functions(nn.Module):
        def forward(self, x):
            x = F.conv2d(x, torch.ones(4, 3, 3, 3), padding=1)
            x = torch.conv_transpose2d(x, torch.ones(4, 2, 2, 2), stride=2)
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    model, layers = Functions(), everything()
    expected = model(X), layers(X)
    with cvfast.override(), torch.profiler.profile() as profile:
        outputs = model(X), layers(X)
    ran = {event.key for event in profile.key_averages()}
    names = ("conv2d_epilogue", "conv_transpose2d", "attention", "lstm", "gru", "rnn_tanh", "lstm_cell", "gru_cell")
    assert {f"cvfast_kernels::{name}" for name in names} <= ran
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)


def test_override_takes_packed_sequences_and_gradients():
    layer = nn.LSTM(3, 4, num_layers=2)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (5, 3, 2)])
    expected = layer(packed)
    with cvfast.override(), torch.profiler.profile() as profile:
        output = layer(packed)
        output[0].data.sum().backward()
    assert "cvfast_kernels::lstm" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(output[0].data, expected[0].data)
    torch.testing.assert_close(output[1], expected[1])


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_override_does_not_recurse(backend):
    """torch's operator is called by the backend "native", and for dtypes that have no kernel."""
    x = X.int() if backend == "auto" else X
    weight = torch.ones(4, 3, 3, 3, dtype=x.dtype)
    with cvfast.override(), cvfast.use_backend(backend):
        output = F.conv2d(x, weight)
    assert torch.equal(output, F.conv2d(x, weight))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_override_ends_with_its_block_and_leaves_other_tensors_to_torch():
    class Wrapped(torch.Tensor):
        pass

    wrapped = X.as_subclass(Wrapped)
    with torch.profiler.profile() as profile:
        with cvfast.override():
            assert type(F.conv2d(wrapped, torch.ones(4, 3, 3, 3))) is Wrapped
            nested = torch.nested.nested_tensor([torch.randn(2, n, 4) for n in (3, 5)])
            F.scaled_dot_product_attention(nested, nested, nested)
        F.conv2d(X, torch.ones(4, 3, 3, 3))
    assert not any(event.key.startswith("cvfast") for event in profile.key_averages())


# explain() and tune()


def test_explain_tells_what_ran():
    model = lively(nn.Sequential(Block(shortcut=True), nn.Flatten(), nn.Linear(16 * 144, 8)))
    rows = cvfast.explain(model, PICTURE).rows
    assert [row.backend for row in rows] == ["torch"] * len(rows) and rows[0].reason == "not accelerated"
    cvfast.accelerate(model, fuse=True)
    before = types(model)
    explanation = cvfast.explain(model, PICTURE)
    assert [(row.name, row.backend, row.fused) for row in explanation.rows] == [
        ("0.conv1", "ext", "0.bn1 + 0.relu"),
        ("0.downsample.0", "ext", "0.downsample.1"),
        ("0.conv2", "ext", "0.bn2 + add + 0.relu"),
        ("1", "torch", ""),
        ("2", "native", ""),
    ]
    first = explanation.rows[0]
    assert first.inputs == first.output == [[2, 16, 12, 12]] and first.type == "Conv2d"
    assert [row.algorithm for row in explanation.rows] == ["Winograd", "implicit GEMM", "Winograd", "", ""]
    assert 0 < first.seconds < 1 and 0 < first.torch_seconds < 1
    assert "0.bn2 + add + 0.relu" in str(explanation) and "µs" in str(explanation)
    assert types(model) == before and chains.observer is None and "Watcher" not in repr(nn.Module.__call__)


@torch.no_grad()
def test_packed_weights_of_fused_layers():
    """They give the same bits, follow the layers' parameters, are told by explain() and can be freed."""
    model = lively(nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()))
    x, weight_bytes = torch.randn(1, 32, 7, 7), model[0].weight.nbytes
    cvfast.accelerate(model, fuse=True)
    for factor in (1, 1.5):
        model[0].weight.mul_(factor)
        expected = copy.deepcopy(model)(x)
        assert all(torch.equal(model(x), expected) for _ in range(3))
        assert _packed.packed_bytes(chains.folded(model[0])) >= weight_bytes
    explanation = cvfast.explain(model, x)
    assert 2 * weight_bytes <= explanation.rows[0].packed_bytes <= 2.2 * weight_bytes  # the folded ones, packed
    assert str(explanation).count("0.14 MiB") == 2  # the layer's and the sum
    cvfast.free_packed(model)
    assert chains.folded(model[0]) == [] and torch.equal(model(x), expected)
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        cvfast.free_packed(1)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_explain_gives_reasons():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.conv, self.unused = Own(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(self.own(x)) if x.sum() < torch.inf else x

    model = nn.Sequential(Odd(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())).eval()
    cvfast.accelerate(model, fuse=True)
    with cvfast.use_backend("native"):
        explanation = cvfast.explain(model, X)
    own, conv, chain, unused = explanation.rows
    assert own.reason == "Own is not one of torch's layers that cvfast has, but a class of its own"
    assert (conv.backend, conv.reason) == ("native", "'native' was asked for")
    assert (chain.fused, unused.reason) == ("1.1", "not called")
    assert explanation.notes["0"] == "forward is not plain code: x.sum()"
    rows = cvfast.explain(model[0].conv.to(torch.complex64), torch.ones(4, 4, 4) + 0j).rows
    assert rows[0].reason == "no kernel for torch.complex64 on cpu"


def test_explain_of_every_layer_and_of_hooks():
    """Hooks see one call each, however often a layer is measured; random numbers go on as if it were not."""
    model, seen = cvfast.accelerate(everything()), []
    model.conv.register_forward_hook(lambda *args: seen.append(args))
    torch.manual_seed(0)
    rows = {row.name: row for row in cvfast.explain(model, X).rows}
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert len(seen) == 1 and torch.equal(torch.rand(1), drawn)
    swapped = ["conv", "up", "lstm", "gru", "rnn", "attention", "cells.0", "cells.1", "cells.2"]
    assert [rows[name].backend for name in swapped] == ["ext"] * 9
    assert all(rows[name].torch_seconds > 0 for name in swapped) and rows["end"].torch_seconds is None


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("show_attend_tell", {}, {"encoder.0": "Conv2d", "": "additive_attention"}),
        ("cnn_attention", {"width": 8}, {"features.0": "Conv2d", "attention": "AdditiveAttention"}),
        ("vit_tiny_cifar", {"num_layers": 1}, {"encoder.layers.encoder_layer_0.self_attention": "MultiheadAttention"}),
        ("crnn", {"width": 8}, {"columns.0": "Conv2d", "lstm": "LSTM"}),
    ],
)
def test_explain_of_the_zoo_misses_no_layer(name, options, expected):
    """Each layer that learns has a row with times, or is a part of one; a cell that is unrolled is its model's."""
    model = cvfast.accelerate(create_model(name, **options).eval(), fuse=True)
    rows = cvfast.explain(model, *example_inputs(name).values()).rows
    assert not [row for row in rows if row.reason == "not called"]
    ours = {row.name: row.type for row in rows if row.backend == "ext"}
    assert expected.items() <= ours.items()
    assert all(row.torch_seconds > 0 for row in rows if row.backend in ("ext", "native"))
    seen = {part for row in rows for part in (row.name, *row.fused.split(" + ")) if part} | {"cell"}
    for layer, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and layer not in ("", "encoder"):
            assert any(f"{layer}.".startswith(f"{one}.") for one in seen), layer


def test_explain_under_override():
    """Functions that no layer calls have rows, and torch's layers name cvfast's backend."""

    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return F.conv2d(self.conv(x), torch.ones(4, 3, 3, 3))

    with cvfast.override():
        layer, function = cvfast.explain(Functions(), X).rows
    assert (layer.name, layer.type, layer.backend, layer.torch_seconds) == ("conv", "Conv2d", "ext", None)
    assert (function.name, function.type, function.backend) == ("", "conv2d", "ext")
    assert function.inputs == [[2, 3, 8, 8], [4, 3, 3, 3]] and function.output == [[2, 4, 6, 6]]
    assert function.torch_seconds > 0


@pytest.fixture
def no_choices():
    """Choices of the test alone."""
    yield
    _choices.clear()


def torch_is_faster(*, whole):
    """Instead of least_seconds: of one call cvfast's, then torch's time; of a model: is it less with choices?"""

    def least_seconds(*calls):
        return [2e-3, 1e-3] if len(calls) == 2 else [1e-3 if bool(_choices.torchs) == whole else 2e-3]

    return least_seconds


@pytest.mark.usefixtures("no_choices")
def test_tune_measures_and_decides(tmp_path, monkeypatch):
    """A call for which torch was faster goes to torch, with that reason, until gradients are wanted."""
    model, file = cvfast.accelerate(nn.Conv2d(3, 4, 3)), tmp_path / "folder" / "choices.json"
    monkeypatch.setattr(measure, "least_seconds", torch_is_faster(whole=True))
    assert cvfast.tune(model, X, file=file) == 1
    args = (X, model.weight, model.bias, (1, 1), (0, 0), (1, 1), 1)
    for _ in range(2):
        with torch.no_grad():
            assert backend.report("conv2d", *args)["ext"] == ["measured: 2000 µs, torch 1000 µs"]
            assert cvfast.explain(model, X).rows[0].backend == "native"
            assert backend.select("conv2d", "ext", *args) is backend.BACKENDS["conv2d"]["ext"]
            for other in ((X[:1], *args[1:]), (*args[:2], None, *args[3:]), (X.transpose(2, 3), *args[1:])):
                assert backend.name_of("conv2d", backend.select("conv2d", None, *other)) == "ext"
        assert backend.name_of("conv2d", backend.select("conv2d", None, *args)) == "ext"
        _choices.clear()
        assert cvfast.load_choices(file) == 1
    monkeypatch.setattr(measure, "least_seconds", lambda *calls: [1e-3, 2e-3])
    assert cvfast.tune(model, X, file=file) == 0
    assert not _choices.torchs


@pytest.mark.usefixtures("no_choices")
def test_choices_are_kept_in_the_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(_env, "cache", tmp_path / "cache")
    monkeypatch.setattr(measure, "least_seconds", torch_is_faster(whole=True))
    assert cvfast.tune(cvfast.accelerate(nn.Conv2d(3, 4, 3)), X) == 1
    _choices.clear()
    _choices._load_default()  # as a new process does
    assert len(_choices.torchs) == 1 and str(tmp_path / "cache" / "choices.json") in _choices.origin
    _choices.clear()
    result = CliRunner().invoke(app, ["tune", "--model", "cnn"])
    assert result.exit_code == 0 and f"kept in {tmp_path / 'cache' / 'choices.json'}" in " ".join(result.output.split())
    assert len(_choices.read(tmp_path / "cache" / "choices.json")[0]) > 2


@pytest.mark.usefixtures("no_choices")
def test_choices_by_which_the_whole_model_loses_are_not_made(tmp_path, monkeypatch):
    """Alone torch is faster for both convolutions; both in one call are faster than torch."""
    model, file = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), tmp_path / "choices.json"
    cvfast.accelerate(model, fuse=True)
    monkeypatch.setattr(measure, "least_seconds", torch_is_faster(whole=False))
    assert cvfast.tune(model, X, file=file) == 0 and not _choices.torchs
    choices, _ = _choices.read(file)
    assert len(choices) == 2 and all(c.torch_seconds < c.seconds and not c.pays for c in choices.values())
    assert cvfast.load_choices(file) == 2 and not _choices.torchs
    with torch.no_grad():
        assert {row.backend for row in cvfast.explain(model, X).rows} == {"ext"}
    monkeypatch.setattr(measure, "least_seconds", torch_is_faster(whole=True))
    assert cvfast.tune(model, X, file=file) == 2 and len(_choices.torchs) == 2


@pytest.mark.usefixtures("no_choices")
def test_choices_under_compile_and_export(tmp_path, monkeypatch):
    """Known sizes are looked up; open ones stay open. torch 2.11 compiles as if it exported: nothing is looked up."""
    exporting = torch.compile(lambda x: x + torch.compiler.is_exporting(), fullgraph=True, backend="eager")
    never = bool(exporting(torch.zeros(1)))
    model = cvfast.accelerate(nn.Conv2d(3, 4, 3))
    monkeypatch.setattr(measure, "least_seconds", torch_is_faster(whole=True))
    cvfast.tune(model, X, file=tmp_path / "choices.json")
    with torch.no_grad():
        for x, operator in ((X, "convolution"), (X.clone(), "conv2d")):
            seen = []
            if operator == "conv2d":
                torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.reset()
            backend = lambda graph, inputs, seen=seen: seen.append(graph.code) or graph  # noqa: E731
            torch.compile(model, fullgraph=True, backend=backend)(x)
            assert ("torch.ops.cvfast.conv2d" in seen[0]) == (operator == "conv2d" or never)
        program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert program.module()(X[:1].expand(5, -1, -1, -1)).shape[0] == 5


@pytest.mark.usefixtures("no_choices")
def test_choices_that_do_not_fit(tmp_path, monkeypatch):
    file = tmp_path / "choices.json"
    with pytest.raises(FileNotFoundError):
        cvfast.load_choices(file)
    for text in ("", "[]", '{"format": "other"}', '{"format": "cvfast-choices-1", "choices": [{}]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="choices.json holds no choices of cvfast"):
            cvfast.load_choices(file)
    model = cvfast.accelerate(everything())
    cvfast.tune(model, X, file=file)
    with monkeypatch.context() as patch:
        patch.setattr(_choices, "machine", lambda: "abacus")
        with pytest.raises(ValueError, match="another machine.*this is abacus"):
            cvfast.load_choices(file)
    assert cvfast.load_choices(file) == 9
    code = "from cvfast import _choices; print(_choices.origin)"
    for content, said in ((file.read_text(), "9 calls measured, in"), ("{", "not used: "), (None, "none measured")):
        file.write_text(content) if content else file.unlink()
        env = {**os.environ, "CVFAST_CACHE": str(tmp_path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert result.stdout.startswith(said), result.stdout + result.stderr


# torch.fx


def graph_of(model):
    """The graph that torch.fx records, and the calls in it."""
    traced = torch.fx.symbolic_trace(model)
    return traced, [(node.op, str(node.target)) for node in traced.graph.nodes]


@pytest.mark.parametrize("fuse", [False, True])
def test_torch_fx_records_what_it_records_of_torchs_layers(fuse):
    model = lively(nn.Sequential(Block(shortcut=True), nn.ConvTranspose2d(16, 4, 2)))
    _, expected = graph_of(model)
    cvfast.accelerate(model, fuse=fuse)
    traced, calls = graph_of(model)
    assert calls == expected
    with torch.no_grad():
        torch.testing.assert_close(traced(PICTURE), model(PICTURE), rtol=1e-4, atol=1e-5)


def test_torch_fx_records_each_layer_as_one_node():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.gru, self.rnn = nn.LSTM(6, 8), nn.GRU(8, 8), nn.RNN(8, 8)
            self.cells = nn.ModuleList([nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)])
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            x = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
            x = self.attention(query=x, key=x, value=x, need_weights=False)[0]
            return self.cells[2](self.cells[1](self.cells[0](x[0])[0]))

    model = Sequence()
    x = torch.randn(5, 2, 6)
    _, expected = graph_of(model)
    traced, calls = graph_of(cvfast.accelerate(model))
    assert calls == expected
    torch.testing.assert_close(traced(x), model(x))


def test_torch_fx_does_not_lose_what_a_subclass_adds():
    class Doubled(cvfast.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(torch.fx.proxy.TraceError):  # not one node, which would double twice
        torch.fx.symbolic_trace(nn.Sequential(Doubled(3, 4, 3)))
