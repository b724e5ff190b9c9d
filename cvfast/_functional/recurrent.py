"""lstm, gru, rnn and their cells: checks, and the normal form of their arguments that backends take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from cvfast import backend as _backend

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Weights(NamedTuple):
    """One layer and direction: w_ih [G H, I], w_hh [G H, O], b_ih and b_hh [G H] or None, w_hr [O, H] or None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


class Call(NamedTuple):
    """The normal form of a call; `weights` are those of layer 0 forwards, layer 0 backwards, layer 1 forwards, ...

    input [T, B, I] with lengths ([B] int64 on the CPU, or None: all T), or packed [N, I] with batch_sizes [T].
    h_0 [layers * directions, B, O], c_0 [layers * directions, B, H] (lstm only).
    """

    cell: str
    input: Tensor
    h_0: Tensor
    c_0: Tensor | None
    weights: tuple[Weights, ...]
    directions: int
    dropout: float  # between the layers
    lengths: Tensor | None
    batch_sizes: Tensor | None
    # Beside torch's definition; `norms` as `weights` (see `lstm`), zoneout of h and c.
    norms: tuple[tuple[Tensor, ...], ...] | None = None
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    train: bool = False

    @property
    def varies(self) -> bool:
        """Whether the call is more than torch's definition."""
        return self.norms is not None or self.recurrent_dropout > 0 or max(self.zoneout) > 0


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    layer_norm: Sequence[Tensor] | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor, Tensor]:
    """A stack of long short-term memory layers (Hochreiter and Schmidhuber 1997), with torch.nn.LSTM's mathematics.

    T steps, B samples, I inputs, H hidden units, O = units of the output: H, or fewer with a projection.

    Args:
        input: [T, B, I], [B, T, I] with `batch_first`, [T, I], or a PackedSequence. T and B may be 0.
        hx: (h_0 [layers * directions, B, O], c_0 [.., B, H]), without B for [T, I]; None: zeros.
        params: torch's `_flat_weights`: per layer and direction w_ih [4 H, I], w_hh [4 H, O], with `has_biases` b_ih
            and b_hh [4 H], with a projection w_hr [O, H].
        dropout: from 0 to 1; with `train`, of the outputs of all layers but the last.
        lengths: int64 [B], how many of the first steps each sample has, from 0 to T, in any order; not with a
            PackedSequence. Output beyond them is 0, the state stays as it is, and they take no time.
        layer_norm: per layer and direction the gains of W_ih x and of W_hh h [4 H], and the gain and the bias of c [H]:
            each is normalised over its features before it is used (Ba, Kiros and Hinton 2016), eps 1e-5.
        recurrent_dropout: from 0 to 1; with `train`, of h where it enters W_hh, one mask for all steps of a sample (Gal
            and Ghahramani 2016).
        zoneout: from 0 to 1, for both states or (h, c): the probability with which a hidden unit keeps its state in a
            step; without `train` the expectation (Krueger et al. 2017). These three run in torch's operators, step by
            step.
        backend: "auto", "ext", "triton" or "native"; None: what `cvfast.use_backend` or CVFAST_BACKEND says.

    Returns:
        output (as input, O * directions wide), h_n, c_n (as hx); dtypes float32, float64, bfloat16, float16 on the CPU.

    Raises:
        RuntimeError: as torch's, for shapes, dtypes or lengths that do not fit; or where the named backend cannot run.
        ValueError: input that is neither 2-D nor 3-D, an unknown backend.
    """
    if layer_norm is None and recurrent_dropout == 0 and zoneout == 0:
        results = _run_unasked(
            "lstm", input, hx, params, has_biases, num_layers, train and dropout, bidirectional, batch_first, lengths,
            backend,
        )  # fmt: skip
        if results is not None:
            return results
    layout = _Layout("lstm", input, batch_first, lengths)
    weights = _weights("lstm", params, has_biases, num_layers, bidirectional)
    variation = _variation("lstm", weights, layer_norm, recurrent_dropout, zoneout, train)
    dropout = dropout if train else 0.0
    output, h_n, c_n = _run("lstm", "lstm", layout, hx, weights, bidirectional, dropout, backend, variation)
    return output, h_n, c_n


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    layer_norm: Sequence[Tensor] | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A stack of gated recurrent layers, with torch.nn.GRU's mathematics (reset gate behind the recurrent product).

    As `lstm`, with one state: hx is h_0 or None, weights have 3 H rows, the result is (output, h_n). No projection.
    layer_norm: per layer and direction the gains of W_ih x and of W_hh h [3 H].
    """
    if layer_norm is None and recurrent_dropout == 0 and zoneout == 0:
        results = _run_unasked(
            "gru", input, hx, params, has_biases, num_layers, train and dropout, bidirectional, batch_first, lengths,
            backend,
        )  # fmt: skip
        if results is not None:
            return results
    layout = _Layout("gru", input, batch_first, lengths)
    weights = _weights("gru", params, has_biases, num_layers, bidirectional)
    variation = _variation("gru", weights, layer_norm, recurrent_dropout, zoneout, train)
    return _run("gru", "gru", layout, hx, weights, bidirectional, dropout if train else 0.0, backend, variation)[:2]


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A stack of Elman layers h' = f(W_ih x + b_ih + W_hh h + b_hh), with torch.nn.RNN's mathematics.

    As `gru`, with H rows in the weights; nonlinearity: "tanh" or "relu" (ValueError for another).
    """
    cell = _rnn_cell_name(nonlinearity)
    results = _run_unasked(
        cell, input, hx, params, has_biases, num_layers, train and dropout, bidirectional, batch_first, lengths, backend
    )
    if results is not None:
        return results
    layout = _Layout("rnn", input, batch_first, lengths)
    weights = _weights(cell, params, has_biases, num_layers, bidirectional)
    return _run("rnn", cell, layout, hx, weights, bidirectional, dropout if train else 0.0, backend)[:2]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an lstm layer, with torch.nn.LSTMCell's mathematics.

    Args:
        input: [B, I] or [I].
        hx: (h, c), each [B, H] or [H]; None: zeros.
        w_ih, w_hh, b_ih, b_hh: [4 H, I], [4 H, H], [4 H] (both or none).
        backend: as `lstm` has it.

    Returns:
        (h, c) after the step, as hx.

    Raises:
        RuntimeError, ValueError: as `lstm`.
    """
    h, c = _run_cell("lstm_cell", "lstm", input, hx, w_ih, w_hh, b_ih, b_hh, backend)
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a gru layer, with torch.nn.GRUCell's mathematics: as `lstm_cell`, with 3 H rows and one state."""
    return _run_cell("gru_cell", "gru", input, hx, w_ih, w_hh, b_ih, b_hh, backend)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """One step of an rnn layer, with torch.nn.RNNCell's mathematics: as `lstm_cell`, with H rows and one state."""
    cell = _rnn_cell_name(nonlinearity)
    return _run_cell("rnn_cell", cell, input, hx, w_ih, w_hh, b_ih, b_hh, backend)[0]


def _rnn_cell_name(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: Unknown nonlinearity {nonlinearity!r}; allowed: 'tanh', 'relu'")
    return f"rnn_{nonlinearity}"


def _weights(
    cell: str, params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool
) -> tuple[Weights, ...]:
    """`params` by layer and direction, their sizes checked."""
    directions = 2 if bidirectional else 1
    count = num_layers * directions
    plain = 4 if has_biases else 2
    each = len(params) // max(1, count)
    allowed = (plain, plain + 1) if cell == "lstm" else (plain,)
    if num_layers < 1 or len(params) != each * count or each not in allowed:
        raise RuntimeError(
            f"{cell}: got {len(params)} params, expected {' or '.join(str(n * count) for n in allowed)} for "
            f"{num_layers} layer(s), {directions} direction(s), has_biases={bool(has_biases)}"
        )
    result = []
    for i in range(0, len(params), each):
        w_ih, w_hh = params[i : i + 2]
        b_ih, b_hh = params[i + 2 : i + 4] if has_biases else (None, None)
        result.append(Weights(w_ih, w_hh, b_ih, b_hh, params[i + plain] if each > plain else None))
    first = result[0]
    outputs, inputs = first.w_hh.shape[-1], first.w_ih.shape[-1]
    for i, weights in enumerate(result):
        _check_weights(cell, weights, inputs if i < directions else outputs * directions, outputs, first.w_hh.shape[0])
    return tuple(result)


def _check_weights(cell: str, weights: Weights, inputs: int, outputs: int, rows: int) -> None:
    gates = GATES[cell]
    if rows % gates:
        raise RuntimeError(f"{cell}: weights must have {gates} * hidden size rows, got {rows}")
    expected = ((rows, inputs), (rows, outputs), (rows,), (rows,), (outputs, rows // gates))
    for name, tensor, shape in zip(Weights._fields, weights, expected, strict=True):
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(f"{cell}: Expected {name} size {shape}, got {list(tensor.shape)}")
    if weights.w_hr is None and outputs != rows // gates:
        raise RuntimeError(f"{cell}: Expected w_hh size {(rows, rows // gates)}, got {[rows, outputs]}")


NORM_SIZES = {"lstm": ("gates", "gates", "hidden", "hidden"), "gru": ("gates", "gates")}  # of layer_norm's tensors


def _variation(
    cell: str,
    weights: tuple[Weights, ...],
    layer_norm: Sequence[Tensor] | None,
    recurrent_dropout: float,
    zoneout: float | tuple[float, float],
    train: bool,
) -> dict:
    """Call's fields beside torch's definition; empty without."""
    if layer_norm is None and recurrent_dropout == 0 and zoneout in (0, (0, 0)):
        return {}
    zoneouts = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    for what, probability in (("recurrent_dropout", recurrent_dropout), *(("zoneout", z) for z in zoneouts)):
        if not 0 <= probability <= 1:
            raise RuntimeError(f"{cell}: {what} has to be between 0 and 1, but got {probability}")
    if len(zoneouts) != 2:
        raise RuntimeError(f"{cell}: zoneout must be one probability or two, got {len(zoneouts)}")
    norms = None
    if layer_norm is not None:
        rows = weights[0].w_hh.shape[0]
        sizes = {"gates": rows, "hidden": rows // GATES[cell]}
        expected = [(sizes[name],) for name in NORM_SIZES[cell]]
        each, shapes = len(expected), [tuple(t.shape) for t in layer_norm]
        if shapes != expected * len(weights):
            raise RuntimeError(f"{cell}: Expected layer_norm of sizes {expected * len(weights)}, got {shapes}")
        norms = tuple(tuple(layer_norm[i : i + each]) for i in range(0, len(layer_norm), each))
    return {
        "norms": norms,
        "recurrent_dropout": recurrent_dropout if train else 0.0,
        "zoneout": zoneouts,
        "train": train,
    }


class _Layout:
    """How a call's input lies, and the way of its results back into that form."""

    def __init__(self, name, input, batch_first: bool, lengths):
        self.packed = input if isinstance(input, PackedSequence) else None
        self.batch_first = batch_first
        self.batch_sizes = self.lengths = None
        if self.packed is not None:
            if lengths is not None:
                raise RuntimeError(f"{name}: lengths cannot be given with a PackedSequence, which has its own")
            self.input, self.batch_sizes = input.data, input.batch_sizes
            if self.input.dim() != 2:
                raise RuntimeError(f"{name}: input must have 2 dimensions, got {self.input.dim()}")
            self.batched, self.batch = True, input.batch_sizes[0] if len(input.batch_sizes) else 0
            self.batch = int(self.batch)
            return
        if input.dim() not in (2, 3):
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        self.batched = input.dim() == 3
        if not self.batched:
            input = input.unsqueeze(1)
        elif batch_first:
            input = input.transpose(0, 1)
        self.input, self.batch = input, input.shape[1]
        if lengths is not None:
            self.lengths = _lengths(name, lengths, input)

    def states(self, name: str, hx, count: int) -> list[Tensor]:
        """hx by the samples' order in the input."""
        states = list(hx) if count > 1 else [hx]
        if len(states) != count:
            raise RuntimeError(f"{name}: rnn: hx must have {count} tensors, got {len(states)}")
        wanted = 3 if self.batched else 2
        for state in states:
            if state.dim() != wanted:
                raise RuntimeError(
                    f"{name}: For {'batched 3-D' if self.batched else 'unbatched 2-D'} input, hx should also be "
                    f"{wanted}-D but got {state.dim()}-D tensor"
                )
        if not self.batched:
            return [s.unsqueeze(1) for s in states]
        if self.packed is not None and self.packed.sorted_indices is not None:
            return [s.index_select(1, self.packed.sorted_indices) for s in states]
        return states

    def back(self, output: Tensor, states: list[Tensor]) -> tuple:
        if self.packed is not None:
            unsorted = self.packed.unsorted_indices
            if unsorted is not None:
                states = [s.index_select(1, unsorted) for s in states]
            return PackedSequence(output, self.batch_sizes, self.packed.sorted_indices, unsorted), *states
        if not self.batched:
            return output.squeeze(1), *(s.squeeze(1) for s in states)
        return output.transpose(0, 1) if self.batch_first else output, *states


def _lengths(name: str, lengths: Tensor | Sequence[int], input: Tensor) -> Tensor:
    steps, batch = input.shape[:2]
    values = None if isinstance(lengths, Tensor) else list(lengths)
    lengths = torch.as_tensor(lengths, dtype=None if values is None else torch.int64, device="cpu")
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        raise RuntimeError(
            f"{name}: lengths must be int64 of size [{batch}], got {lengths.dtype} of size {list(lengths.shape)}"
        )
    if values is None and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        values = lengths.tolist()  # a traced tensor has none; the kernel asks again
    if values and not 0 <= min(values) <= max(values) <= steps:
        raise RuntimeError(f"{name}: lengths must be from 0 to {steps}, got {values}")
    return lengths


def _run_unasked(
    cell: str,
    input: Tensor | PackedSequence,
    hx,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    lengths,
    backend: str | None,
) -> tuple[Tensor, ...] | None:
    """The results of a plain call by the compiled kernels; None for all others, and where something is wrong."""
    if torch.is_grad_enabled() or lengths is not None or dropout or not _backend.is_certain("ext", backend):
        return None
    if not isinstance(input, Tensor) or input.dim() != 3:
        return None
    directions = 2 if bidirectional else 1
    steps_first = input.transpose(0, 1) if batch_first else input
    states = _unasked_states(cell, steps_first, hx, params, num_layers * directions)
    if states is None:
        return None
    results = _EXT.run_unasked(cell, steps_first, *states, params, has_biases, directions)
    if results is None:
        return None
    output, h_n, c_n = results
    if batch_first:
        output = output.transpose(0, 1)
    return (output, h_n) if c_n is None else (output, h_n, c_n)


_EXT, _EXT_CELL = _backend.BACKENDS["lstm"]["ext"], _backend.BACKENDS["lstm_cell"]["ext"]


def _unasked_states(
    cell: str, input: Tensor, hx, params: Sequence[Tensor], count: int
) -> tuple[Tensor, Tensor | None] | None:
    """h_0 and c_0 of `count` layers and directions; None where something is wrong."""
    lstm = cell == "lstm"
    if hx is None:
        if len(params) < 2 or params[1].dim() != 2:
            return None
        rows, outputs = params[1].shape
        h_0 = input.new_zeros(count, input.size(1), outputs)
        if not lstm:
            return h_0, None
        return h_0, h_0 if rows == 4 * outputs else input.new_zeros(count, input.shape[1], rows // 4)
    if lstm and len(hx) != 2:
        return None
    h_0, c_0 = hx if lstm else (hx, None)
    return (h_0, c_0) if h_0.dim() == 3 and h_0.size(0) == count else None


def _run(
    name: str,
    cell: str,
    layout: _Layout,
    hx,
    weights: tuple[Weights, ...],
    bidirectional: bool,
    dropout: float,
    backend: str | None,
    variation: dict | None = None,
) -> tuple:
    input, first = layout.input, weights[0]
    outputs, hidden = first.w_hh.shape[1], first.w_hh.shape[0] // GATES[cell]
    if input.shape[-1] != first.w_ih.shape[1]:
        raise RuntimeError(
            f"{name}: input.size(-1) must be equal to input_size. Expected {first.w_ih.shape[1]}, got {input.shape[-1]}"
        )
    if not 0 <= dropout <= 1:
        raise RuntimeError(f"{name}: dropout probability has to be between 0 and 1, but got {dropout}")
    sizes = [(len(weights), layout.batch, outputs), (len(weights), layout.batch, hidden)][: 2 if cell == "lstm" else 1]
    if hx is None:
        zeros = input.new_zeros(sizes[0])
        states = [zeros if size == sizes[0] else input.new_zeros(size) for size in sizes]
    else:
        states = layout.states(name, hx, len(sizes))
    for i, (state, size) in enumerate(zip(states, sizes, strict=True)):
        if state.shape != size:
            what = f"hidden[{i}]" if cell == "lstm" else "hidden"
            raise RuntimeError(f"{name}: Expected {what} size {tuple(size)}, got {list(state.shape)}")
    _check_same(name, input, [*states, *(t for w in weights for t in w if t is not None)])
    call = Call(
        cell, input, states[0], states[1] if cell == "lstm" else None, weights, 2 if bidirectional else 1, dropout,
        layout.lengths, layout.batch_sizes, **(variation or {}),
    )  # fmt: skip
    output, h_n, c_n = _backend.select(name, backend, call).run(call)
    return layout.back(output, [h_n] if c_n is None else [h_n, c_n])


def _run_cell(
    name: str,
    cell: str,
    input: Tensor,
    hx,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    backend: str | None,
) -> Sequence[Tensor]:
    if hx is not None and _backend.is_certain("ext", backend):
        h, c = hx if cell == "lstm" else (hx, None)
        results = _EXT_CELL.run_unasked(cell, input, h, c, w_ih, w_hh, b_ih, b_hh)
        if results is not None:
            return results
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is None:
        h = input.new_zeros(*input.shape[:-1], w_hh.shape[-1])
        c = h if cell == "lstm" else None
    else:
        h, c = hx if cell == "lstm" else (hx, None)
    batched = input.dim() == 2
    if not batched:
        input, h, c = (None if t is None else t.unsqueeze(0) for t in (input, h, c))
    args = (cell, input, h, c, w_ih, w_hh, b_ih, b_hh)
    try:
        results = _backend.select(name, backend, *args).run(*args)
    except RuntimeError:  # kernels refuse what does not fit; asking here before each call would take longer than a step
        _explain_cell(name, *args)
        raise
    return results if batched else [r.squeeze(0) for r in results]


def prepared_layers(cell: str) -> Callable:
    """As `prepared_cell`, of layers: a function of input [T, B, I], h_0, c_0, weights, biases and directions.

    It gives output, h_n and c_n (None but of the lstm). Weights as in `lstm`, without a projection.
    """
    return _EXT.prepare(cell, _backend.note_certain)


def prepared_cell(cell: str) -> Callable:
    """A function of a module's parameters, input and hx that gives the state after its step, in half of a call's time.

    Or None, for all that `lstm_cell`, `gru_cell` and `rnn_cell` have to be asked for (gradients, tracers, another
    backend, errors). Not to be called while torch.compile looks on. cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
    """
    return _EXT_CELL.prepare(cell, _backend.note_certain)


def _explain_cell(name: str, cell: str, input, h, c, w_ih, w_hh, b_ih, b_hh) -> None:
    """Raises the fitting error for sizes, dtypes and devices that do not fit together."""
    if w_ih.dim() != 2 or w_hh.dim() != 2 or (b_ih is None) != (b_hh is None):
        raise RuntimeError(f"{name}: weights must be 2-dimensional, and both biases given or none")
    rows, hidden = w_hh.shape
    if input.shape[1] != w_ih.shape[1]:
        raise RuntimeError(f"{name}: input has inconsistent input_size: got {input.shape[1]}, expected {w_ih.shape[1]}")
    _check_weights(cell, Weights(w_ih, w_hh, b_ih, b_hh, None), w_ih.shape[1], hidden, rows)
    size = (input.shape[0], hidden)
    for i, state in enumerate((h, c)):
        if state is not None and state.shape != size:
            raise RuntimeError(
                f"{name}: hidden{i} has inconsistent size: got {list(state.shape)}, expected {list(size)}"
            )
    _check_same(name, input, [t for t in (h, c, w_ih, w_hh, b_ih, b_hh) if t is not None])


def _check_same(name: str, input: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError if a tensor is not of input's device and, unless autocast will cast them, dtype."""
    device, dtype = input.device, input.dtype
    for tensor in tensors:
        if tensor.device != device or (tensor.dtype != dtype and not _backend.autocasts(device.type)):
            raise RuntimeError(
                f"{name}: Input type ({dtype}, {device}) and type of states and weights "
                f"({tensor.dtype}, {tensor.device}) should be the same"
            )
