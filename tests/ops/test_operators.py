"""Every OpSpec over every backend, instruction set, dtype and memory format. A new spec is picked up by itself."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import cvfast
from cvfast.backends.triton import conv2d as triton_conv2d
from cvfast.ops.card import NAMESPACES
from cvfast.testing import SPECS, Case, OpSpec, Sample, assert_as_accurate, widened
from tests.conftest import isas
from tests.triton import interpreter

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = [("ext", isa) for isa in isas()] + [("triton", None), ("native", None)]


def test_16_lane_kernels_are_tested():
    """A machine with AVX2 but without AVX-512 runs the avx512 kernels' logic as emulated512."""
    assert "avx2" not in isas() or {"avx512", "emulated512"} & set(isas()), "build with CVFAST_EMULATED512=1"


def over(*attributes: str, dtypes: tuple[torch.dtype, ...] = DTYPES, formats: bool = True, backends=BACKENDS):
    """Parametrizes over spec, case, memory format, dtype, backend and instruction set, where there is a kernel.

    Backends follow each other for one sample, so that its reference is computed once (`torchs`).
    """
    params = [
        pytest.param(s, c, f, d, b, i, id="-".join(map(str, filter(None, (s.name, c, formats and f, d, b, i)))))
        for s in SPECS.values() for a in attributes for c in getattr(s, a)
        for f in s.formats[: None if formats else 1] for d in dtypes for b, i in backends if d in s.dtypes[b]
    ]  # fmt: skip
    names = ("spec", "case", "memory_format", "dtype", "backend", "isa")
    return pytest.mark.parametrize(names, params, indirect=["isa"])


@pytest.fixture(autouse=True)
def strict_interpreter(monkeypatch):
    """Triton's interpreter checks bounds, races and rounding, too.

    Its time is per block, whatever the block's size, so here they are large; tests/triton runs those of a GPU.
    """
    monkeypatch.setattr(triton_conv2d, "BLOCK", {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "CHUNK": 64})
    with interpreter.strict():
        yield


def spec_cases(*attributes: str):
    params = [
        pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS.values() for a in attributes for c in getattr(s, a)
    ]
    return pytest.mark.parametrize(("spec", "case"), params)


def spec_cases_and_formats(*attributes: str, specs: Iterable[OpSpec] = SPECS.values()):
    params = [
        pytest.param(s, c, f, id=f"{s.name}-{c.name}-{f}")
        for s in specs for a in attributes for c in getattr(s, a) for f in s.formats
    ]  # fmt: skip
    return pytest.mark.parametrize(("spec", "case", "memory_format"), params)


def listed_specs(test):
    """Those whose function torch's op_db lists."""
    specs = {name: spec for name, spec in SPECS.items() if spec.in_torchs_op_db}
    return pytest.mark.parametrize("spec", specs.values(), ids=list(specs))(test)


def all_specs(test):
    return pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))(test)


def derivatives(function, sample: Sample, cotangents: tuple[torch.Tensor, ...] | None = None):
    """The results and the gradients to all operands for cotangents (drawn like the results where None are given)."""
    sample = sample.requiring_grad()
    results = sample.results(function)
    if cotangents is None:
        generator = torch.Generator().manual_seed(1)
        cotangents = tuple(torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results)
    narrow = [c.to(r.dtype) for c, r in zip(cotangents, results, strict=True)]
    grads = torch.autograd.grad(results, sample.tensors(), narrow)
    return tuple(r.detach() for r in results), cotangents, grads


@lru_cache(maxsize=16)
def torchs(spec_name: str, case: Case | int, dtype: torch.dtype, memory_format: torch.memory_format):
    """The case's sample and cotangents, torch's own (results, gradients) and the reference's, in wider numbers."""
    spec = SPECS[spec_name]
    case = spec.random_case(random.Random(case)) if isinstance(case, int) else case
    sample = case.sample(dtype, memory_format)
    native, cotangents, native_grads = derivatives(spec.native, sample)
    cotangents = tuple(c.to(dtype) for c in cotangents)
    exact, _, exact_grads = derivatives(spec.reference, sample.map(widened), tuple(map(widened, cotangents)))
    return sample, cotangents, (*native, *native_grads), (*exact, *exact_grads)


def check(spec: OpSpec, case: Case | int, backend: str, dtype: torch.dtype, memory_format: torch.memory_format):
    """Result and gradients of `backend` are as accurate as torch's own, and the operands are left as they were."""
    sample, cotangents, native, exact = torchs(spec.name, case, dtype, memory_format)
    stand_ins = [None] * len(exact)
    if dtype == torch.float64:
        stand_ins = list(zip(*torchs(spec.name, case, torch.float32, memory_format)[2:], strict=True))
    before = [t.clone() for t in sample.tensors()]
    with cvfast.use_backend(backend):
        results, _, grads = derivatives(spec.function, sample, cotangents)
    names = [*spec.results, *(name for name, t in sample.operands.items() if t is not None)]
    for name, *three, stand_in in zip(names, (*results, *grads), native, exact, stand_ins, strict=True):
        what = f"{name}{'' if name in spec.results else ' gradient'} of {case} on {backend}"
        assert_as_accurate(*three, what=what, stand_in=stand_in, bound=spec.bound(sample, backend, name))
    for old, new in zip(before, sample.tensors(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, msg="an operand was overwritten")


@over("cases")
def test_result_and_gradients(spec, case, memory_format, dtype, backend, isa, poisoned):
    check(spec, case, backend, dtype, FORMATS[memory_format])


@over("wide_cases", backends=[(b, i) for b, i in BACKENDS if b == "ext"])
def test_wide_result_and_gradients(spec, case, memory_format, dtype, backend, isa, poisoned):
    check(spec, case, backend, dtype, FORMATS[memory_format])


WITHOUT_KERNEL = [(s, b, d) for s in SPECS.values() for b in s.dtypes for d in DTYPES if d not in s.dtypes[b]]


@pytest.mark.parametrize(("spec", "backend", "dtype"), WITHOUT_KERNEL, ids=lambda v: getattr(v, "name", str(v)))
def test_dtype_without_a_kernel_is_refused(spec, backend, dtype):
    with cvfast.use_backend(backend), pytest.raises(RuntimeError, match=f"no kernel for {dtype}"):
        spec.plain().sample(dtype).call(spec.function)


INEXACT = [spec for spec in SPECS.values() if type(spec).bound is not OpSpec.bound]


@spec_cases_and_formats("cases", "wide_cases", specs=INEXACT)
def test_strict_precision_is_exact(spec, case, memory_format):
    """Under strict precision the bound of exact algorithms holds everywhere."""
    cvfast.set_precision("strict")
    try:
        assert spec.bound(case.sample(), "ext", "output") == 0
        check(spec, case, "ext", torch.float32, FORMATS[memory_format])
    finally:
        cvfast.set_precision("fast")


RANDOM = [
    pytest.param(s, b, i, seed, id=f"{s.name}-{b}-{i}-{seed}")
    for s in SPECS.values() for seed in range(s.random_cases) for b, i in BACKENDS
    if torch.float32 in s.dtypes[b] and (b != "triton" or seed < 4)  # slow here
]  # fmt: skip


@pytest.mark.parametrize(("spec", "backend", "isa", "seed"), RANDOM, indirect=["isa"])
def test_random_shapes(spec, seed, backend, isa, poisoned):
    check(spec, seed, backend, torch.float32, FORMATS["channels_last" if seed % 2 else "contiguous"])


@over("small_cases", dtypes=(torch.float64,), formats=False)
def test_gradcheck(spec, case, memory_format, dtype, backend, isa):
    sample = case.sample(torch.float64).requiring_grad()

    def function(*tensors):
        present = iter(tensors)
        operands = {name: None if t is None else next(present) for name, t in sample.operands.items()}
        return Sample(operands, sample.options).call(spec.function, backend=backend)

    triton = backend == "triton"  # interpreted: slow, so few evaluations and second derivatives of one case
    fast = triton or spec.slow_gradients
    assert gradcheck(function, sample.tensors(), fast_mode=fast)
    if backend == "native" and not spec.native_second_gradients:
        return
    if not triton or case is spec.small_cases[-1]:
        assert gradgradcheck(function, sample.tensors(), fast_mode=fast)


IMPLEMENTED = [
    pytest.param(s, c, n, id=f"{n}-{s.name}-{c.name}")
    for n in NAMESPACES for s in SPECS.values() for c in s.small_cases if n == "cvfast" or s.dtypes["triton"]
]  # fmt: skip


@pytest.mark.parametrize(("spec", "case", "namespace"), IMPLEMENTED)
def test_opcheck(spec, case, namespace):
    """Schema, autograd registration, fake (exact strides) and AOT dispatch of each operator of the card."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not spec.slow_gradients or case is spec.small_cases[0]:
        checks.append("test_aot_dispatch_dynamic")
    for memory_format in spec.formats:
        for name, args in spec.operator_calls(case.sample(torch.float32, FORMATS[memory_format]).requiring_grad()):
            op = getattr(getattr(torch.ops, namespace), name).default
            torch.library.opcheck(op, args, test_utils=checks)


@spec_cases_and_formats("cases", "wide_cases")
def test_fake_has_the_kernels_strides(spec, case, memory_format):
    sample = case.sample(torch.float32, FORMATS[memory_format])
    reals = sample.results(spec.function, backend="ext")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = sample.map(mode.from_tensor).results(spec.function, backend="ext")
    for fake, real in zip(fakes, reals, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@spec_cases_and_formats("cases", "wide_cases")
def test_memory_format_is_the_specs(spec, case, memory_format):
    """The result of dense operands lies in memory as the spec says: as torch's own does, but for an empty one."""
    sample = Case(case.name, case.shapes, case.options).sample(torch.float32, FORMATS[memory_format])
    results = sample.results(spec.function, backend="ext")
    for result, strides in zip(results, spec.result_strides(sample), strict=True):
        assert result.numel() == 0 or result.stride() == strides


@spec_cases("errors")
@pytest.mark.parametrize("backend", ["auto", "ext", "native"])
def test_wrong_input(spec, case, backend):
    with cvfast.use_backend(backend), pytest.raises(case.error, match=case.match):
        case.call(spec.function)


@listed_specs
def test_torchs_error_inputs(spec):
    """torch's own wrong calls raise the same type with torch's words."""
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == f"nn.functional.{spec.torch_name}")
    if info.error_inputs_func is None:
        pytest.skip("torch lists no wrong calls of it")
    for wrong in info.error_inputs("cpu"):
        sample = wrong.sample_input
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            spec.function(sample.input, *sample.args, **sample.kwargs)


@listed_specs
def test_torchs_sample_inputs(spec):
    """torch's own samples give torch's results."""
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == f"nn.functional.{spec.torch_name}")
    count = 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=False):
        options = {**sample.kwargs, **spec.fixed_options}
        actual = spec.function(sample.input, *sample.args, **options, backend="ext")
        expected = spec.native(sample.input, *sample.args, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        count += 1
    assert count > 0


def all_equal(actual, expected) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@spec_cases("cases", "wide_cases")
@pytest.mark.parametrize("isa", isas(), indirect=True)
def test_same_bits(spec, case, isa, threads):
    """Any number of threads, either memory format, a sample alone or in its batch: the same bits."""
    sample = case.sample(torch.float32)
    threads(1)
    expected = sample.results(spec.function, backend="ext")
    if "channels_last" in spec.formats:
        last = case.sample(torch.float32, torch.channels_last)
        assert all_equal(last.results(spec.function, backend="ext"), expected)
    threads(2)
    assert all_equal(sample.results(spec.function, backend="ext"), expected)
    for alone, share in spec.samples_alone(sample):
        assert all_equal(alone.results(spec.function, backend="ext"), share(expected))


@spec_cases("cases", "wide_cases")
def test_gradients_same_bits_for_any_threads(spec, case, threads):
    sample = case.sample(torch.float32)
    with cvfast.use_backend("ext"):
        threads(1)
        expected = derivatives(spec.function, sample)[2]
        threads(2)
        actual = derivatives(spec.function, sample)[2]
    assert all_equal(actual, expected)


@all_specs
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_reach_torchs_places(spec, value):
    """One NaN or Inf in the first operand's middle: the result has non-finite values where torch's has them."""
    case = spec.plain()
    for memory_format in spec.formats:
        sample = case.sample(torch.float32, FORMATS[memory_format])
        first = sample.tensors()[0]
        first[tuple(size // 2 for size in first.shape)] = value
        actual, expected = ([r.isfinite() for r in sample.results(f)] for f in (spec.function, spec.native))
        assert all(e.all() for e in expected) == (spec.saturates and value == torch.inf)
        assert all_equal(actual, expected)


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
        call = lambda *t, names=names: Sample(dict(zip(names, t, strict=True)), case.options).results(  # noqa: E731
            spec.function, backend="ext"
        )
        actual = torch.func.vmap(call, in_dims=tuple(dims.values()))(*operands.values())
        for i, sample in enumerate(samples):
            one = {n: samples[0].operands[n] if dims[n] is None else sample.operands[n] for n in names}
            torch.testing.assert_close(tuple(a[i] for a in actual), Sample(one, case.options).results(spec.native))


def squares(spec: OpSpec, sample: Sample, **options):
    """A scalar function of the sample's operands."""

    def loss(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        operands = {name: None if t is None else next(given) for name, t in sample.operands.items()}
        return sum((result**2).sum() for result in Sample(operands, sample.options).results(spec.function, **options))

    return loss


@all_specs
def test_func_gradients(spec):
    """torch.func.grad, once and twice, and in torch.func.vmap, gives autograd's gradients."""
    sample = spec.small_cases[0].sample(torch.float64).requiring_grad()
    tensors = sample.tensors()
    loss, places = squares(spec, sample, backend="ext"), tuple(range(len(tensors)))
    first = torch.func.grad(loss, places)

    def slope(*tensors):
        return sum((g**2).sum() for g in first(*tensors))

    expected = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    expected_second = torch.autograd.grad(sum((g**2).sum() for g in expected), tensors)
    detached = [t.detach() for t in tensors]
    torch.testing.assert_close(first(*detached), expected)
    torch.testing.assert_close(torch.func.grad(slope, places)(*detached), expected_second)
    per_sample = torch.func.vmap(first)(*(torch.stack([t, t]) for t in detached))
    torch.testing.assert_close(per_sample, tuple(torch.stack([g, g]) for g in expected))


@all_specs
def test_forward_mode(spec):
    """No kernel has forward-mode derivatives: torch's operators give them, and an operator called by name refuses."""
    sample = spec.small_cases[0].sample(torch.float64)
    tensors = tuple(sample.tensors())
    gradients = torch.func.grad(squares(spec, sample), tuple(range(len(tensors))))(*tensors)
    expected = sum((gradient * t).sum() for gradient, t in zip(gradients, tensors, strict=True))
    with sdpa_kernel(SDPBackend.MATH):  # the only one of torch's that has them
        actual = torch.func.jvp(squares(spec, sample), tensors, tensors)[1]
    torch.testing.assert_close(actual, expected)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(squares(spec, sample, backend="ext"), tensors, tensors)
    name, args = next(iter(spec.operator_calls(sample)))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        dual = [forward_ad.make_dual(a, a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        getattr(torch.ops.cvfast, name).default(*dual)


@all_specs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(spec, dtype):
    """Under autocast the operator takes float32 operands, computes in autocast's dtype and gives float32 gradients."""
    sample = spec.plain().sample(torch.float32).requiring_grad()
    with torch.autocast("cpu", dtype=dtype):
        results = sample.results(spec.function, backend="ext")
    assert all(r.dtype == dtype for r in results)
    narrow = sample.to(dtype)
    assert all_equal(results, narrow.results(spec.function, backend="ext"))
    grads = torch.autograd.grad([r.float().sum() for r in results], sample.tensors())
    assert all(g.dtype == torch.float32 for g in grads)


@all_specs
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(spec, dynamic):
    """What torch.compile(fullgraph=True) makes serves a second call, too, and gives eager's result and gradients."""
    case = spec.plain()
    sample = case.sample(torch.float32)

    def function(**operands):
        return [torch.relu(r) for r in Sample(operands, sample.options).results(spec.function, backend="ext")]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []  # the first call's may be two: dynamo starts again where it finds a symbolic number constant
    for seed in range(2):
        sample = case.sample(torch.float32, seed=seed).requiring_grad()
        expected = [torch.relu(r) for r in sample.results(spec.function, backend="ext")]
        actual = compiled(**sample.operands)
        compilations.append(counter.frame_count)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad([r.square().sum() for r in out], sample.tensors()) for out in (actual, expected)]
        torch.testing.assert_close(grads[0], grads[1])
    assert compilations[0] == compilations[1] > 0
    assert spec.operator in str(counter.graphs[-1].code)


@all_specs
def test_export(spec):
    """torch.export keeps the operator in the graph, with a dynamic batch, and the program gives eager's numbers."""
    case = spec.plain()
    sample = case.sample(torch.float32)

    class Module(torch.nn.Module):
        def forward(self, batched):
            return Sample({**sample.operands, **batched}, sample.options).results(spec.function, backend="ext")

    dims = spec.dynamic_dims()
    batched = {name: sample.operands[name] for name in dims}
    batch = torch.export.Dim("batch", min=1)
    dynamic = {name: {dims[name]: batch} for name in batched}
    program = torch.export.export(Module(), (batched,), dynamic_shapes=(dynamic,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert f"cvfast.{spec.operator}.default" in targets
    larger = {name: torch.cat([x, x, x], dims[name]) for name, x in batched.items()}
    torch.testing.assert_close(program.module()(larger), Module()(larger), rtol=0, atol=0)
