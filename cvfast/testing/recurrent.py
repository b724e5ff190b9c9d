"""The OpSpecs of lstm, gru, rnn and of their cells."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cvfast import functional, reference
from cvfast.testing.spec import Case, ErrorCase, OpSpec, Sample

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def layer_case(
    operator: str,
    name: str,
    steps: int,
    batch: int | None,
    inputs: int,
    hidden: int,
    *,
    layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    projected: int | None = None,
    layout: str = "dense",
    **options,
) -> Case:
    """A case of lstm, gru or rnn with operands named as torch's layers name them; batch None: unbatched."""
    rows, outputs = GATES[operator] * hidden, projected or hidden
    directions = 2 if bidirectional else 1
    middle = () if batch is None else (batch,)
    shapes = {"input": (batch, steps, inputs) if options.get("batch_first") else (steps, *middle, inputs)}
    shapes["h_0"] = (layers * directions, *middle, outputs)
    if operator == "lstm":
        shapes["c_0"] = (layers * directions, *middle, hidden)
    for layer in range(layers):
        for suffix in ("", "_reverse")[:directions]:
            end = f"_l{layer}{suffix}"
            shapes[f"weight_ih{end}"] = (rows, outputs * directions if layer else inputs)
            shapes[f"weight_hh{end}"] = (rows, outputs)
            if bias:
                shapes[f"bias_ih{end}"] = shapes[f"bias_hh{end}"] = (rows,)
            if projected:
                shapes[f"weight_hr{end}"] = (outputs, hidden)
    options = {"has_biases": bias, "num_layers": layers, "bidirectional": bidirectional, **options}
    return ScaledCase(name, shapes, options, layout)


class ScaledCase(Case):
    """A case whose weights are as large as a layer's are: 1 / sqrt(their columns) instead of 1."""

    def sample(self, *args, **kwargs) -> Sample:
        sample = super().sample(*args, **kwargs)
        for name, tensor in sample.operands.items():
            if name.startswith("w") and self.layout != "expanded":
                tensor.mul_(max(1, tensor.shape[-1]) ** -0.5)
        return sample


def layer_cases(operator: str) -> tuple[Case, ...]:
    def case(*args, **options):
        return layer_case(operator, *args, **options)

    cases = [
        case("plain", 5, 3, 6, 7),
        case("one-step", 1, 4, 5, 9),
        case("batch-of-one", 4, 1, 5, 12),
        case("unbatched-no-bias", 3, None, 6, 8, bias=False),
        case("two-layers-bidirectional-batch-first", 3, 2, 3, 9, layers=2, bidirectional=True, batch_first=True),
        case("lengths", 4, 4, 5, 7, lengths=(3, 4, 0, 1)),
        case("lengths-bidirectional-batch-first", 4, 3, 4, 9, bidirectional=True, batch_first=True, lengths=(2, 4, 0)),
        case("lengths-all-zero", 3, 2, 4, 5, lengths=(0, 0)),
        case("no-steps-bidirectional", 0, 2, 4, 5, layers=2, bidirectional=True),
        case("no-samples", 3, 0, 4, 5),
        case("one-element", 1, 1, 1, 1),
        case("sliced", 4, 3, 6, 8, layout="sliced"),
        case("expanded", 4, 3, 6, 8, layout="expanded"),
    ]
    if operator == "lstm":
        cases.append(case("projection", 3, 2, 6, 9, layers=2, bidirectional=True, projected=5, lengths=(3, 2)))
    if operator == "rnn":
        cases.append(case("relu", 4, 3, 6, 7, nonlinearity="relu", bidirectional=True, lengths=(1, 4, 3)))
    return tuple(cases)


def wide_layer_cases(operator: str) -> tuple[Case, ...]:
    def case(*args, **options):
        return layer_case(operator, *args, **options)

    cases = [
        case("rows-in-tiles", 4, 13, 40, 70),
        case("one-row-many-inputs", 3, 1, 530, 70),
        case("two-rows-shared-among-threads", 3, 2, 33, 160),
        case("several-chunks", 12, 61, 21, 33),
        case("wide-lengths", 9, 9, 17, 35, bidirectional=True, lengths=(9, 1, 7, 7, 0, 8, 9, 2, 5)),
    ]
    if operator == "lstm":
        cases.append(case("wide-projection", 4, 7, 40, 70, projected=37))
    return tuple(cases)


def small_layer_cases(operator: str) -> tuple[Case, ...]:
    def case(*args, **options):
        return layer_case(operator, *args, **options)

    cases = [
        case("plain", 3, 2, 2, 3),
        case("lengths-bidirectional", 3, 3, 2, 2, bidirectional=True, lengths=(2, 0, 3)),
        case("two-layers-no-bias", 2, 2, 2, 2, layers=2, bias=False),
    ]
    if operator == "lstm":
        cases.append(case("projection", 3, 2, 2, 3, projected=2))
    if operator == "rnn":
        cases.append(case("relu", 3, 2, 2, 3, nonlinearity="relu"))
    return tuple(cases)


def cell_case(operator: str, name: str, batch: int | None, inputs: int, hidden: int, bias: bool = True,
              layout: str = "dense", **options) -> Case:  # fmt: skip
    """A case of lstm_cell, gru_cell or rnn_cell."""
    first = () if batch is None else (batch,)
    rows = GATES[operator.removesuffix("_cell")] * hidden
    shapes = {"input": (*first, inputs), "h": (*first, hidden)}
    if operator == "lstm_cell":
        shapes["c"] = (*first, hidden)
    shapes |= {"w_ih": (rows, inputs), "w_hh": (rows, hidden)}
    shapes |= {"b_ih": (rows,), "b_hh": (rows,)} if bias else {}
    return ScaledCase(name, shapes, options, layout)


def cell_cases(operator: str) -> tuple[Case, ...]:
    def case(*args, **options):
        return cell_case(operator, *args, **options)

    cases = [
        case("plain", 3, 6, 13),
        case("batch-of-one", 1, 5, 12),
        case("unbatched", None, 5, 9),
        case("no-bias", 4, 3, 8, bias=False),
        case("no-samples", 0, 4, 5),
        case("one-element", 1, 1, 1),
        case("sliced", 3, 6, 8, layout="sliced"),
        case("whole-panels", 8, 128, 64),
        case("whole-panels-of-avx2", 2, 16, 48),
    ]
    if operator == "rnn_cell":
        cases.append(case("relu", 3, 6, 7, nonlinearity="relu"))
    return tuple(cases)


def error(operator: str, name: str, match: str, error: type[Exception] = RuntimeError, **changes) -> ErrorCase:
    """A wrong call on zeros: the plain case with some arguments changed (a tuple: a tensor of that shape)."""
    cell = operator.endswith("_cell")
    case = cell_case(operator, "plain", 3, 6, 7) if cell else layer_case(operator, "plain", 5, 3, 6, 7)

    def call(function):
        operands = {n: torch.zeros(shape) for n, shape in case.shapes.items()}
        options = dict(case.options)
        for key, value in changes.items():
            target = operands if key in operands else options
            shaped = key in operands and isinstance(value, tuple)
            target[key] = torch.zeros(value) if shaped else value
        return function(**operands, **options)

    return ErrorCase(name, call, error, match)


def layer_errors(operator: str) -> tuple[ErrorCase, ...]:
    gates = GATES[operator]
    return (
        error(operator, "input-1d", "Expected input to be 2D or 3D, got 1D", ValueError, input=(6,)),
        error(operator, "input-size", "Expected 6, got 5", input=(5, 3, 5)),
        error(operator, "state-size", r"Expected hidden.* size \(1, 3, 7\), got \[1, 2, 7\]", h_0=(1, 2, 7)),
        error(operator, "state-2d", "For batched 3-D input, hx should also be 3-D but got 2-D", h_0=(3, 7)),
        error(operator, "weight-size", "Expected w_ih size", weight_ih_l0=(gates * 7 + gates, 6)),
        error(operator, "bias-size", "Expected b_hh size", bias_hh_l0=(3,)),
        error(operator, "params", "got 4 params, expected", num_layers=2),
        error(operator, "dtypes", "should be the same", weight_hh_l0=torch.zeros(gates * 7, 7, dtype=torch.float64)),
        error(operator, "devices", "should be the same", weight_hh_l0=torch.zeros(gates * 7, 7, device="meta")),
        error(operator, "lengths-count", r"lengths must be int64 of size \[3\]", lengths=(1, 2)),
        error(operator, "lengths-beyond", r"lengths must be from 0 to 5, got \[1, 6, 2\]", lengths=(1, 6, 2)),
        error(operator, "lengths-negative", "lengths must be from 0 to 5", lengths=(1, -1, 2)),
        error(operator, "lengths-float", "lengths must be int64", lengths=torch.ones(3)),
        error(operator, "dropout", "between 0 and 1, but got 1.5", dropout=1.5, train=True),
        error(operator, "backend", "unknown backend 'cudnn'", ValueError, backend="cudnn"),
    )


def cell_errors(operator: str) -> tuple[ErrorCase, ...]:
    return (
        error(operator, "input-3d", "Expected input to be 1D or 2D, got 3D", ValueError, input=(1, 3, 6)),
        error(operator, "input-size", "inconsistent input_size: got 5, expected 6", input=(3, 5)),
        error(operator, "state-size", r"hidden0 has inconsistent size: got \[2, 7\], expected \[3, 7\]", h=(2, 7)),
        error(operator, "weight-size", "Expected w_ih size", w_ih=(5, 6)),
        error(operator, "bias-size", "Expected b_hh size", b_hh=(3,)),
        error(operator, "dtypes", "should be the same", input=torch.zeros(3, 6, dtype=torch.float64)),
        error(operator, "backend", "unknown backend 'cudnn'", ValueError, backend="cudnn"),
    )


def _with_native_backend(function: Callable) -> Callable:
    """torch's own operator behind cvfast's signature (torch's refuses zero lengths and no steps)."""
    return lambda *args, **options: function(*args, **options, backend="native")


class RecurrentSpec(OpSpec):
    """lstm, gru or rnn; operands are torch's names for a layer's state and weights."""

    formats = ("contiguous",)
    in_torchs_op_db = False
    random_cases = 12
    slow_gradients = True  # the second ones are of a Python loop over the steps
    saturates = True
    dtypes = {"ext": CPU_DTYPES, "triton": (), "native": CPU_DTYPES}
    plain_case = "plain"
    operator = ""

    def __init__(self, name: str):
        self.name = name
        self.operator = "rnn_tanh" if name == "rnn" else name
        function = getattr(functional, name)
        self.function = self.adapted(function)
        self.native = self.adapted(_with_native_backend(function))
        self.reference = self.adapted(getattr(reference, name))
        self.results = ("output", "h_n", "c_n")[: 3 if name == "lstm" else 2]
        self.cases, self.wide_cases = layer_cases(name), wide_layer_cases(name)
        self.small_cases = small_layer_cases(name)
        self.errors = layer_errors(name)
        everything = {key: 0 for key in self.small_cases[0].shapes}
        self.vmap_dims = (
            {key: 1 if key == "input" else 0 if key in ("h_0", "c_0") else None for key in everything},
            {key: 2 if key == "input" else None for key in everything},
            everything,
        )

    @staticmethod
    def adapted(function: Callable) -> Callable[..., tuple[Tensor, ...]]:
        """`function` with states and weights by name."""

        def call(input, h_0, c_0=None, **rest):
            params = [rest.pop(key) for key in list(rest) if key.startswith(("weight_", "bias_"))]
            hx = h_0 if c_0 is None else (h_0, c_0)
            return function(input, hx, params, **rest)

        return call

    def random_case(self, rng: random.Random) -> Case:
        # Not the smallest sizes: torch's error, which is the measure, is luck where few elements or few sums are.
        steps, batch = rng.randint(2, 9), rng.randint(2, 9)
        lengths = tuple(rng.randint(0, steps) for _ in range(batch)) if rng.random() < 0.5 else None
        return layer_case(
            self.name, "random", steps, batch, rng.randint(1, 40), rng.randint(8, 40),
            layers=rng.randint(1, 2), bidirectional=rng.random() < 0.3, bias=rng.random() < 0.7,
            projected=rng.choice((None, rng.randint(1, 20))) if self.name == "lstm" else None,
            batch_first=rng.random() < 0.5, lengths=lengths,
        )  # fmt: skip

    def operator_calls(self, sample: Sample) -> Iterator[tuple[str, tuple]]:
        """Layer 0, forwards."""
        get = sample.operands.get
        c_0 = get("c_0")
        lengths = sample.options.get("lengths")
        operands = (
            get("input"), None if lengths is None else torch.tensor(lengths), None, get("h_0")[0],
            None if c_0 is None else c_0[0], *(get(f"{n}_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh",
                                                                          "weight_hr")), False,
        )  # fmt: skip
        cell = "rnn_relu" if sample.options.get("nonlinearity") == "relu" else self.operator
        yield cell, (*operands, True)
        yield cell, (*operands, False)
        with torch.no_grad():
            output, h_n, c_n, saved = getattr(torch.ops.cvfast, cell)(*operands, True)
        grads = [torch.randn_like(t) for t in (output, h_n)] + [None if c_0 is None else torch.randn_like(c_n)]
        for wanted in ((True, True),) if lengths is None else ((False, True), (True, False)):
            yield f"{cell}_backward", (output, saved, *grads, *operands, *wanted)

    def samples_alone(self, sample: Sample) -> Iterator[tuple[Sample, Callable[[Sequence[Tensor]], list[Tensor]]]]:
        input = sample.operands["input"]
        if input.dim() == 2:
            return
        dim = 0 if sample.options.get("batch_first") else 1
        for i in range(input.shape[dim]):
            one = {"input": input.narrow(dim, i, 1)}
            one |= {n: sample.operands[n].narrow(1, i, 1) for n in ("h_0", "c_0") if n in sample.operands}
            options = dict(sample.options)
            if options.get("lengths") is not None:
                options["lengths"] = options["lengths"][i : i + 1]
            yield (
                Sample({**sample.operands, **one}, options),
                lambda results, i=i: [r.narrow(d, i, 1) for r, d in zip(results, (dim, 1, 1), strict=False)],
            )

    def dynamic_dims(self) -> dict[str, int]:
        return {n: 1 for n in ("input", "h_0", "c_0") if n in self.plain().shapes}

    def flops(self, sample: Sample) -> int:
        steps = sample.operands["input"].shape[:-1].numel()
        return 2 * steps * sum(t.numel() for n, t in sample.operands.items() if n.startswith("weight"))

    def exponentials(self, sample: Sample) -> int:
        """One for each gate of each unit, and one for an LSTM's new state."""
        steps = sample.operands["input"].shape[:-1].numel()
        gates = sum(t.shape[0] for n, t in sample.operands.items() if n.startswith("weight_hh"))
        return steps * (gates * 5 // 4 if self.name == "lstm" else gates)

    def bytes_per_step(self, sample: Sample) -> tuple[int, int]:
        """W_hh of a layer and direction, in each step of all of them."""
        weights = [t for n, t in sample.operands.items() if n.startswith("weight_hh")]
        steps = sample.operands["input"].shape[bool(sample.options.get("batch_first"))]
        return steps * len(weights), weights[0].numel() * weights[0].element_size()


class RecurrentCellSpec(OpSpec):
    """lstm_cell, gru_cell or rnn_cell."""

    formats = ("contiguous",)
    in_torchs_op_db = False
    random_cases = 12
    slow_gradients = True  # the second ones are of a Python loop over the steps
    saturates = True
    dtypes = {"ext": CPU_DTYPES, "triton": (), "native": CPU_DTYPES}
    plain_case = "plain"
    operator = ""

    def __init__(self, name: str):
        self.name = name
        self.operator = "rnn_tanh_cell" if name == "rnn_cell" else name
        function = getattr(functional, name)
        self.function = self.adapted(function)
        self.native = self.adapted(_with_native_backend(function))
        self.reference = self.adapted(getattr(reference, name))
        self.results = ("h", "c")[: 2 if name == "lstm_cell" else 1]
        self.cases = cell_cases(name)
        self.wide_cases = (cell_case(name, "wide", 13, 40, 70), cell_case(name, "wide-batch-of-one", 1, 300, 70))
        self.small_cases = (cell_case(name, "plain", 2, 2, 3), cell_case(name, "no-bias", 2, 3, 2, bias=False))
        self.errors = cell_errors(name)
        everything = {key: 0 for key in self.small_cases[0].shapes}
        self.vmap_dims = ({key: 0 if key in ("input", "h", "c") else None for key in everything}, everything)

    @staticmethod
    def adapted(function: Callable) -> Callable[..., object]:
        """`function` with the states by name."""

        def call(input, h, c=None, **rest):
            return function(input, h if c is None else (h, c), **rest)

        return call

    def random_case(self, rng: random.Random) -> Case:
        options = {"nonlinearity": rng.choice(("tanh", "relu"))} if self.name == "rnn_cell" else {}
        sizes = (rng.randint(1, 9), rng.randint(1, 60), rng.randint(8, 60))
        return cell_case(self.name, "random", *sizes, bias=rng.random() < 0.7, **options)

    def operator_calls(self, sample: Sample) -> Iterator[tuple[str, tuple]]:
        """The cell; its derivative is the layers'."""
        names = ("input", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")
        for save in (True, False):
            yield self.operator, (*(sample.operands.get(n) for n in names), save)

    def samples_alone(self, sample: Sample) -> Iterator[tuple[Sample, Callable[[Sequence[Tensor]], list[Tensor]]]]:
        input = sample.operands["input"]
        for i in range(input.shape[0] if input.dim() == 2 else 0):
            one = {n: t[i : i + 1] for n, t in sample.operands.items() if n in ("input", "h", "c")}
            alone = Sample({**sample.operands, **one}, sample.options)
            yield alone, lambda results, i=i: [r[i : i + 1] for r in results]

    def dynamic_dims(self) -> dict[str, int]:
        return {n: 0 for n in ("input", "h", "c") if n in self.plain().shapes}

    def flops(self, sample: Sample) -> int:
        batch = sample.operands["input"].shape[:-1].numel()
        return 2 * batch * (sample.operands["w_ih"].numel() + sample.operands["w_hh"].numel())

    def exponentials(self, sample: Sample) -> int:
        """As the layer's."""
        gates = sample.operands["input"].shape[:-1].numel() * sample.operands["w_hh"].shape[0]
        return gates * 5 // 4 if self.name == "lstm_cell" else gates

    def bytes_per_step(self, sample: Sample) -> tuple[int, int]:
        """All weights, once."""
        return 1, sum(sample.operands[n].numel() * sample.operands[n].element_size() for n in ("w_ih", "w_hh"))
