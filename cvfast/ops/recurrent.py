"""The cards of lstm, gru, rnn_tanh and rnn_relu: one layer and direction, one step, and the derivative as an operator.

The derivative's own derivative, of any order, is that of the definition written in torch's operators (`unrolled`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cvfast.ops.card import Card, call, kernel, looped, register, transforms

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
NUMBERS = {cell: number for number, cell in enumerate(CELLS)}  # of csrc/include/cvfast/recurrent.h
SAVED = {"lstm": 5, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}  # numbers kept per hidden unit and step
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

# input [T, B, I] with lengths [B] (int64; None: all T), or [N, I] with batch_sizes [T] as in torch's PackedSequence;
# h_0 [B, O], c_0 [B, H] (lstm only), weights as torch's layers have them. reverse: from the last step to the first.
_OPERANDS = (
    "Tensor input, Tensor? lengths, Tensor? batch_sizes, Tensor h_0, Tensor? c_0, Tensor w_ih, Tensor w_hh, "
    "Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, bool reverse"
)
_TENSORS = 10  # of them; the differentiable ones:
_INPUT, _H_0, _C_0, _W_IH, _W_HH, _B_IH, _B_HH, _W_HR = _DIFFERENTIABLE = (0, 3, 4, 5, 6, 7, 8, 9)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 and float16 are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wants_saved(*tensors: Tensor | None) -> bool:
    """Whether a call should keep what its derivative needs (without it the derivative computes it again)."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():  # Dynamo knows no _any_requires_grad
        return any(t is not None and t.requires_grad for t in tensors)
    return torch._C._any_requires_grad(*tensors)


# forward: (operands, save) -> output as input, h_n as h_0, c_n as c_0 ([0] without), saved [steps, SAVED * H] ([0]
# without)


def _forward_fake(cell, input, lengths, batch_sizes, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, save):
    rows, hidden = input.shape[:-1], w_ih.shape[0] // GATES[cell]
    output = input.new_empty(*rows, h_0.shape[1])
    c_n = input.new_empty(0) if c_0 is None else input.new_empty(c_0.shape)
    count = rows[0] if batch_sizes is not None else rows[0] * rows[1]
    saved = input.new_empty((count, SAVED[cell] * hidden) if save else (0,), dtype=compute_dtype(input.dtype))
    return output, input.new_empty(h_0.shape), c_n, saved


def _forward_setup(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, _ = inputs
    result, _, c_n, saved = output
    ctx.mark_non_differentiable(*((saved, c_n) if tensors[_C_0] is None else (saved,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, result, saved)


def _forward_backward(cell, ops, ctx, needs, grad_output, grad_h_n, grad_c_n, _):
    *tensors, output, saved = ctx.saved_tensors
    if saved.dim() == 1:
        with torch.no_grad():
            output, _, _, saved = getattr(ops, cell).default(*tensors, ctx.reverse, True)
    grad_c_n = None if tensors[_C_0] is None else grad_c_n
    wanted = needs[_INPUT], any(needs[_W_IH:_TENSORS])
    op = getattr(ops, f"{cell}_backward").default
    grads = call(op, output, saved, grad_output, grad_h_n, grad_c_n, *tensors, ctx.reverse, *wanted)
    return (*_by_operand(tensors, needs, grads), None, None)


def _by_operand(
    tensors: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the differentiable operands at the places of all; None where none is needed."""
    result: list[Tensor | None] = [None] * _TENSORS
    for place, grad in zip(_DIFFERENTIABLE, grads, strict=True):
        if needs[place] and tensors[place] is not None:
            result[place] = grad
    return result


def _forward_vmap(cell, ops, info, in_dims, *args):
    input, lengths, batch_sizes, h_0, c_0, *weights, reverse, save = args
    if any(d is not None for d in in_dims[_W_IH:_TENSORS]) or batch_sizes is not None:
        return looped(getattr(ops, cell), info, in_dims, args)
    # Shared weights: vmap's dimension becomes the outer part of the batch.
    size = info.batch_size
    batch_dims = (1, 0, 0, 0, 0)
    folded = [_fold(t, d, b, size) for t, d, b in zip(args[:5], in_dims[:5], batch_dims, strict=True)]
    output, h_n, c_n, _ = getattr(ops, cell)(*folded, *weights, reverse, False)
    c_n = c_n.expand(size, 0) if c_0 is None else c_n.unflatten(0, (size, -1))
    saved = torch.empty(size, 0, dtype=compute_dtype(input.dtype), device=input.device)
    return (output.unflatten(1, (size, -1)), h_n.unflatten(0, (size, -1)), c_n, saved), (1, 0, 0, 0)


def _fold(tensor: Tensor | None, dim: int | None, into: int, size: int) -> Tensor | None:
    """Merges vmap's dimension `dim` (None: not there) into dimension `into` of the rest, as its outer part."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, into).flatten(into, into + 1)


# cell: input [B, I], h [B, H], c [B, H] (lstm only) -> h, c ([0] without), saved, all after the step


def _cell_fake(cell, input, h, c, w_ih, w_hh, b_ih, b_hh, save):
    saved = input.new_empty((h.shape[0], SAVED[cell] * h.shape[1]) if save else (0,), dtype=compute_dtype(input.dtype))
    return input.new_empty(h.shape), input.new_empty(0 if c is None else c.shape), saved


def _cell_setup(ctx, inputs, output) -> None:
    *tensors, _ = inputs
    _, c, saved = output
    ctx.mark_non_differentiable(*((saved, c) if tensors[2] is None else (saved,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, saved)


def _cell_backward(cell, ops, ctx, needs, grad_h, grad_c, _):
    input, h, c, *weights, saved = ctx.saved_tensors
    if saved.dim() == 1:
        with torch.no_grad():
            saved = getattr(ops, f"{cell}_cell").default(input, h, c, *weights, True)[2]
    grads = call(
        getattr(ops, f"{cell}_backward").default, h.unsqueeze(0), saved, None, grad_h, None if c is None else grad_c,
        input.unsqueeze(0), None, None, h, c, *weights, None, False, needs[0], any(needs[3:7]),
    )  # fmt: skip
    grads = (grads[0].squeeze(0), *grads[1:7])
    tensors = (input, h, c, *weights)
    return *(g if n and t is not None else None for g, n, t in zip(grads, needs, tensors, strict=False)), None


def _cell_vmap(cell, ops, info, in_dims, input, h, c, *weights_and_save):
    op, size = getattr(ops, f"{cell}_cell"), info.batch_size
    if any(d is not None for d in in_dims[3:]):
        return looped(op, info, in_dims, (input, h, c, *weights_and_save))
    operands = [_fold(t, d, 0, size) for t, d in zip((input, h, c), in_dims[:3], strict=True)]
    new_h, new_c, saved = op(*operands, *weights_and_save[:-1], False)
    new_c = new_c.expand(size, 0) if c is None else new_c.unflatten(0, (size, -1))
    return (new_h.unflatten(0, (size, -1)), new_c, saved.expand(size, 0)), (0, 0, 0)


# backward: (output; saved; gradients of output, h_n, c_n; operands; input_grad; weight_grads) -> gradients of input,
# h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr; [0] ([0, 0, 0] of the input) for one that is not wanted or not there


def _backward_fake(output, saved, grad_output, grad_h_n, grad_c_n, *rest):
    tensors, (_, input_grad, weight_grads) = rest[:_TENSORS], rest[_TENSORS:]
    input = tensors[_INPUT]
    wanted = (input_grad, True, True, *(weight_grads for _ in range(5)))
    grads = [
        input.new_empty(tensors[place].shape if want and tensors[place] is not None else (0,))
        for place, want in zip(_DIFFERENTIABLE, wanted, strict=True)
    ]
    if not input_grad:
        grads[0] = input.new_empty(0, 0, 0)
    return tuple(grads)


def _backward_setup(ctx, inputs, output) -> None:
    _, _, *grads_and_tensors, ctx.reverse, _, _ = inputs
    ctx.save_for_backward(*grads_and_tensors)
    ctx.set_materialize_grads(False)


def _backward_backward(cell, ops, ctx, needs, *cotangents):
    """The derivative of the definition's derivative; differentiable itself."""
    grads, tensors = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    present = [p for p in _DIFFERENTIABLE if tensors[p] is not None]
    given = [i for i, g in enumerate(grads) if g is not None]

    def definition(*values: Tensor) -> tuple[Tensor, ...]:
        operands = list(tensors)
        for place, value in zip(present, values, strict=True):
            operands[place] = value
        results = unrolled(cell, *operands, ctx.reverse)
        return tuple(results[i] for i in given)

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        _, pull = vjp(definition, *values[len(given) :])
        return pull(values[: len(given)])

    values = [*(grads[i] for i in given), *(tensors[p] for p in present)]
    results, pull = vjp(gradients, *values)
    by_place = dict(zip(_DIFFERENTIABLE, cotangents, strict=True))
    seconds = iter(pull(tuple(
        torch.zeros_like(r) if by_place[p] is None or by_place[p].shape != r.shape else by_place[p]
        for p, r in zip(present, results, strict=True)
    )))  # fmt: skip
    of_grads = [None if g is None else next(seconds) for g in grads]
    of_tensors: list[Tensor | None] = [None] * _TENSORS
    for place in present:
        of_tensors[place] = next(seconds)
    return (None, None, *of_grads, *of_tensors, None, None, None)


def vjp(function: Callable, *values: Tensor) -> tuple[tuple[Tensor, ...], Callable]:
    """torch.func.vjp. Nested, it cannot be traced by torch 2.11: without need of its levels, plain autograd does it."""
    if transforms() is not None:
        return torch.func.vjp(function, *values)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        values = tuple(v.view_as(v).requires_grad_() for v in values)
        results = function(*values)

    def pull(cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(v) for v in values)
        return torch.autograd.grad(
            [r for r, _ in pairs], values, [c for _, c in pairs],
            create_graph=differentiable, allow_unused=True, materialize_grads=True,
        )  # fmt: skip

    return results, pull


def _backward_vmap(cell, ops, info, in_dims, *args):
    return looped(getattr(ops, f"{cell}_backward"), info, in_dims, args)


# The definition


class Variation(NamedTuple):
    """What `unrolled` does beside torch's definition; h_mask [B, O] multiplies h where it enters W_hh.

    gains: of W_ih x and W_hh h [G H] and of the lstm's c [H], which are normalised first, or None; c_bias [H].
    zoneout_h, zoneout_c: probabilities with which a unit keeps its state; sampled in training, else their expectation.
    """

    h_mask: Tensor | None
    gains: tuple[Tensor, ...] | None
    c_bias: Tensor | None
    zoneout_h: float
    zoneout_c: float
    train: bool

    def normalised(self, which: int, x: Tensor) -> Tensor:
        """x normalised over its last dimension; which: x, h or c."""
        if self.gains is None:
            return x
        bias = self.c_bias if which == 2 else None
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.gains[which], bias)

    def zoned_out(self, old: Tensor, new: Tensor, probability: float) -> Tensor:
        if probability == 0:
            return new
        if self.train:
            return torch.where(torch.rand_like(new) < probability, old, new)
        return new + probability * (old - new)


_PLAIN = Variation(None, None, None, 0.0, 0.0, False)


def unrolled(
    cell, input, lengths, batch_sizes, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, variation: Variation = _PLAIN
):
    """The operator step by step in torch's operators: (output, h_n, c_n or None)."""
    if batch_sizes is not None:
        output, h, c = unrolled(
            cell, _padded(input, batch_sizes, len(h_0)), _lengths(batch_sizes, len(h_0)), None, h_0, c_0,
            w_ih, w_hh, b_ih, b_hh, w_hr, reverse, variation,
        )  # fmt: skip
        return torch.cat([output[t, :n] for t, n in enumerate(batch_sizes.tolist())] or [output[:0, 0]]), h, c
    dtype = compute_dtype(input.dtype)
    wide = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    w_ih, w_hh, b_ih, b_hh, w_hr = map(wide, (w_ih, w_hh, b_ih, b_hh, w_hr))
    x = _affine(variation, 0, wide(input), w_ih, b_ih)
    h, c = wide(h_0), wide(c_0)
    outputs: list[Tensor] = []
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        seen = h if variation.h_mask is None else h * variation.h_mask
        new_h, new_c = step(cell, x[t], _affine(variation, 1, seen, w_hh, b_hh), h, c, variation)
        new_h = new_h if w_hr is None else torch.nn.functional.linear(new_h, w_hr)
        new_h = variation.zoned_out(h, new_h, variation.zoneout_h)
        new_c = None if c is None else variation.zoned_out(c, new_c, variation.zoneout_c)
        if lengths is None:
            h, c = new_h, new_c
            outputs.append(h)
        else:
            runs = (t < lengths)[:, None].to(h.device)
            h, c = torch.where(runs, new_h, h), None if c is None else torch.where(runs, new_c, c)
            outputs.append(torch.where(runs, new_h, torch.zeros_like(new_h)))
    outputs = outputs[::-1] if reverse else outputs
    output = torch.stack(outputs) if outputs else h.new_zeros(0, *h.shape)
    narrow = lambda t: None if t is None else t.to(input.dtype)  # noqa: E731
    return narrow(output), narrow(h), narrow(c)


def _affine(variation: Variation, which: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if variation.gains is None:
        return torch.nn.functional.linear(x, weight, bias)
    y = variation.normalised(which, torch.nn.functional.linear(x, weight))
    return y if bias is None else y + bias


def step(
    cell: str, x: Tensor, r: Tensor, h: Tensor, c: Tensor | None, variation: Variation = _PLAIN
) -> tuple[Tensor, Tensor | None]:
    """One cell from the projections x = W_ih x_t + b_ih and r = W_hh h + b_hh: the new h (not projected) and c."""
    if cell == "lstm":
        i, f, g, o = (x + r).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * variation.normalised(2, c).tanh(), c
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), r.chunk(3, -1)
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return n + (x_z + h_z).sigmoid() * (h - n), None
    return (x + r).relu() if cell == "rnn_relu" else (x + r).tanh(), None


def _lengths(batch_sizes: Tensor, batch: int) -> Tensor:
    """Steps of each sample of a packed sequence."""
    return (batch_sizes[:, None] > torch.arange(batch)).sum(0)


def _padded(data: Tensor, batch_sizes: Tensor, batch: int) -> Tensor:
    """[T, batch, I] from packed rows."""
    rows = [torch.nn.functional.pad(r, (0, 0, 0, batch - len(r))) for r in data.split(batch_sizes.tolist())]
    return torch.stack(rows) if rows else data.new_zeros(0, batch, data.shape[1])


def _cards(cell: str) -> list[Card]:
    def bound(function):
        return lambda *args: function(cell, *args)

    return [
        Card(
            f"{cell}({_OPERANDS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
            bound(_forward_fake), _forward_setup, bound(_forward_backward), bound(_forward_vmap),
        ),
        Card(
            f"{cell}_cell(Tensor input, Tensor h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
            "bool save) -> (Tensor, Tensor, Tensor)",
            bound(_cell_fake), _cell_setup, bound(_cell_backward), bound(_cell_vmap),
        ),
        Card(
            f"{cell}_backward(Tensor output, Tensor saved, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
            f"{_OPERANDS}, bool input_grad, bool weight_grads) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            _backward_fake, _backward_setup, bound(_backward_backward), bound(_backward_vmap), casts=False,
        ),
    ]  # fmt: skip


register([card for cell in CELLS for card in _cards(cell)])

# All layers and directions at once, as csrc/bindings/recurrent.cpp says; h_0 and c_0 [layers * directions, B, ..].
STACK = {
    cell: kernel(
        f"{cell}_stack(Tensor input, Tensor? lengths, Tensor? batch_sizes, Tensor h_0, Tensor? c_0, Tensor[] weights, "
        "bool biases, int directions, Tensor? packed) -> (Tensor, Tensor, Tensor)"
    )
    for cell in CELLS
}
PACK = {cell: kernel(f"{cell}_pack(Tensor[] weights, bool biases, int count) -> Tensor") for cell in CELLS}
