"""cvfast.nn.Conv2d and ConvTranspose2d stand in for torch.nn's."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch

import cvfast
from cvfast import _packed
from cvfast.ops.conv2d import conv2d_how
from tests.conftest import isas

CONFIGURATIONS = [
    dict(kernel_size=3),
    dict(kernel_size=3, padding=1, bias=False),
    dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    dict(kernel_size=3, groups=4, padding=1),
    dict(kernel_size=2, padding="same"),
    dict(kernel_size=3, padding="valid"),
    dict(kernel_size=3, padding="same", padding_mode="reflect"),
    *(dict(kernel_size=3, padding=(1, 2), padding_mode=mode) for mode in ("reflect", "replicate", "circular")),
]


def twins(**configuration):
    """A torch layer and a cvfast layer of the same parameters."""
    torch.manual_seed(0)
    native = torch.nn.Conv2d(8, 12, **configuration)
    layer = cvfast.nn.Conv2d(8, 12, **configuration)
    layer.load_state_dict(native.state_dict())
    return native, layer


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("backend", ["ext", "native"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_numbers(configuration, backend, memory_format):
    native, layer = twins(**configuration)
    native.double(), layer.double()
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64).contiguous(memory_format=memory_format)
    with cvfast.use_backend(backend):
        outputs = [m(x.requires_grad_()) for m in (layer, native)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    grads = [
        torch.autograd.grad(o.sin().sum(), (x, *m.parameters())) for o, m in zip(outputs, (layer, native), strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_it_runs_cvfasts_kernel():
    _, layer = twins(kernel_size=3)
    with torch.profiler.profile() as profile:
        layer(torch.randn(1, 8, 9, 9))
    assert "cvfast_kernels::conv2d_epilogue" in {event.key for event in profile.key_averages()}


def test_unbatched_input():
    native, layer = twins(kernel_size=3)
    x = torch.randn(8, 9, 9)
    torch.testing.assert_close(layer(x), native(x))


def test_stands_in_for_torchs():
    native, layer = twins(kernel_size=3, padding=1)
    assert isinstance(layer, torch.nn.Conv2d)
    assert repr(layer) == repr(native)
    assert list(layer.state_dict()) == list(native.state_dict())
    x = torch.randn(1, 8, 9, 9)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_lazy_shapes_and_devices_and_dtypes():
    layer = cvfast.nn.Conv2d(3, 4, 3, device="meta", dtype=torch.float64)
    assert layer.weight.device.type == "meta"
    assert layer(torch.empty(2, 3, 8, 8, device="meta", dtype=torch.float64)).shape == (2, 4, 6, 6)


def test_training_changes_the_next_result():
    """In-place updates, an optimizer's step and .data swaps are seen by the next call."""
    native, layer = twins(kernel_size=3)
    x = torch.randn(2, 8, 9, 9)
    for change in (
        lambda m: torch.optim.SGD(m.parameters(), lr=0.5).step(),
        lambda m: m.weight.data.mul_(2),
        lambda m: setattr(m.weight, "data", m.weight.data.flip(0).clone()),
    ):
        for module in (native, layer):
            module.zero_grad()
            module(x).square().mean().backward()
            change(module)
        torch.testing.assert_close(layer(x), native(x), rtol=1e-4, atol=1e-4)


# Packed weights

PACKED = {  # form -> layer and image: Winograd's taps, or transformed for more tiles, panels of the implicit GEMM
    "winograd": (dict(in_channels=32, out_channels=40, kernel_size=3, padding=1), (1, 32, 7, 7)),
    "winograd on phases": (dict(in_channels=32, out_channels=32, kernel_size=4, stride=2, padding=1), (1, 32, 16, 16)),
    "winograd, transformed": (dict(in_channels=32, out_channels=40, kernel_size=3, padding=1), (1, 32, 14, 14)),
    "winograd on phases, transformed": (
        dict(in_channels=32, out_channels=32, kernel_size=4, stride=2, padding=1),
        (1, 32, 32, 32),
    ),
    "panels": (dict(in_channels=48, out_channels=96, kernel_size=1), (1, 48, 7, 7)),
    "transposed, winograd": (dict(in_channels=32, out_channels=40, kernel_size=3, padding=1), (1, 32, 7, 7)),
    "transposed, winograd on phases": (
        dict(in_channels=32, out_channels=32, kernel_size=4, stride=2, padding=1),
        (1, 32, 8, 8),
    ),
    "transposed, winograd on phases, transformed": (
        dict(in_channels=32, out_channels=48, kernel_size=3, stride=2, padding=1, output_padding=1),
        (1, 32, 20, 20),
    ),
    "transposed, panels": (dict(in_channels=72, out_channels=96, kernel_size=2, stride=2), (1, 72, 7, 7)),
    "transposed, panels of one pixel": (dict(in_channels=72, out_channels=80, kernel_size=4), (1, 72, 1, 1)),
}


def packed_layer(form, dtype=torch.float32):
    torch.manual_seed(0)
    configuration, shape = PACKED[form]
    kind = cvfast.nn.ConvTranspose2d if form.startswith("transposed") else cvfast.nn.Conv2d
    return kind(**configuration, dtype=dtype), torch.randn(shape, dtype=dtype)


def results(layer, x, count=3):
    """Those of `count` calls; from the second one on with packed weights."""
    with torch.no_grad():
        return [layer(x) for _ in range(count)]


def unpacked_result(layer, x):
    """By weights that nobody has seen before."""
    with torch.no_grad():
        return copy.deepcopy(layer)(x)


def kept_bytes(layer):
    return _packed.packed_bytes(layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("form", PACKED)
def test_packed_weights_give_the_same_bits(form, memory_format, dtype, isa, poisoned):
    layer, x = packed_layer(form, dtype)
    x = x.contiguous(memory_format=memory_format)
    expected = unpacked_result(layer, x)
    assert all(torch.equal(result, expected) for result in results(layer, x))
    assert kept_bytes(layer) >= layer.weight.nbytes or "winograd" in form and dtype is torch.float64
    assert torch.equal(layer(x), expected)  # with gradients
    batch = torch.cat([x, 2 * x, -x])
    assert all(torch.equal(result, unpacked_result(layer, batch)) for result in results(layer, batch))


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(1.5),
    "copy": lambda layer: layer.weight.copy_(layer.weight.flip(0)),
    "data in place": lambda layer: layer.weight.data.mul_(1.5),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 1.5),
    "numpy": lambda layer: layer.weight.detach().numpy().__imul__(1.5),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()}),
    "parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight * 1.5)),
    "memory format": lambda layer: layer.to(memory_format=torch.channels_last).weight.mul_(1.5),
    "dtype": lambda layer: layer.to(torch.float64),
    "dtype and back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", PACKED)
def test_a_changed_weight_is_packed_again(form, change):
    layer, x = packed_layer(form)
    before = results(layer, x)[0]
    with torch.no_grad():
        CHANGES[change](layer)
    x = x.to(layer.weight.dtype)
    expected = unpacked_result(layer, x)
    assert not torch.equal(expected, before)
    assert all(torch.equal(result, expected) for result in results(layer, x))


@pytest.mark.parametrize("form", PACKED)
def test_training_steps_between_packed_calls(form):
    layer, x = packed_layer(form)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(3):
        before = results(layer, x)[-1]
        layer(x).square().mean().backward()
        optimizer.step()
        expected = unpacked_result(layer, x)
        assert not torch.equal(expected, before)
        assert all(torch.equal(result, expected) for result in results(layer, x))


def test_one_weight_in_several_calls():
    """Images of two sizes, other options and another layer share a weight; each gets its own result."""
    layer, small = packed_layer("winograd")
    large, other = torch.randn(1, 32, 40, 40), copy.deepcopy(layer)
    other.weight, other.dilation, other.padding = layer.weight, (2, 2), (2, 2)
    calls = [(layer, small), (layer, large), (other, small), (layer, torch.randn(1, 32, 3, 3))]
    expected = [unpacked_result(*call) for call in calls]
    for _ in range(3):
        for call, result in zip(calls, expected, strict=True):
            assert torch.equal(results(*call, count=1)[0], result)
    before = kept_bytes(layer)
    for size in range(4, 80):
        results(layer, torch.randn(1, 32, size, 5))
    assert kept_bytes(layer) == before


def test_packed_weights_of_another_shape_are_ignored():
    x, weights = torch.randn(1, 32, 7, 7), (torch.randn(32, 32, 3, 3), torch.randn(64, 32, 3, 3))
    options = ((1, 1), (1, 1), (1, 1), 1)
    kernels, how = torch.ops.cvfast_kernels, conv2d_how(*options)
    first, second = (kernels.conv2d_pack(x, weight, how) for weight in weights)
    for weight, packed in zip(weights, (second, first), strict=True):
        expected = kernels.conv2d(x, weight, None, *options)
        assert torch.equal(kernels.conv2d_epilogue(x, weight, None, how, packed), expected)


def test_one_weight_of_both_convolutions():
    """conv2d, and transposed ones whose phases are not the same, share a weight; each gets its own result."""
    torch.manual_seed(0)
    weight, x = torch.nn.Parameter(torch.randn(72, 72, 3, 3)), torch.randn(1, 72, 3, 3)
    calls = [
        functools.partial(cvfast.functional.conv2d, stride=2),
        functools.partial(cvfast.functional.conv_transpose2d, stride=2),
        functools.partial(cvfast.functional.conv_transpose2d, stride=2, padding=1),
        functools.partial(cvfast.functional.conv_transpose2d, stride=3, output_padding=2),
    ]
    with torch.no_grad():
        expected = [call(x, weight.clone()) for call in calls]
        for _ in range(3):
            assert all(torch.equal(call(x, weight), result) for call, result in zip(calls, expected, strict=True))
    assert len(_packed._kept[id(weight)].forms) == 2


def test_strict_precision_leaves_winograds_weights_alone():
    layer, x = packed_layer("winograd")
    fast = results(layer, x)[-1]
    try:
        cvfast.set_precision("strict")
        expected = unpacked_result(layer, x)
        assert not torch.equal(expected, fast)
        assert all(torch.equal(result, expected) for result in results(layer, x))
    finally:
        cvfast.set_precision("fast")
    assert torch.equal(results(layer, x)[-1], fast)


@pytest.mark.parametrize("form", PACKED)
def test_not_finite_weights_stay_so_when_packed(form):
    layer, x = packed_layer(form)
    with torch.no_grad():
        layer.weight[3, 1, 0, 0], layer.weight[5, 2, -1, -1] = torch.nan, torch.inf
    expected = unpacked_result(layer, x)
    for result in results(layer, x):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_packed_weights_go_with_the_layer_and_on_request():
    before = len(_packed._kept)
    layer, x = packed_layer("panels")
    results(layer, x)
    assert kept_bytes(layer) > 0
    cvfast.free_packed(layer)
    assert kept_bytes(layer) == 0
    results(layer, x)
    assert kept_bytes(layer) > 0
    del layer
    assert len(_packed._kept) == before


def test_inference_mode():
    """Weights made outside of it count their versions; those made inside are not kept."""
    layer, x = packed_layer("winograd")
    with torch.inference_mode():
        before = [layer(x) for _ in range(3)][0]
        assert kept_bytes(layer) > 0
        layer.weight.mul_(1.5)
        assert not torch.equal(layer(x), before)
        inside, x = packed_layer("winograd")
        before = [inside(x) for _ in range(3)][0]
        inside.weight.mul_(1.5)
        assert kept_bytes(inside) == 0
        assert not torch.equal(inside(x), before)


TRANSPOSED = [
    dict(kernel_size=4, stride=2, padding=1),
    dict(kernel_size=4, bias=False),
    dict(kernel_size=(3, 5), stride=(2, 3), padding=(1, 2), output_padding=(1, 0), dilation=(1, 2)),
    dict(kernel_size=3, groups=4, padding=1),
]


def transposed_twins(**configuration):
    """A torch layer and a cvfast layer of the same parameters."""
    torch.manual_seed(0)
    native = torch.nn.ConvTranspose2d(8, 12, **configuration)
    layer = cvfast.nn.ConvTranspose2d(8, 12, **configuration)
    layer.load_state_dict(native.state_dict())
    return native, layer


@pytest.mark.parametrize("configuration", TRANSPOSED, ids=str)
@pytest.mark.parametrize("backend", ["ext", "native"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_transposed_same_numbers(configuration, backend, memory_format):
    native, layer = transposed_twins(**configuration)
    native.double(), layer.double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
    with cvfast.use_backend(backend):
        outputs = [m(x.requires_grad_()) for m in (layer, native)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    grads = [
        torch.autograd.grad(o.sin().sum(), (x, *m.parameters())) for o, m in zip(outputs, (layer, native), strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(9, 12), (10, 11), (2, 12, 10, 12)], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (8, 5, 6)], ids=str)
def test_transposed_output_size(shape, size):
    """The requested size chooses among those that the stride allows; unbatched input takes (P, Q) or (K, P, Q)."""
    native, layer = transposed_twins(kernel_size=3, stride=2, padding=1)
    x, size = torch.randn(shape), size[4 - len(shape) :] if len(size) == 4 else size
    output = layer(x, output_size=size)
    assert output.shape[-2:] == size[-2:]
    torch.testing.assert_close(output, native(x, output_size=size))


def test_transposed_refuses_what_torchs_refuses():
    _, layer = transposed_twins(kernel_size=3, stride=2, padding=1)
    for size, match in (((8, 11), "requested an output size"), ((9,), "output_size must have 2 or 4 elements")):
        with pytest.raises(ValueError, match=match):
            layer(torch.randn(2, 8, 5, 6), output_size=size)
    with pytest.raises(ValueError, match='Only "zeros" padding mode'):
        cvfast.nn.ConvTranspose2d(8, 12, 3, padding_mode="reflect")


def test_transposed_stands_in_for_torchs():
    native, layer = transposed_twins(kernel_size=4, stride=2, padding=1)
    assert isinstance(layer, torch.nn.ConvTranspose2d)
    assert repr(layer) == repr(native)
    assert list(layer.state_dict()) == list(native.state_dict())
    x = torch.randn(1, 8, 5, 6)
    with torch.profiler.profile() as profile:
        expected = layer(x)
    assert "cvfast_kernels::conv_transpose2d" in {event.key for event in profile.key_averages()}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize(
    ("image", "kernel"),
    [
        ((2, 1, 8, 8), (4, 1, 3, 3)),
        ((2, 5, 1, 1), (4, 5, 1, 1)),
        ((2, 1, 1, 1), (4, 1, 1, 1)),
        ((1, 1, 8, 8), (1, 1, 3, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("converted", ["neither", "image", "kernel", "both"])
def test_where_both_memory_formats_fit_the_result_lies_as_torchs(image, kernel, converted):
    """Grey images and single pixels: the strides say which format is meant."""
    x, weight = torch.randn(image), torch.randn(kernel)
    if converted in ("image", "both"):
        x = x.to(memory_format=torch.channels_last)
    if converted in ("kernel", "both"):
        weight = weight.to(memory_format=torch.channels_last)
    padding = kernel[-1] // 2
    expected = torch.nn.functional.conv2d(x, weight, padding=padding).stride()
    assert cvfast.functional.conv2d(x, weight, padding=padding, backend="ext").stride() == expected
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = cvfast.functional.conv2d(mode.from_tensor(x), mode.from_tensor(weight), padding=padding, backend="ext")
    assert fake.stride() == expected
