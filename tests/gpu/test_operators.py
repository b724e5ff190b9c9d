"""What only a GPU can show: the OpSpecs' cases on CUDA tensors, through bindings, streams and launches (make gpu)."""

from __future__ import annotations

import pytest
import torch

import cvfast
from cvfast.testing import SPECS, assert_as_accurate
from tests.ops.test_operators import FORMATS, derivatives, torchs

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA GPU: make gpu runs these where there is one", allow_module_level=True)


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """torch's float32 is the measure, so it must not be TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


KERNELS = [
    pytest.param(s, c, f, d, b, id=f"{s.name}-{c}-{f}-{d}-{b}")
    for s in SPECS.values() for c in (*s.cases, *s.wide_cases) for f in s.formats for d in s.gpu_dtypes
    for b in ("ext", "triton")
]  # fmt: skip


@pytest.mark.parametrize(("spec", "case", "memory_format", "dtype", "backend"), KERNELS)
def test_result_and_gradients(spec, case, memory_format, dtype, backend):
    """As accurate as torch's own on the GPU, both against the reference on the CPU; on a stream of its own."""
    sample, cotangents, _, exact = torchs(spec.name, case, dtype, FORMATS[memory_format])
    on_gpu, cotangents = sample.map(torch.Tensor.cuda), tuple(c.cuda() for c in cotangents)
    native, _, native_grads = derivatives(spec.native, on_gpu, cotangents)
    with cvfast.use_backend(backend), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        results, _, grads = derivatives(spec.function, on_gpu, cotangents)
        torch.cuda.current_stream().synchronize()
    for three in zip((*results, *grads), (*native, *native_grads), exact, strict=True):
        assert_as_accurate(*(t.cpu() for t in three), what=f"{case} on {backend}")


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_auto_leaves_to_torch_what_is_not_faster(spec):
    sample = spec.cases[0].sample().map(torch.Tensor.cuda)
    for actual, expected in zip(sample.results(spec.function), sample.results(spec.native), strict=True):
        assert torch.equal(actual, expected)
