"""Every OpSpec over every backend, instruction set, dtype and memory format. A new spec is picked up by itself."""

from __future__ import annotations

import random
from functools import lru_cache

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import cvfast
from cvfast.backends.triton import conv2d as triton_conv2d
from cvfast.ops.card import NAMESPACES
from cvfast.testing import SPECS, Case, OpSpec, Sample, assert_as_accurate
from tests.conftest import isas
from tests.triton import interpreter

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = [("ext", isa) for isa in isas()] + [("triton", None), ("native", None)]


def test_16_lane_kernels_are_tested():
    """A machine with AVX2 but without AVX-512 runs the avx512 kernels' logic as emulated512."""
    assert "avx2" not in isas() or {"avx512", "emulated512"} & set(isas()), "build with CVFAST_EMULATED512=1"


def backends(test):
    """Parametrizes over (backend, instruction set); only `ext` has the latter."""
    params = [pytest.param(b, i, id=f"{b}-{i}" if i else b) for b, i in BACKENDS]
    return pytest.mark.parametrize(("backend", "isa"), params, indirect=["isa"])(test)


@pytest.fixture(autouse=True)
def strict_interpreter(monkeypatch):
    """Triton's interpreter checks bounds, races and rounding, too.

    Its time is per block, whatever the block's size, so here they are large; tests/triton runs those of a GPU.
    """
    monkeypatch.setattr(triton_conv2d, "BLOCK", {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64})
    with interpreter.strict():
        yield


def spec_cases(*attributes: str):
    params = [
        pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS.values() for a in attributes for c in getattr(s, a)
    ]
    return pytest.mark.parametrize(("spec", "case"), params)


def all_specs(test):
    return pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))(test)


def derivatives(function, sample: Sample, cotangent: torch.Tensor | None = None):
    """The result and the gradients to all operands for one cotangent (drawn like the result where None is given)."""
    sample = sample.requiring_grad()
    output = sample.call(function)
    if cotangent is None:
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(output, sample.tensors(), cotangent.to(output.dtype))
    return output.detach(), cotangent, grads


@lru_cache(maxsize=1024)
def torchs(spec_name: str, case: Case | int, dtype: torch.dtype, memory_format: torch.memory_format):
    """The case's sample and cotangent, torch's own (result, gradients) and the float64 reference's."""
    spec = SPECS[spec_name]
    case = spec.random_case(random.Random(case)) if isinstance(case, int) else case
    sample = case.sample(dtype, memory_format)
    native, cotangent, native_grads = derivatives(spec.native, sample)
    cotangent = cotangent.to(dtype)
    exact, _, exact_grads = derivatives(spec.reference, sample.to(torch.float64), cotangent)
    return sample, cotangent, (native, *native_grads), (exact, *exact_grads)


def check(spec: OpSpec, case: Case | int, backend: str, dtype: torch.dtype, memory_format: torch.memory_format):
    """Result and gradients of `backend` are as accurate as torch's own, and the operands are left as they were."""
    sample, cotangent, native, exact = torchs(spec.name, case, dtype, memory_format)
    stand_ins = [None] * len(exact)
    if dtype == torch.float64:
        stand_ins = list(zip(*torchs(spec.name, case, torch.float32, memory_format)[2:], strict=True))
    before = [t.clone() for t in sample.tensors()]
    with cvfast.use_backend(backend):
        output, _, grads = derivatives(spec.function, sample, cotangent)
    names = ["output", *(name for name, t in sample.operands.items() if t is not None)]
    for name, *three, stand_in in zip(names, (output, *grads), native, exact, stand_ins, strict=True):
        what = f"{name}{'' if name == 'output' else ' gradient'} of {case} on {backend}"
        assert_as_accurate(*three, what=what, stand_in=stand_in, bound=spec.bound(sample, backend, name))
    for old, new in zip(before, sample.tensors(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, msg="an operand was overwritten")


@spec_cases("cases")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_result_and_gradients(spec, case, backend, isa, dtype, memory_format, poisoned):
    if dtype not in spec.dtypes[backend]:
        with cvfast.use_backend(backend), pytest.raises(RuntimeError, match=f"no kernel for {dtype}"):
            case.sample(dtype).call(spec.function)
        return
    check(spec, case, backend, dtype, FORMATS[memory_format])


@spec_cases("wide_cases")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_wide_result_and_gradients(spec, case, isa, dtype, memory_format, poisoned):
    check(spec, case, "ext", dtype, FORMATS[memory_format])


@spec_cases("cases", "wide_cases")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_strict_precision_is_exact(spec, case, memory_format):
    """Under strict precision the bound of exact algorithms holds everywhere."""
    cvfast.set_precision("strict")
    try:
        assert spec.bound(case.sample(), "ext", "output") == 0
        check(spec, case, "ext", torch.float32, FORMATS[memory_format])
    finally:
        cvfast.set_precision("fast")


RANDOM = [(b, isa, seed) for b, isa in BACKENDS for seed in range(4 if b == "triton" else 40)]  # triton: slow here


@all_specs
@pytest.mark.parametrize(("backend", "isa", "seed"), RANDOM, indirect=["isa"])
def test_random_shapes(spec, seed, backend, isa, poisoned):
    check(spec, seed, backend, torch.float32, FORMATS["channels_last" if seed % 2 else "contiguous"])


@spec_cases("small_cases")
@backends
def test_gradcheck(spec, case, backend, isa):
    sample = case.sample(torch.float64).requiring_grad()

    def function(*tensors):
        present = iter(tensors)
        operands = {name: None if t is None else next(present) for name, t in sample.operands.items()}
        return Sample(operands, sample.options).call(spec.function, backend=backend)

    fast = backend == "triton"  # interpreted: slow, so few evaluations and second derivatives of one case
    assert gradcheck(function, sample.tensors(), fast_mode=fast)
    if not fast or case is spec.small_cases[-1]:
        assert gradgradcheck(function, sample.tensors(), fast_mode=fast)


@spec_cases("small_cases")
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_opcheck(spec, case, namespace):
    """Schema, autograd registration, fake (exact strides) and AOT dispatch of each operator of the card."""
    for memory_format in FORMATS.values():
        for name, args in spec.operator_calls(case.sample(torch.float32, memory_format).requiring_grad()):
            op = getattr(getattr(torch.ops, namespace), name).default
            torch.library.opcheck(op, args)


@spec_cases("cases", "wide_cases")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_fake_has_the_kernels_strides(spec, case, memory_format):
    sample = case.sample(torch.float32, FORMATS[memory_format])
    real = sample.call(spec.function, backend="ext")
    with torch._subclasses.FakeTensorMode() as mode:
        fake = sample.map(mode.from_tensor).call(spec.function, backend="ext")
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@spec_cases("cases", "wide_cases")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_format_is_torchs(spec, case, memory_format):
    """The result of dense operands lies in memory as torch's own does (an empty one lies nowhere)."""
    sample = Case(case.name, case.shapes, case.options).sample(torch.float32, FORMATS[memory_format])
    result = sample.call(spec.function, backend="ext")
    assert result.numel() == 0 or result.stride() == sample.call(spec.native).stride()


@spec_cases("errors")
@pytest.mark.parametrize("backend", ["auto", "ext", "native"])
def test_wrong_input(spec, case, backend):
    with cvfast.use_backend(backend), pytest.raises(case.error, match=case.match):
        case.call(spec.function)


@all_specs
def test_torchs_error_inputs(spec):
    """torch's own wrong calls raise the same type with torch's words."""
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == f"nn.functional.{spec.name}")
    if info.error_inputs_func is None:
        pytest.skip("torch lists no wrong calls of it")
    for wrong in info.error_inputs("cpu"):
        sample = wrong.sample_input
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            spec.function(sample.input, *sample.args, **sample.kwargs)


@all_specs
def test_torchs_sample_inputs(spec):
    """torch's own samples give torch's results."""
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == f"nn.functional.{spec.name}")
    count = 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=False):
        actual = spec.function(sample.input, *sample.args, **sample.kwargs, backend="ext")
        expected = spec.native(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        count += 1
    assert count > 0


@spec_cases("cases", "wide_cases")
@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_same_bits(spec, case, isa, threads):
    """Any number of threads, either memory format, a sample alone or in its batch: the same bits."""
    sample = case.sample(torch.float32)
    threads(1)
    expected = sample.call(spec.function, backend="ext")
    last = case.sample(torch.float32, torch.channels_last)
    assert torch.equal(last.call(spec.function, backend="ext"), expected)
    threads(2)
    assert torch.equal(sample.call(spec.function, backend="ext"), expected)
    first, *rest = sample.operands
    batched = sample.operands[first].dim() == 4
    for i in range(expected.shape[0] if batched else 0):
        alone = Sample({**sample.operands, first: sample.operands[first][i : i + 1]}, sample.options)
        assert torch.equal(alone.call(spec.function, backend="ext"), expected[i : i + 1])


@spec_cases("cases", "wide_cases")
def test_gradients_same_bits_for_any_threads(spec, case, threads):
    sample = case.sample(torch.float32)
    with cvfast.use_backend("ext"):
        threads(1)
        expected = derivatives(spec.function, sample)[2]
        threads(2)
        actual = derivatives(spec.function, sample)[2]
    for one, two in zip(expected, actual, strict=True):
        assert torch.equal(one, two)


@all_specs
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_reach_torchs_places(spec, value):
    """One NaN or Inf in the first operand's middle: the result has non-finite values where torch's has them."""
    case = next(c for c in spec.cases if c.layout == "dense" and min(map(len, filter(None, c.shapes.values()))) == 1)
    for memory_format in FORMATS.values():
        sample = case.sample(torch.float32, memory_format)
        first = sample.tensors()[0]
        first[tuple(size // 2 for size in first.shape)] = value
        actual, expected = (sample.call(f).isfinite() for f in (spec.function, spec.native))
        assert not expected.all()
        assert torch.equal(actual, expected)


@all_specs
def test_vmap(spec):
    """torch.func.vmap gives the loop's results, for every combination of batched operands in the spec."""
    case = spec.small_cases[0]
    for dims in spec.vmap_dims:
        samples = [case.sample(torch.float64, seed=i) for i in range(3)]
        operands = {
            name: samples[0].operands[name]
            if dim is None
            else torch.stack([s.operands[name] for s in samples], min(dim, samples[0].operands[name].dim()))
            for name, dim in dims.items()
        }
        names = list(operands)
        call = lambda *t, names=names: Sample(dict(zip(names, t, strict=True)), case.options).call(  # noqa: E731
            spec.function, backend="ext"
        )
        actual = torch.func.vmap(call, in_dims=tuple(dims.values()))(*operands.values())
        for i, sample in enumerate(samples):
            one = {n: samples[0].operands[n] if dims[n] is None else sample.operands[n] for n in names}
            torch.testing.assert_close(actual[i], Sample(one, case.options).call(spec.native))


@all_specs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(spec, dtype):
    """Under autocast the operator takes float32 operands, computes in autocast's dtype and gives float32 gradients."""
    sample = spec.cases[2].sample(torch.float32).requiring_grad()
    with torch.autocast("cpu", dtype=dtype):
        output = sample.call(spec.function, backend="ext")
    assert output.dtype == dtype
    narrow = sample.to(dtype)
    assert torch.equal(output, narrow.call(spec.function, backend="ext"))
    grads = torch.autograd.grad(output.float().sum(), sample.tensors())
    assert all(g.dtype == torch.float32 for g in grads)


@all_specs
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(spec, dynamic):
    """torch.compile(fullgraph=True) compiles once, and the compiled code gives eager's result and gradients."""
    case = next(c for c in spec.cases if c.name == "3x3")
    sample = case.sample(torch.float32)

    def function(**operands):
        return torch.relu(Sample(operands, sample.options).call(spec.function, backend="ext"))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for seed in range(2):
        sample = case.sample(torch.float32, seed=seed).requiring_grad()
        expected = torch.relu(sample.call(spec.function, backend="ext"))
        actual = compiled(**sample.operands)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(out.square().sum(), sample.tensors()) for out in (actual, expected)]
        torch.testing.assert_close(grads[0], grads[1])
    assert counter.frame_count == 1
    assert f"{spec.name}" in str(counter.graphs[0].code)


@all_specs
def test_export(spec):
    """torch.export keeps the operator in the graph, with a dynamic batch, and the program gives eager's numbers."""
    case = next(c for c in spec.cases if c.name == "3x3")
    sample = case.sample(torch.float32)
    first, *constants = sample.operands

    class Module(torch.nn.Module):
        def forward(self, x):
            return Sample({**sample.operands, first: x}, sample.options).call(spec.function, backend="ext")

    x = sample.operands[first]
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert f"cvfast.{spec.name}.default" in targets
    larger = torch.cat([x, x, x])
    torch.testing.assert_close(program.module()(larger), Module()(larger), rtol=0, atol=0)
