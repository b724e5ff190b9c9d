"""cvfast.nn.Conv2d and ConvTranspose2d stand in for torch.nn's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import cvfast

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
    assert "cvfast_kernels::conv2d" in {event.key for event in profile.key_averages()}


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
