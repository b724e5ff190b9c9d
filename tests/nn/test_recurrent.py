"""cvfast.nn's recurrent layers and cells stand in for torch.nn's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.testing._internal.common_modules import module_db

import cvfast
from cvfast.testing import relative_error

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
CONFIGURATIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "bias": False},
]


def twins(name: str, *args, **options):
    """A torch layer and a cvfast layer of the same float64 parameters."""
    torch.manual_seed(0)
    native = getattr(torch.nn, name)(*args, **options, dtype=torch.float64)
    layer = getattr(cvfast.nn, name)(*args, **options, dtype=torch.float64)
    layer.load_state_dict(native.state_dict())
    return native, layer


def flat(results) -> list[torch.Tensor]:
    """Every tensor in a layer's results."""
    if isinstance(results, torch.Tensor):
        return [results]
    if isinstance(results, torch.nn.utils.rnn.PackedSequence):
        return [results.data]
    return [t for r in results for t in flat(r)]


def assert_same(native, layer, *args, **kwargs):
    """Results and gradients of the parameters agree; torch's results."""
    results = [m(*args, **kwargs) for m in (native, layer)]
    torch.testing.assert_close(flat(results[1]), flat(results[0]), rtol=1e-11, atol=1e-11)
    grads = [
        torch.autograd.grad(sum(t.sin().sum() for t in flat(r)), list(m.parameters()))
        for r, m in zip(results, (native, layer), strict=True)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)
    return results


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_gives_torchs_numbers(name, configuration):
    native, layer = twins(name, 5, 7, **configuration)
    assert_same(native, layer, torch.randn(4, 3, 5, dtype=torch.float64))
    assert_same(native, layer, torch.randn(4, 5, dtype=torch.float64))


def test_lstm_with_projection():
    native, layer = twins("LSTM", 5, 7, num_layers=2, proj_size=3, bidirectional=True)
    assert_same(native, layer, torch.randn(4, 3, 5, dtype=torch.float64))


def test_relu_rnn():
    native, layer = twins("RNN", 5, 7, nonlinearity="relu")
    assert_same(native, layer, torch.randn(4, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("configuration", CONFIGURATIONS[:2], ids=str)
def test_packed_sequences(name, enforce_sorted, configuration):
    """Sorted or not, with and without initial states, the result is torch's PackedSequence."""
    native, layer = twins(name, 5, 7, **configuration)
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4]
    sequences = [torch.randn(n, 5, dtype=torch.float64) for n in lengths]
    packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
    count = configuration.get("num_layers", 1) * (1 + configuration.get("bidirectional", False))
    states = tuple(torch.randn(count, 4, 7, dtype=torch.float64) for _ in range(2))
    for hx in (None, states if name == "LSTM" else states[0]):
        expected, actual = assert_same(native, layer, packed, hx)
        for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            one, two = getattr(expected[0], field), getattr(actual[0], field)
            assert (one is None) == (two is None) and (one is None or torch.equal(one, two))


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_packed_sequences(name):
    """Padded input with lengths gives what torch gives for the packed sequence, and 0 beyond."""
    native, layer = twins(name, 5, 7, bidirectional=True)
    padded, lengths = torch.randn(6, 3, 5, dtype=torch.float64), torch.tensor([2, 6, 5])
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    expected, states = native(packed)
    output, actual_states = layer(padded, lengths=lengths)
    torch.testing.assert_close(flat(actual_states), flat(states))
    unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(expected, total_length=6)
    torch.testing.assert_close(output, unpacked)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_between_layers(name):
    """All or nothing dropped: as torch. In between: the share of it. None in evaluation."""
    for p in (0.0, 1.0):
        native, layer = twins(name, 5, 7, num_layers=2, dropout=p)
        assert_same(native, layer, torch.randn(4, 3, 5, dtype=torch.float64))
    native, layer = twins(name, 5, 7, num_layers=2, dropout=0.5)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    torch.manual_seed(1)
    first, again = layer(x)[0], layer(x)[0]
    assert not torch.equal(first, again)
    native.eval(), layer.eval()
    torch.testing.assert_close(layer(x)[0], native(x)[0])


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cell_gives_torchs_numbers(name, bias):
    native, layer = twins(name, 5, 7, bias=bias)
    state = torch.randn(3, 7, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert_same(native, layer, x)
    assert_same(native, layer, x, (state, state.flip(0)) if name == "LSTMCell" else state)
    assert_same(native, layer, x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_torchs_module_cases(name, training, dtype):
    """torch's own module inputs: results and gradients of input and parameters are torch's in float64."""
    info = next(m for m in module_db if m.module_cls is getattr(torch.nn, name))
    inputs = info.module_inputs_func(info, "cpu", dtype, True, training)
    assert inputs and not any(case.forward_input.kwargs for case in inputs)
    for case in inputs:
        arguments, call = case.constructor_input, case.forward_input
        native = getattr(torch.nn, name)(*arguments.args, **arguments.kwargs).to(dtype).train(training)
        layer = getattr(cvfast.nn, name)(*arguments.args, **arguments.kwargs).to(dtype).train(training)
        layer.load_state_dict(native.state_dict())
        exact = copy.deepcopy(native).double()
        wide = [map_tensors(a, lambda t: t.detach().double().requires_grad_(t.requires_grad)) for a in call.args]
        actual, truth = numbers(layer, call.args), numbers(exact, wide)
        assert [(t.dtype, t.shape) for t in actual] == [(dtype, t.shape) for t in truth]
        # Together: a gradient by itself may be next to nothing, 1 - tanh^2 of a saturated gate.
        error = relative_error(*(torch.cat([t.flatten() for t in every]) for every in (actual, truth)))
        assert error < (1e-5 if dtype == torch.float32 else 1e-13)


def map_tensors(value, function):
    """`function` of a tensor, or of each in a tuple; None stays."""
    if isinstance(value, (tuple, list)):
        return tuple(map_tensors(v, function) for v in value)
    return value if value is None else function(value)


def numbers(module, args) -> list[torch.Tensor]:
    """A call's results, and their gradients to inputs and parameters."""
    results = flat(module(*args))
    leaves = [t for t in flat([a for a in args if a is not None]) if t.requires_grad]
    grads = torch.autograd.grad(sum(t.square().sum() for t in results), [*leaves, *module.parameters()])
    return [*(t.detach() for t in results), *grads]


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_stands_in_for_torchs(name):
    native, layer = twins(name, 5, 7)
    assert isinstance(layer, getattr(torch.nn, name))
    assert repr(layer) == repr(native)
    assert list(layer.state_dict()) == list(native.state_dict())
    x = torch.randn(2, 5, dtype=torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(flat(twin(x)), flat(layer(x)), rtol=0, atol=0)
    if name in LAYERS:
        layer.flatten_parameters()


@pytest.mark.parametrize("name", LAYERS)
def test_it_runs_cvfasts_kernel(name):
    layer = getattr(cvfast.nn, name)(5, 7)
    with torch.profiler.profile() as profile:
        layer(torch.randn(4, 3, 5))
    operator = "rnn_tanh" if name == "RNN" else name.lower()
    assert f"cvfast_kernels::{operator}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", LAYERS)
def test_training_changes_the_next_result(name):
    """In-place updates, an optimizer's step and .data swaps are seen by the next call."""
    native, layer = twins(name, 5, 7)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for change in (
        lambda m: torch.optim.SGD(m.parameters(), lr=0.5).step(),
        lambda m: m.weight_hh_l0.data.mul_(2),
        lambda m: setattr(m.weight_ih_l0, "data", m.weight_ih_l0.data.flip(0).clone()),
    ):
        for module in (native, layer):
            module.zero_grad()
            module(x)[0].square().mean().backward()
            change(module)
        torch.testing.assert_close(layer(x)[0], native(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_takes_the_given_weights(name):
    native, layer = twins(name, 5, 7)
    given = {key: value * 0.5 for key, value in layer.state_dict().items()}
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    expected, actual = (torch.func.functional_call(m, given, (x,))[0] for m in (native, layer))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_dtype_has_torchs_words(name):
    layer = getattr(cvfast.nn, name)(5, 7)
    with pytest.raises(ValueError, match="does not match weight dtype"):
        layer(torch.randn(4, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_compiles_without_a_graph_break(name):
    """Where torch is told to let subclasses of its recurrent layers in."""
    layer = getattr(cvfast.nn, name)(5, 7)
    lengths = torch.tensor([2, 4, 0])
    x = torch.randn(4, 3, 5)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(lambda x: layer(x, lengths=lengths)[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x, lengths=lengths)[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_onnx_has_the_standard_operator(name):
    """By torch's operators, as cvfast's export does it; the runtime's numbers are the layer's."""
    import onnxruntime

    layer, x = getattr(cvfast.nn, name)(5, 7, bidirectional=True).eval(), torch.randn(4, 3, 5)
    with cvfast.use_backend("native"):
        program = torch.onnx.export(torch.export.export(layer, (x,)), dynamo=True, verbose=False)
    assert name in {node.op_type for node in program.model_proto.graph.node}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), layer(x)[0].detach())
