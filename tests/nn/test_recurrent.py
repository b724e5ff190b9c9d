"""cvfast.nn's recurrent layers and cells stand in for torch.nn's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.testing._internal.common_modules import module_db

import cvfast
from cvfast.backends.ext import recurrent_cell as ext_cell
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


# Beside torch's definition


def varied(name: str, **options):
    torch.manual_seed(0)
    layer = getattr(cvfast.nn, name)(5, 7, **options, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer, torch.randn(4, 3, 5, dtype=torch.float64)


def normalised(x, gain, bias=0.0):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * gain + bias


@pytest.mark.parametrize("name", LAYERS[:2])
def test_layer_norm_is_that_of_the_paper(name):
    """Ba, Kiros and Hinton 2016, equations 20 to 22 (gru: the same for its three gates), written out here."""
    layer, x = varied(name, layer_norm=True)
    h = c = torch.zeros(3, 7, dtype=torch.float64)
    for t in range(4):
        a = normalised(x[t] @ layer.weight_ih_l0.T, layer.norm_ih_l0) + layer.bias_ih_l0
        b = normalised(h @ layer.weight_hh_l0.T, layer.norm_hh_l0) + layer.bias_hh_l0
        if name == "LSTM":
            i, f, g, o = (a + b).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * normalised(c, layer.norm_c_l0, layer.norm_c_bias_l0).tanh()
        else:
            (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
            z = (a_z + b_z).sigmoid()
            h = (1 - z) * (a_n + (a_r + b_r).sigmoid() * b_n).tanh() + z * h
    torch.testing.assert_close(layer(x)[0][-1], h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS[:2])
def test_zoneout(name):
    layer, x = varied(name, zoneout=0.25)
    plain = getattr(cvfast.nn, name)(5, 7, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    h_0 = torch.randn(1, 3, 7, dtype=torch.float64)
    hx = (h_0, torch.randn_like(h_0)) if name == "LSTM" else h_0
    new = plain(x[:1], hx)[0]
    for p in (0.25, 0.0, 1.0):  # one step: each unit is new or old in training, their mean otherwise
        layer.zoneout = p
        kept = layer.train()(x[:1], hx)[0]
        assert torch.isclose(kept, new).logical_or(torch.isclose(kept, h_0)).all()
        torch.testing.assert_close(layer.eval()(x[:1], hx)[0], p * h_0 + (1 - p) * new)
    layer.zoneout = 0.25
    many = layer.train()(x[:1, :1].expand(1, 4000, 5), tuple(s[:, :1].expand(1, 4000, 7) for s in hx)
                         if name == "LSTM" else hx[:, :1].expand(1, 4000, 7))[0]  # fmt: skip
    assert abs((many == h_0[:, :1]).double().mean() - 0.25) < 0.02


@pytest.mark.parametrize("name", LAYERS[:2])
def test_recurrent_dropout_keeps_one_mask(name):
    """With probability 1 no h enters W_hh; in between, a sample's mask is the same in all steps; not in evaluation."""
    layer, x = varied(name, recurrent_dropout=1.0, bidirectional=True)
    without = copy.deepcopy(layer).eval()
    torch.testing.assert_close(layer.eval()(x)[0], without(x)[0])
    with torch.no_grad():
        without.weight_hh_l0.zero_(), without.weight_hh_l0_reverse.zero_()
    torch.testing.assert_close(layer.train()(x)[0], without(x)[0])
    layer, x = varied(name, recurrent_dropout=0.5)
    with torch.no_grad():  # h' is a function of the masked h alone
        layer.weight_ih_l0.zero_()
    seen = []
    original = torch.nn.functional.linear

    def linear(input, *args):
        seen.append(input)
        return original(input, *args)

    torch.nn.functional.linear = linear
    try:
        layer(x)
    finally:
        torch.nn.functional.linear = original
    zeros = torch.stack(seen[2:]) == 0  # the first product is of x, the second of h_0 = 0
    assert (zeros == zeros[0]).all() and zeros.any() and not zeros.all()


@pytest.mark.parametrize("name", LAYERS[:2])
def test_varied_layers_take_what_others_take(name):
    """Lengths, packed sequences, several layers, directions; second gradients; nothing where nothing is asked."""
    layer, x = varied(name, layer_norm=True, zoneout=0.1, num_layers=2, bidirectional=True)
    layer.eval()
    lengths = torch.tensor([4, 2, 3])
    padded = layer(x, lengths=lengths)
    packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close(torch.nn.utils.rnn.pad_packed_sequence(packed[0])[0], padded[0])
    torch.testing.assert_close(flat(packed[1:]), flat(padded[1:]))
    small = getattr(cvfast.nn, name)(2, 2, layer_norm=True, zoneout=0.1, dtype=torch.float64).eval()
    inputs = [torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradgradcheck(lambda x: small(x)[0], inputs)
    plain = getattr(cvfast.nn, name)(5, 7)
    assert plain.state_dict().keys() == getattr(torch.nn, name)(5, 7).state_dict().keys()
    assert repr(plain) == repr(getattr(torch.nn, name)(5, 7))
    assert "layer_norm=True, zoneout=0.1" in repr(layer)


def test_wrong_variations():
    x, layer = torch.zeros(2, 1, 3), cvfast.nn.LSTM(3, 4)
    call = lambda **options: cvfast.functional.lstm(x, None, layer._flat_weights, **options)  # noqa: E731
    with pytest.raises(RuntimeError, match="recurrent_dropout has to be between 0 and 1, but got 1.5"):
        call(recurrent_dropout=1.5)
    with pytest.raises(RuntimeError, match="zoneout has to be between 0 and 1, but got -1"):
        call(zoneout=(0.1, -1))
    with pytest.raises(RuntimeError, match="zoneout must be one probability or two, got 3"):
        call(zoneout=(0.1, 0.1, 0.1))
    with pytest.raises(RuntimeError, match="Expected layer_norm of sizes"):
        call(layer_norm=[torch.ones(16)])
    with pytest.raises(RuntimeError, match="run in torch's operators"):
        call(zoneout=0.1, backend="ext")


# Packed weights


@pytest.mark.parametrize(
    "change", ["in place", "data in place", "data", "numpy", "load_state_dict", "optimizer", "parameter"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_changed_are_packed_again(name, change):
    torch.manual_seed(0)
    layer, x = getattr(cvfast.nn, name)(5, 20, num_layers=2), torch.randn(4, 3, 5)

    def result():
        with torch.no_grad():
            return layer(x)[0]

    first = [result() for _ in range(3)]  # the third one with packed weights
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    for parameter in layer.parameters():
        if change == "in place":
            with torch.no_grad():
                parameter.mul_(1.5)
        elif change == "data in place":
            parameter.data.mul_(1.5)
        elif change == "data":
            parameter.data = parameter.data * 1.5
        elif change == "numpy":
            parameter.detach().numpy()[:] *= 1.5
    if change == "load_state_dict":
        layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()})
    elif change == "optimizer":
        layer(x)[0].sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    elif change == "parameter":
        layer.weight_hh_l1 = torch.nn.Parameter(layer.weight_hh_l1 * 1.5)
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        expected = fresh(x)[0]
    assert not torch.equal(expected, first[0])
    for _ in range(3):
        assert torch.equal(result(), expected)


def test_packed_weights_go_with_the_layer():
    from cvfast import _packed

    before = len(_packed._kept)
    layer = cvfast.nn.LSTM(5, 20, num_layers=2)
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(4, 3, 5))
    assert len(_packed._kept) == before + 1  # all layers as one
    assert list(_packed._kept.values())[-1].forms
    del layer
    assert len(_packed._kept) == before


def test_plain_calls_are_not_asked_by_python():
    from cvfast.backends.ext import recurrent as ext

    layer, x, state = cvfast.nn.GRU(5, 20, 2), torch.randn(4, 3, 5), torch.randn(2, 3, 20)
    weights = layer._flat_weights
    with torch.no_grad():
        results = ext.run_unasked("gru", x, state, None, weights, True, 1)
        for ours, expected in zip(results[:2], layer(x, state), strict=True):
            assert torch.equal(ours, expected)
        assert ext.run_unasked("gru", x, state[:, :2], None, weights, True, 1) is None
        assert ext.run_unasked("gru", x, state, None, weights[:7], True, 1) is None
        assert ext.run_unasked("gru", x.double(), state, None, weights, True, 1) is None
    assert ext.run_unasked("gru", x, state, None, weights, True, 1) is None  # with derivatives


def test_packed_weights_and_inference_mode():
    with torch.inference_mode():
        layer, x = cvfast.nn.LSTM(5, 20), torch.randn(4, 3, 5)
        first = layer(x)[0]
        layer.weight_hh_l0.mul_(2)
        assert not torch.equal(layer(x)[0], first)


# Steps without the dispatcher


def step_operands(name: str, batch: int = 3, inputs: int = 5, hidden: int = 20):
    """(cell, input, h, c, weights and biases), c None but for the lstm."""
    torch.manual_seed(0)
    cell = getattr(cvfast.nn, name)(inputs, hidden)
    c = torch.randn(batch, hidden) if name == "LSTMCell" else None
    operator = {"LSTMCell": "lstm", "GRUCell": "gru", "RNNCell": "rnn_tanh"}[name]
    return operator, torch.randn(batch, inputs), torch.randn(batch, hidden), c, *cell.parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_direct_steps_are_the_operators(name, dtype):
    """Bit by bit, with parameters and tensors, with and without biases."""
    operator, *operands = step_operands(name)
    operands = [None if t is None else t.to(dtype) for t in operands]
    for given in (operands, [*operands[:5], None, None]):
        with torch.no_grad():
            direct = ext_cell.run_unasked(operator, *given)
            *expected, _ = getattr(torch.ops.cvfast, f"{operator}_cell")(*given, False)
        assert direct is not None and len(direct) == (2 if name == "LSTMCell" else 1)
        assert all(torch.equal(d, e) for d, e in zip(direct, expected, strict=False))


@pytest.mark.parametrize("name", CELLS)
def test_direct_steps_take_dense_tensors_that_fit(name):
    operator, *operands = step_operands(name)

    def taken(place: int, change) -> bool:
        given = list(operands)
        given[place] = change(given[place])
        return ext_cell.run_unasked(operator, *given) is not None

    class Subclass(torch.Tensor):
        pass

    with torch.no_grad():
        assert taken(0, torch.clone)
        for place in (0, 1, 3, 4):
            assert not taken(place, lambda t: t.double())
            assert not taken(place, lambda t: torch.cat([t, t])[:, ::2].contiguous())
            assert not taken(place, lambda t: t.t().contiguous().t())
            assert not taken(place, lambda t: t.to("meta"))
            assert not taken(place, lambda t: t.to_sparse())
            assert not taken(place, lambda t: t.as_subclass(Subclass))
            assert not taken(place, torch._neg_view)
            assert not taken(place, lambda t: t.flatten())
            assert not taken(place, lambda t: t[:0])
            assert not taken(place, lambda t: None)
        assert not taken(5, lambda t: None)
        assert not taken(6, lambda t: t[:-1])


def prepared_step(name: str = "GRUCell"):
    """A layer, its input and states, and what it calls before anything else."""
    operator, input, h, c, *_ = step_operands(name)
    layer = getattr(cvfast.nn, name)(input.shape[1], h.shape[1])
    return layer, input, h if c is None else (h, c), cvfast.functional.prepared_cell(operator)


def by_operator():
    operator, *operands = step_operands("GRUCell")
    return lambda: ext_cell.run_unasked(operator, *operands) is not None


def by_layer():
    layer, input, hx, prepared = prepared_step()
    return lambda: prepared(layer._parameters, input, hx) is not None


@pytest.mark.parametrize("way", [by_operator, by_layer])
def test_direct_steps_are_seen_by_nobody(way):
    """Whoever is to see operators' calls does."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    taken = way()
    assert not taken()
    with torch.no_grad():
        assert taken()
        for watching in (
            TorchFunctionMode(), TorchDispatchMode(), torch.autocast("cpu"), torch.profiler.profile(),
            torch.autograd.forward_ad.dual_level(), torch.enable_grad(),
        ):  # fmt: skip
            with watching:
                assert not taken()
        seen = []
        torch.func.vmap(lambda x: (seen.append(taken()), x)[1])(torch.zeros(2))
        assert seen == [False] and taken()
    with torch.inference_mode():
        assert taken()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_prepared_steps_are_the_functions(name, bias):
    layer, input, hx, prepared = prepared_step(name)
    function = getattr(cvfast.functional, {"LSTMCell": "lstm_cell", "GRUCell": "gru_cell", "RNNCell": "rnn_cell"}[name])
    if not bias:
        layer.bias_ih = layer.bias_hh = None
    with torch.no_grad():
        found = prepared(layer._parameters, input, hx)
        expected = function(input, hx, layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh)
        assert type(found) is type(expected) is type(layer(input, hx))
        for results in (found, layer(input, hx)):
            assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_prepared_steps_are_left_to_the_functions(name):
    """Where there is something to ask: no states, a weight elsewhere, another backend, measured choices."""
    from cvfast import _choices

    layer, input, hx, prepared = prepared_step(name)
    taken = lambda state=hx: prepared(layer._parameters, input, state) is not None  # noqa: E731
    with torch.no_grad():
        assert taken()
        assert not taken(None) and not taken(hx[:1]) and not taken([*hx]) and not taken("no state")
        with cvfast.use_backend("native"):
            assert not taken()
        with _choices.ignored():  # the table is another one
            assert not taken()
        seen = []
        torch.jit.trace(lambda x: (seen.append(taken()), x + 1)[1], input, check_trace=False)
        assert seen == [False] and taken()
        expected = layer(input, hx)
        torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh", torch.nn.Identity())
        assert not taken()
        results = layer(input, hx)
        assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


# Layers without the dispatcher


def prepared_run(layer, input, hx):
    """What a layer calls before anything else, with all that it takes."""
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[type(layer).__name__]
    h_0, c_0 = hx if cell == "lstm" else (hx, None)
    prepared = cvfast.functional.prepared_layers(cell)
    return lambda: prepared(input, h_0, c_0, list(layer.parameters()), layer.bias, 1 + layer.bidirectional)


def prepared_operands(name: str, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = getattr(cvfast.nn, name)(5, 20, **options).to(dtype)
    input = torch.randn(3, 4, 6, dtype=dtype).transpose(0, 1)[..., :5]  # of which the rows alone are dense
    h_0 = torch.randn(layer.num_layers * (1 + layer.bidirectional), 3, 20, dtype=dtype)
    return layer, input, (h_0, h_0.flip(0)) if name == "LSTM" else h_0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_prepared_layers_are_the_operators(name, options, dtype):
    """Bit by bit, before and after the weights are packed."""
    layer, input, hx = prepared_operands(name, dtype, **options)
    run = prepared_run(layer, input, hx)
    with cvfast.use_backend("ext"):  # that somebody chose: such calls ask
        output, states = layer(input, hx)
        assert run() is None
    expected = [output, *(states if name == "LSTM" else (states,))]
    with torch.no_grad():
        for _ in range(3):
            results = [r for r in run() if r is not None]
            assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))
            assert all(r.stride() == e.stride() for r, e in zip(results, expected, strict=True))
        output, states = layer(input)
        zeros = torch.zeros_like(expected[1])
        assert torch.equal(output, layer(input, (zeros, zeros) if name == "LSTM" else zeros)[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_prepared_layers_are_left_to_the_functions(name):
    layer, input, hx = prepared_operands(name)
    short = (hx[0], hx[1][:, :2]) if name == "LSTM" else hx[:, :2]
    run = prepared_run(layer, input, hx)
    assert run() is None
    with torch.no_grad():
        assert run() is not None
        with torch.autocast("cpu"):
            assert run() is None
        for other in (input.double(), input[..., :4], input[:0], input[:, :0], input.to("meta")):
            assert prepared_run(layer, other, hx)() is None
        assert prepared_run(layer, input, short)() is None
        with pytest.raises(RuntimeError):
            layer(input, short)
        layer.training = layer.batch_first = True
        assert layer(input.transpose(0, 1), hx)[0].shape == (3, 4, 20)
