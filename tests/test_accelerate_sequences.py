"""accelerate: pooling and a classifier's end among chains in a row, and wide images in bands of lines."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cvfast
from cvfast.backends.ext import conv2d
from cvfast.testing.accuracy import relative_error
from tests.conftest import isas

NEAR = 2e-6


@pytest.fixture
def calls(monkeypatch):
    """How many steps each of the kernels' calls took."""
    numbers, steps, prepare, run = [], {}, conv2d.PREPARE_SEQUENCE, conv2d.SEQUENCE

    def prepared(weights, *others):
        result = prepare(weights, *others)
        steps[result.data_ptr()] = len(weights)
        return result

    monkeypatch.setattr(conv2d, "PREPARE_SEQUENCE", prepared)
    monkeypatch.setattr(conv2d, "SEQUENCE", lambda made, x: (numbers.append(steps[made.data_ptr()]), run(made, x))[1])
    return numbers


@pytest.fixture
def formats(monkeypatch):
    """Of each step of the sequences that were prepared, whether its result is channels_last."""
    seen, prepare = [], conv2d.PREPARE_SEQUENCE

    def prepared(weights, biases, packed, numbers, *others):
        seen.extend(numbers[5::6])
        return prepare(weights, biases, packed, numbers, *others)

    monkeypatch.setattr(conv2d, "PREPARE_SEQUENCE", prepared)
    return seen


def unit(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


class Classifier(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.pool, self.second = unit(3, 20, 3), pool, unit(20, 30, 3)
        self.average, self.dropout, self.linear = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5), nn.Linear(30, 11)

    def forward(self, x):
        x = self.average(self.second(self.pool(self.first(x))))
        return self.linear(self.dropout(torch.flatten(x, 1)))


def exact(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return cvfast.restore(copy.deepcopy(model)).double()(x.double())


class Residual(nn.Module):
    """`outside`: what is added comes from outside of the sequence, to a result within or to the last one."""

    def __init__(self, outside: bool, last: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = unit(24, 24, 3), unit(24, 24, 3, act=False), unit(24, 24)
        self.outside, self.last = outside, last

    def forward(self, x):
        y = self.first(x)
        y = torch.relu(self.second(y) + (x if self.outside else y))
        return y if self.last else self.third(y)


class Flattened(nn.Module):
    """As the first networks end: flattened images, linear layers and activations, given as modules or functions."""

    def __init__(self, flatten: nn.Module | None, relu: nn.Module | None) -> None:
        super().__init__()
        self.first, self.pool, self.second = unit(3, 20, 3), nn.MaxPool2d(3, 2), unit(20, 24, 3)
        self.flatten, self.relu, self.dropout = flatten, relu, nn.Dropout(0.5)
        self.linear, self.hidden, self.last = (
            nn.Linear(24 * 8 * 7, 40),
            nn.Linear(40, 30, bias=False),
            nn.Linear(30, 11),
        )

    def forward(self, x):
        x = self.second(self.pool(self.first(x)))
        x = torch.flatten(x, 1) if self.flatten is None else self.flatten(x)
        x = self.linear(x) if self.relu is None else self.relu(self.linear(x))
        x = torch.nn.functional.leaky_relu(self.hidden(self.dropout(x)), 0.2)
        return self.last(x)


class Alone(nn.Module):
    """Pooling beside what makes the model one of chains."""

    def __init__(self, pool: nn.Module, channels: int) -> None:
        super().__init__()
        self.pool, self.beside = pool, nn.Sequential(nn.Conv2d(channels, 1, 1), nn.ReLU())

    def forward(self, x):
        return self.pool(x), self.beside(x)


POOLS = [
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 1),
    nn.MaxPool2d(4, 3, 2),
    nn.MaxPool2d(1),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d((2, 2), [3, 3], (1, 1), ceil_mode=True),
]
FORMATS = [torch.contiguous_format, torch.channels_last]


@torch.no_grad()
def test_results_of_few_channels_stay_contiguous(formats):
    model = nn.Sequential(unit(3, 6, 3), nn.MaxPool2d(3, 2), unit(6, 16, 3), nn.MaxPool2d(3, 2), unit(16, 16, 3)).eval()
    cvfast.accelerate(model, fuse=True)
    x = torch.randn(2, 3, 33, 33)
    model(x), model(x)
    assert formats == [False, False, True, True, False]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_results_that_nobody_sees_are_channels_last(last, outside, memory_format, weights, formats):
    torch.manual_seed(0)
    model = Residual(outside, last).eval().to(memory_format=weights)
    cvfast.accelerate(model, fuse=True)
    x = torch.randn(2, 24, 9, 13).to(memory_format=memory_format)
    first, result = model(x), model(x)
    given = torch.channels_last in (memory_format, weights)
    hidden = given or outside == last  # else the residual and its result would have other formats
    assert formats == [hidden] * (1 if last else 2) + [given]
    assert torch.equal(result, first) and result.stride() == first.stride()
    assert result.is_contiguous() is not given
    assert relative_error(result, exact(model, x)) < NEAR


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("pool", POOLS, ids=repr)
@torch.no_grad()
def test_a_classifier_is_one_call(pool, memory_format, calls):
    torch.manual_seed(0)
    model = Classifier(copy.deepcopy(pool)).eval()
    cvfast.accelerate(model, fuse=True)
    for size in ((2, 3, 17, 14), (1, 3, 9, 40), (20, 3, 8, 8)):
        x = torch.randn(size).to(memory_format=memory_format)
        expected = exact(model, x)
        for _ in range(3):  # the first call finds out
            calls.clear()
            result = model(x)
            assert relative_error(result, expected) < NEAR
        assert calls == [4] and result.is_contiguous()
        assert size[0] == 20 or torch.equal(model(x[:1]), result[:1])  # nobody gets another's bits
    torch.set_num_threads(2)
    assert torch.equal(model(x), result)
    torch.set_num_threads(1)
    x[0, 1, 3, 3] = torch.nan
    assert torch.equal(model(x).isnan(), exact(model, x).isnan())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("isa", isas(), indirect=True)
@torch.no_grad()
def test_pooling_alone_is_torchs(isa, seed, memory_format, calls):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    window, stride = rng.randint(1, 5), rng.randint(1, 4)
    pool = nn.MaxPool2d(window, stride, rng.randint(0, window // 2), ceil_mode=rng.random() < 0.5)
    size = [rng.randint(1, 3), rng.choice([1, 2, 7, 16, 40]), *(rng.randint(window, 45) for _ in range(2))]
    model = cvfast.accelerate(Alone(pool, size[1]), fuse=True).eval()
    x = torch.randn(size)
    x[x > 2.5], x[x < -2.5] = torch.nan, -torch.inf
    x[0, 0] = -torch.inf
    x = x.to(memory_format=memory_format)
    expected = F.max_pool2d(x, window, stride, pool.padding, ceil_mode=pool.ceil_mode)
    assert model(x)[0].stride() == expected.stride()
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0, equal_nan=True)
    strided = torch.cat([x, x], -1)[..., ::2]
    expected = F.max_pool2d(strided, window, stride, pool.padding, ceil_mode=pool.ceil_mode)
    torch.testing.assert_close(model(strided)[0], expected, rtol=0, atol=0, equal_nan=True)
    assert calls == [1] * len(calls) and len(calls) == 3


class Called(nn.Module):
    """Pooling by torch's functions; by the kernel, but for the last three."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Sequential(nn.Conv2d(5, 1, 1), nn.ReLU())

    def forward(self, x):
        a, b = F.max_pool2d(x, 3), F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=True)
        c, d = F.max_pool2d(x, (2, 2), [1, 1]), torch.max_pool2d(x, 3, 1)
        e, f = F.max_pool2d(x, 3, x.shape[1] - 3), F.max_pool2d(x, (1, 2))
        return a, b, c, d, e, f, F.max_pool2d(x, 2, return_indices=True)[1], self.beside(x)


@torch.no_grad()
def test_pooling_by_functions_is_the_kernels(calls):
    model, x = Called().eval(), torch.randn(2, 5, 14, 13)
    expected = model(x)
    cvfast.accelerate(model, fuse=True)
    for _ in range(2):
        calls.clear()
        torch.testing.assert_close(model(x), expected)
    assert calls == [1, 1, 1, 1]


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("channels", [16, 24, 70])
@torch.no_grad()
def test_pooling_at_the_end_takes_channels_last_and_gives_contiguous(channels, ceil, calls, formats, threads):
    torch.manual_seed(0)
    model = nn.Sequential(unit(3, channels, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=ceil)).eval()
    cvfast.accelerate(model, fuse=True)
    x = torch.randn(2, 3, 37, 38)
    x[0, 1, 3, 3] = torch.nan
    expected = exact(model, x)
    first, result = model(x), model(x)
    assert formats == [True, False] and calls == [2]
    assert result.stride() == first.stride() == expected.stride()
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) < NEAR
    threads(2)
    assert torch.equal(model(x).nan_to_num(), result.nan_to_num())


@torch.no_grad()
def test_pooling_that_the_kernel_does_not_know_is_torchs(calls):
    x = torch.randn(1, 4, 9, 9)
    for pool in (nn.MaxPool2d((3, 2)), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, return_indices=True)):
        result, _ = cvfast.accelerate(Alone(pool, 4), fuse=True).eval()(x)
        torch.testing.assert_close(result, pool(x), rtol=0, atol=0)
    model = cvfast.accelerate(Alone(nn.MaxPool2d(2), 4), fuse=True).eval()
    torch.testing.assert_close(model(x[0])[0], F.max_pool2d(x[0], 2), rtol=0, atol=0)
    x.requires_grad_()
    with torch.enable_grad():
        model(x)[0].sum().backward()
    assert x.grad.sum() == 4 * 4 * 4
    assert not calls
    with pytest.raises(RuntimeError, match="too small"):
        model(x[..., :1])
    torch.testing.assert_close(model(x[:0])[0], F.max_pool2d(x[:0], 2), rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("relu", [None, nn.ReLU()], ids=repr)
@pytest.mark.parametrize("flatten", [None, nn.Flatten()], ids=repr)
@torch.no_grad()
def test_linear_layers_behind_flattened_images_are_in_the_call(flatten, relu, memory_format, calls):
    torch.manual_seed(0)
    model = Flattened(copy.deepcopy(flatten), copy.deepcopy(relu)).eval()
    cvfast.accelerate(model, fuse=True)
    for samples in (3, 1, 40):
        x = torch.randn(samples, 3, 17, 15).to(memory_format=memory_format)
        expected = exact(model, x)
        for _ in range(3):  # the first call finds out
            calls.clear()
            result = model(x)
            assert relative_error(result, expected) < NEAR
        assert calls == [6] and result.shape == (samples, 11) and result.is_contiguous()
    assert torch.equal(model(x[:3]), result[:3])  # nobody gets another's bits
    with torch.enable_grad():
        model(x).sum().backward()
    assert all([p.grad is not None for p in model.parameters()])
    model.train()
    calls.clear()
    assert not torch.equal(model(x), model(x))  # dropout
    assert max(calls, default=0) < 6
    model.eval()
    model.linear.weight.mul_(2)
    expected, seen = exact(model, x), []
    assert relative_error(model(x), expected) < NEAR
    model.hidden.register_forward_hook(lambda *args: seen.append(1))
    assert relative_error(model(x), expected) < NEAR and seen
    with pytest.raises(RuntimeError, match="shape"):
        model(x[:, :, 1:])


def weight_written(model):
    model.linear.weight.mul_(2)


def weight_replaced(model):
    model.linear.weight = nn.Parameter(torch.randn(11, 30))


def bias_dropped(model):
    model.linear.bias = None


def other_window(model):
    model.pool.kernel_size, model.pool.padding = 2, 0


def other_average(model):
    model.average.output_size = (None, 1) if model.pool.padding == 7 else (1, 1)


@pytest.mark.parametrize("change", [weight_written, weight_replaced, bias_dropped, other_window, other_average])
@torch.no_grad()
def test_changes_are_seen(change, calls):
    torch.manual_seed(0)
    model, x = Classifier(nn.MaxPool2d(3, 2, 1)).eval(), torch.randn(2, 3, 17, 14)
    cvfast.accelerate(model, fuse=True)
    for _ in range(3):
        model(x)
    change(model)
    expected = exact(model, x)
    for _ in range(3):
        assert relative_error(model(x), expected) < NEAR


@pytest.mark.parametrize("name", ["pool", "average", "dropout", "linear"])
@torch.no_grad()
def test_who_watches_a_layer_sees_it(name, calls):
    torch.manual_seed(0)
    model, x, seen = Classifier(nn.MaxPool2d(3, 2, 1)).eval(), torch.randn(2, 3, 17, 14), []
    cvfast.accelerate(model, fuse=True)
    for _ in range(3):
        expected = model(x)
    handle = model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert seen == [1] and not calls
    handle.remove()
    model(x), model(x), calls.clear(), model(x)
    assert calls == [4]


def test_training_and_gradients_have_the_layers(calls):
    torch.manual_seed(0)
    model, x = Classifier(nn.MaxPool2d(3, 2, 1)).eval(), torch.randn(2, 3, 17, 14)
    cvfast.accelerate(model, fuse=True)
    with torch.no_grad():
        for _ in range(3):
            result = model(x)
        model.dropout.train()
        assert not torch.equal(model(x), result) and not torch.equal(model(x), model(x))
        model.dropout.eval()
        torch.testing.assert_close(model(x), result)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
        model.bfloat16()
        assert all(model(x.bfloat16()).dtype is torch.bfloat16 for _ in range(3))
        model.float()
    calls.clear()
    model(x).sum().backward()
    assert not calls and all(parameter.grad is not None for parameter in model.parameters())


class Inverted(nn.Module):
    """MobileNet-V2's block."""

    def __init__(self, channels: int, wide: int, size: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            unit(channels, wide), unit(wide, wide, size, stride, wide), unit(wide, channels, act=False)
        )
        self.residual = stride == 1

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


@pytest.mark.parametrize("lines", [120, 97, 8])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@torch.no_grad()
def test_bands_have_the_same_bits(lines, size, stride, calls):
    torch.manual_seed(0)
    blocks = (unit(3, 32), unit(32, 32, size, 1, 32), unit(32, 24), Inverted(24, 144, size, stride), unit(24, 16))
    model = nn.Sequential(*blocks).eval()
    x = torch.randn(2, 3, lines, 120).to(memory_format=torch.channels_last)
    expected = exact(model, x)
    cvfast.accelerate(model, fuse=True)
    one_by_one = model(x)
    model(x), calls.clear()
    result = model(x)
    assert calls == [7] and relative_error(result, expected) < NEAR
    assert torch.equal(result, one_by_one) and torch.equal(model(x[1:]), result[1:])
