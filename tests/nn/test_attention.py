"""Attention layers against torch's own: results, weights, gradients, state_dict and every option."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from cvfast import nn
from cvfast.backend import use_backend
from cvfast.functional import attention_lstm, attention_lstm_cell
from tests.conftest import isas

torch.manual_seed(0)
OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 12, "vdim": 10},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12},
]


def pair(**options) -> tuple[torch.nn.MultiheadAttention, nn.MultiheadAttention]:
    """torch's layer and cvfast's with the same parameters, in float64."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(16, 4, **options).double()
    ours = nn.MultiheadAttention(16, 4, **options).double()
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.nn.init.normal_(p)  # biases, too
        q.data.copy_(p.data)
    return theirs, ours


def inputs(layer: torch.nn.MultiheadAttention, batch: int | None = 3, queries: int = 7, keys: int = 9):
    sizes = zip((queries, keys, keys), (16, layer.kdim, layer.vdim), strict=True)
    shape = lambda n, e: (n, e) if batch is None else (batch, n, e) if layer.batch_first else (n, batch, e)  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape(n, e), dtype=torch.float64, generator=generator).requires_grad_() for n, e in sizes]


def compare(theirs, ours, tensors, **options):
    """Result, weights and all gradients agree."""
    expected, actual = (layer(*tensors, **options) for layer in (theirs, ours))
    torch.testing.assert_close(actual, expected)
    wanted = [[*tensors, *layer.parameters()] for layer in (theirs, ours)]
    grads = [
        torch.autograd.grad(result[0].square().sum(), w, allow_unused=True)
        for result, w in zip((expected, actual), wanted, strict=True)
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(two, one)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_options(options, need_weights):
    theirs, ours = pair(**options)
    compare(theirs, ours, inputs(theirs), need_weights=need_weights)
    compare(theirs, ours, inputs(theirs, batch=None), need_weights=need_weights)


def masks(kind: str, *shape: int):
    """A mask with the first key seen by all: bool (True: hidden), added numbers, or none."""
    if kind == "none":
        return None
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hidden = mask < 0.4
    hidden[..., 0] = False
    return hidden if kind == "bool" else mask.masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize(("attn", "padding"), list(itertools.product(("none", "bool", "float"), repeat=2)))
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_masks(attn, padding, options, need_weights):
    theirs, ours = pair(**options)
    for shape in ((7, 9), (12, 7, 9)):
        compare(theirs, ours, inputs(theirs), key_padding_mask=masks(padding, 3, 9), attn_mask=masks(attn, *shape),
                need_weights=need_weights)  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_causal_self_attention(need_weights, average):
    theirs, ours = pair(batch_first=True)
    x = inputs(theirs, queries=9)[1]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights, "average_attn_weights": average}
    actual, expected = (layer(x, x, x, **options) for layer in (ours, theirs))
    torch.testing.assert_close(actual, expected)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_row_that_sees_nothing_gives_the_bias_and_no_gradient(need_weights):
    _, ours = pair(batch_first=True)
    q, k, v = inputs(ours)
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    hidden[1] = True
    output, weights = ours(q, k, v, key_padding_mask=hidden, need_weights=need_weights)
    torch.testing.assert_close(output[1], ours.out_proj.bias.expand(7, 16))
    if need_weights:
        assert torch.equal(weights[1], torch.zeros(7, 9, dtype=torch.float64))
    for grad in torch.autograd.grad(output.sum(), (q, k, v)):
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))
        assert grad[0].abs().sum() > 0


def test_it_is_torchs_layer():
    theirs, ours = pair(kdim=12)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_torchs_transformer_layers_take_it(name):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(16, 4, 32, batch_first=True, dropout=0.0).double()
    ours = getattr(torch.nn, name)(16, 4, 32, batch_first=True, dropout=0.0).double()
    for attribute in ("self_attn", "multihead_attn"):
        if hasattr(ours, attribute):
            setattr(ours, attribute, nn.MultiheadAttention(16, 4, batch_first=True).double())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    args = (x,) if name == "TransformerEncoderLayer" else (x, torch.randn(2, 5, 16, dtype=torch.float64))
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(*args), theirs.train(training)(*args))


def test_torchs_module_inputs():
    """torch's own module tests' inputs give torch's results, with and without gradients."""
    from torch.testing._internal.common_modules import module_db

    info = next(m for m in module_db if m.module_cls is torch.nn.MultiheadAttention)
    count = 0
    for training in (True, False):
        for case in info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
        ):
            args, options = case.constructor_input.args, dict(case.constructor_input.kwargs)
            options.update(device="cpu", dtype=torch.float64)
            theirs, ours = (c(*args, **options).train(training) for c in (info.module_cls, nn.MultiheadAttention))
            ours.load_state_dict(theirs.state_dict())
            if theirs.dropout and training:
                continue  # another random stream
            forward = case.forward_input
            actual, expected = (layer(*forward.args, **forward.kwargs) for layer in (ours, theirs))
            torch.testing.assert_close(actual, expected)
            count += 1
    assert count > 20


def swap_attention(module: torch.nn.Module) -> torch.nn.Module:
    """The module with cvfast's attention, its parameters kept, in place of torch's."""
    for name, child in module.named_children():
        if type(child) is torch.nn.MultiheadAttention:
            bias, dtype = child.in_proj_bias is not None, child.in_proj_weight.dtype
            options = {"bias": bias, "batch_first": child.batch_first, "dtype": dtype}
            ours = nn.MultiheadAttention(child.embed_dim, child.num_heads, child.dropout, **options)
            ours.load_state_dict(child.state_dict())
            setattr(module, name, ours)
        else:
            swap_attention(child)
    return module


@pytest.mark.parametrize("name", ["Transformer", "TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_torchs_transformer_inputs(name):
    """torch's own inputs for its Transformer modules give torch's results with cvfast's attention in them."""
    from torch.testing._internal.common_modules import module_db

    info = next(m for m in module_db if m.module_cls is getattr(torch.nn, name))
    count = 0
    for training in (True, False):
        for case in info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
        ):
            args, options = case.constructor_input.args, dict(case.constructor_input.kwargs, dtype=torch.float64)
            module = info.module_cls(*args, **options).train(training)
            if training and any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in module.modules()):
                continue  # another random stream
            forward = case.forward_input
            expected = module(*forward.args, **forward.kwargs)
            actual = swap_attention(module)(*forward.args, **forward.kwargs)
            torch.testing.assert_close(actual, expected)
            count += 1
    assert count > 0


@pytest.mark.parametrize("causal", [False, True])
def test_weights_without_gradients(causal):
    """Where nothing is derived, averaged weights come without those of each head, and are the same."""
    theirs, ours = pair(batch_first=True)
    x = inputs(theirs, queries=9)[1]
    padding = masks("bool", 3, 9)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64) if causal else None
    options = {"key_padding_mask": padding, "attn_mask": mask, "is_causal": causal}
    with torch.no_grad():
        actual, expected = (layer.eval()(x, x, x, **options) for layer in (ours, theirs))
    torch.testing.assert_close(actual, expected)


def test_additive_attention_layer():
    """The definition's numbers; keys that were projected before give the same; every parameter has a gradient."""
    from cvfast import reference

    layer = nn.AdditiveAttention(6, 5, 8).double()
    query, keys = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 7, 5, dtype=torch.float64)
    mask = torch.rand(3, 7) < 0.7
    expected = reference.additive_attention(query, keys, keys, layer.w_query, layer.w_key, layer.v, mask)
    torch.testing.assert_close(layer(query, keys, mask=mask), expected)
    projected = layer.project_keys(keys)
    torch.testing.assert_close(layer(query, keys, mask=mask, projected_keys=projected), expected)
    layer(query, keys, mask=mask)[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_attention_lstm_cell(score):
    """One step is attention by h, then torch's cell on [input, context]; hidden keys have weight 0."""
    cell = nn.AttentionLSTMCell(3, 6, 5, 8, score).double()
    x, keys = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 7, 5, dtype=torch.float64)
    state = (torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64))
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]]).bool()
    if score == "additive":
        scores = torch.tanh((state[0] @ cell.attention.w_query.t())[:, None] + keys @ cell.attention.w_key.t())
        scores = scores @ cell.attention.v
    else:
        scores = torch.einsum("bk,bsk->bs", cell.attention(state[0]), keys) / 5**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    context = torch.einsum("bs,bsk->bk", weights, keys)
    expected = (*cell.cell(torch.cat((x, context), 1), state), context, weights)
    hidden = keys.masked_fill(~mask.unsqueeze(-1), torch.nan)
    for projected in (None, cell.project_keys(keys)):
        for values in (keys, hidden):
            torch.testing.assert_close(cell(x, values, state, mask, projected), expected)
            with torch.no_grad():  # one call of the kernels
                torch.testing.assert_close(cell(x, values, state, mask, projected), expected)
    with pytest.raises(ValueError, match="unknown score 'cosine'; allowed: additive, dot"):
        nn.AttentionLSTMCell(3, 6, 5, score="cosine")


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_attention_lstm_cell_in_one_call(monkeypatch, score, isa):
    """Without gradients a step is one operator, with the parts' results; where no key is seen the context is 0."""
    cell = nn.AttentionLSTMCell(24, 40, 36, 20, score).requires_grad_(False)
    wide = copy.deepcopy(cell).double()
    x, keys, state = torch.randn(3, 24), torch.randn(3, 19, 36), (torch.randn(3, 40), torch.randn(3, 40))
    mask = torch.rand(3, 19, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False
    projected = cell.project_keys(keys)
    with monkeypatch.context() as patch:
        patch.setattr("cvfast._functional.attention_lstm.lstm_cell", None)  # the composed step would call it
        found = cell(x, keys, state, mask, projected)
    exact = wide(x.double(), keys.double(), tuple(s.double() for s in state), mask, wide.project_keys(keys.double()))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    assert (found[2][1] == 0).all()


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_in_one_call(monkeypatch, bias, isa):
    """Without gradients and masks the layer is one operator, with the very bits of its parts, and no stale weights."""
    monkeypatch.setattr("cvfast.backends.ext.linear.is_torchs", lambda *args: False)
    monkeypatch.setattr("cvfast.backends.ext.linear.why_slower", lambda *args: [])
    layer = nn.MultiheadAttention(48, 3, bias=bias, batch_first=True).requires_grad_(False)
    if bias:
        torch.nn.init.normal_(layer.in_proj_bias), torch.nn.init.normal_(layer.out_proj.bias)
    x = torch.randn(3, 37, 48)
    attend = lambda x: layer(x, x, x, need_weights=False)[0]  # noqa: E731
    for _ in range(3):  # weights are packed at the second call
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(nn.MultiheadAttention, "_project", None)  # the steps would call it
            found, alone = attend(x), attend(x[1:2])
        parts = attend(x)  # outside of no_grad
        wide = copy.deepcopy(layer).double()
        exact = wide(x.double(), x.double(), x.double(), need_weights=False)[0]
        torch.testing.assert_close(found, parts, rtol=0, atol=0)
        torch.testing.assert_close(found[1:2], alone, rtol=0, atol=0)
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
        layer.in_proj_weight.mul_(1.1), layer.out_proj.weight.mul_(0.9)


def test_self_attention_in_steps(monkeypatch):
    """What one call does not know is left to the steps: masks, weights, gradients, other dtypes, autocast."""
    monkeypatch.setattr("cvfast.backends.ext.linear.is_torchs", lambda *args: False)
    monkeypatch.setattr("cvfast.backends.ext.attention.SELF_ATTENTION", None)  # one call would call it
    x = torch.randn(2, 5, 16)
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(layer.state_dict())
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(
        layer(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0], rtol=1e-5, atol=1e-6
    )
    with torch.no_grad():
        for options in ({"attn_mask": causal, "is_causal": True, "need_weights": False}, {"need_weights": True}):
            expected = theirs.train()(x, x, x, **options)  # in eval mode torch has a path of its own
            torch.testing.assert_close(layer(x, x, x, **options), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            layer(x, x, x, need_weights=False, is_causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x, x, x, need_weights=False)[0].dtype == torch.bfloat16
        wide = x.double()
        assert layer.double()(wide, wide, wide, need_weights=False)[0].dtype == torch.float64


def by_step(cell, x, keys, state, mask):
    """As AttentionLSTMCell.unroll, by the definition of one step."""
    steps, projected = [], cell.project_keys(keys)
    for word in x.unbind(1):
        *state, context, weights = cell(word, keys, state, mask, projected)
        steps.append((state[0], context, weights))
    output, contexts, weights = (torch.stack(of_steps, 1) for of_steps in zip(*steps, strict=True))
    return output, tuple(state), contexts, weights


def decoder(score: str, bias: bool, masked: bool, dtype=torch.float32, sizes=(3, 4, 19, 24, 40, 36, 20)):
    """A cell, its input and operands with gradients, and a mask that hides all keys of one sample."""
    batch, steps, places, inputs, hidden, features, size = sizes
    cell = nn.AttentionLSTMCell(inputs, hidden, features, size, score)
    if not bias:
        cell.cell = nn.LSTMCell(inputs + features, hidden, bias=False)
    shapes = ((batch, steps, inputs), (batch, places, features), (batch, hidden), (batch, hidden))
    operands = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    mask = torch.rand(batch, places) < 0.6 if masked else None
    if masked:
        mask[1] = False
    return cell.to(dtype), operands, mask


def decoded(cell, operands, mask, unroll, create_graph=False):
    """Results, and the gradients of operands and parameters to a function of all results."""
    x, keys, h, c = operands
    output, (h_n, c_n), contexts, weights = unroll(cell, x, keys, (h, c), mask)
    results = output, h_n, c_n, contexts, weights
    total = sum((r.sin() * torch.arange(r.numel()).view(r.shape).to(r).cos()).sum() for r in results)
    return *results, *torch.autograd.grad(total, (*operands, *cell.parameters()), create_graph=create_graph)


@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("score", "bias"), [("additive", True), ("additive", False), ("dot", True)])
def test_attention_lstm(score, bias, masked, isa):
    """A sequence at once gives the steps' results and gradients."""
    cell, operands, mask = decoder(score, bias, masked)
    with use_backend("native"):
        wide = [t.detach().double().requires_grad_() for t in operands]
        expected = decoded(copy.deepcopy(cell).double(), wide, mask, by_step)
    found = decoded(cell, operands, mask, nn.AttentionLSTMCell.unroll)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 3e-6 * b.norm()
    with torch.no_grad():
        x, keys, *state = operands
        output, (_, c_n), contexts, weights = cell.unroll(x, keys, state, mask)
    for a, b in zip((output, c_n, contexts, weights), (found[0], *found[2:5]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_attention_lstm_second_gradients(score):
    cell, operands, mask = decoder(score, True, True, torch.float64, (2, 2, 5, 3, 4, 3, 6))
    inputs = (*operands, *cell.parameters())
    seconds = []
    for unroll in (nn.AttentionLSTMCell.unroll, by_step):
        *_, of_x, of_keys, of_h, of_c = decoded(cell, operands, mask, unroll, create_graph=True)[:9]
        total = sum(g.square().sum() for g in (of_x, of_keys, of_h, of_c))
        seconds.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_lstm_keeps_hidden_nans_and_other_dtypes():
    """NaN in hidden values reaches nothing; a single parameter may want its gradient; autocast has the steps."""
    cell, (x, keys, *state), mask = decoder("additive", True, True)
    cell.requires_grad_(False)
    hidden, projected = keys.masked_fill(~mask.unsqueeze(-1), torch.nan), cell.project_keys(keys)
    results = [cell.unroll(x, values, state, mask, projected) for values in (keys, hidden)]
    gradients = [torch.autograd.grad(output.sum() + weights.sum(), x)[0] for output, _, _, weights in results]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    x, keys, *state = (t.detach() for t in (x, keys, *state))
    bias = cell.cell.bias_hh.requires_grad_()
    first = torch.autograd.grad(cell.unroll(x[:, :1], keys, state, mask)[0].sum(), bias, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), bias)[0].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert cell.unroll(x, keys, state, mask)[0].dtype == torch.bfloat16


def test_attention_lstm_errors():
    cell, (x, keys, *state), _ = decoder("additive", True, False)
    with pytest.raises(RuntimeError, match=r"input \[B, T, I\] with T > 0, but got \[3, 0, 24\]"):
        cell.unroll(x[:, :0], keys, state)
    with pytest.raises(RuntimeError, match=r"expected, in one dtype, input \[T, B, I\].*float32 \[4, 2, 24\]"):
        cell.unroll(x[:2], keys, state)
    w = cell.attention
    with pytest.raises(ValueError, match="attention_lstm: additive scores take w_key or projected_keys.*None"):
        attention_lstm(x, keys, state, w.w_query, w.v, cell.cell.weight_ih, cell.cell.weight_hh)


def test_attention_lstm_cell_errors():
    cell = nn.AttentionLSTMCell(3, 6, 5, 8).requires_grad_(False)
    x, keys, state = torch.randn(2, 3), torch.randn(2, 7, 5), (torch.randn(2, 6), torch.randn(2, 6))
    with pytest.raises(RuntimeError, match=r"expected, in one dtype, input \[B, I\].*float32 \[3, 3\]"):
        cell(torch.randn(3, 3), keys, state, projected_keys=cell.project_keys(keys))
    w = cell.attention
    weights = (cell.cell.weight_ih, cell.cell.weight_hh)
    with pytest.raises(ValueError, match="additive scores take w_key or projected_keys.*None"):
        attention_lstm_cell(x, keys, state, w.w_query, w.v, *weights)
    with pytest.raises(ValueError, match="dot products neither"):
        attention_lstm_cell(x, keys, state, w.w_query, None, *weights, w_key=w.w_key)
