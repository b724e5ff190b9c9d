"""The choice of a backend: order, reasons, names given per call, per block and per process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import cvfast
from cvfast import _library, backend
from cvfast.backends.ext import conv2d as ext

X, W = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
ARGS = (X, W, None, (1, 1), (0, 0), (1, 1), 1)


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_auto_takes_the_first_able_backend():
    assert list(backend.BACKENDS["conv2d"]) == ["ext", "triton", "native"]
    assert backend.select("conv2d", None, *ARGS) is ext


def test_auto_falls_back_and_says_why():
    args = (X.int(), W.int(), *ARGS[2:])
    assert backend.select("conv2d", "auto", *args) is backend.BACKENDS["conv2d"]["native"]
    assert backend.report("conv2d", *args)["ext"] == ["no kernel for torch.int32 on cpu"]
    assert backend.report("conv2d", *args)["native"] == []


def test_a_named_backend_that_cannot_run_raises_with_its_reasons():
    with pytest.raises(RuntimeError, match="backend 'ext' cannot run conv2d: no kernel for torch.int32 on cpu"):
        cvfast.functional.conv2d(X.int(), W.int(), backend="ext")


def test_every_reason_is_given(monkeypatch):
    monkeypatch.setattr(_library, "ops", _library.Library("libcvfast_ops", "it was not built"))
    monkeypatch.setattr("cvfast.backends.ext.conv2d.conv2d_how", lambda *options: None)  # as it is then
    with cvfast.use_backend("ext"), pytest.raises(RuntimeError, match="it was not built"):
        cvfast.functional.conv2d(X, W)
    torch.testing.assert_close(cvfast.functional.conv2d(X, W), torch.conv2d(X, W))


def test_use_backend_holds_within_its_block_and_in_all_threads():
    seen = []
    with cvfast.use_backend("native"):
        thread = threading.Thread(target=lambda: seen.append(backend.current()))
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), cvfast.use_backend("ext"):
            seen.append(backend.current())
            raise ZeroDivisionError
        seen.append(backend.current())
    assert seen == ["native", "ext", "native"]
    assert backend.current() == "auto"


def test_unknown_names():
    with (
        pytest.raises(ValueError, match="unknown backend 'cudnn'; allowed: auto, ext, triton, native"),
        cvfast.use_backend("cudnn"),
    ):
        pass
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        cvfast.functional.conv2d(X, W, backend="cudnn")


def test_environment_names_the_backend():
    code = "import cvfast; print(cvfast.backend.current())"
    assert run(code, CVFAST_BACKEND="native").stdout.strip() == "native"
    code = "import torch, cvfast; cvfast.functional.conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2))"
    wrong = run(code, CVFAST_BACKEND="cudnn")
    assert wrong.returncode != 0
    assert "unknown backend 'cudnn'; allowed: auto, ext, triton, native" in wrong.stderr


@pytest.mark.parametrize("isa", _library.C.available_isas() if _library.C else [])
def test_environment_names_the_instruction_set(isa):
    code = "from cvfast import _library; print(_library.C.active_isa())"
    assert run(code, CVFAST_ISA=isa).stdout.strip() == isa


def test_precision():
    """Strict precision changes the bits of a convolution that Winograd takes, and fast precision brings them back."""
    x, w = torch.randn(1, 32, 16, 16), torch.randn(32, 32, 3, 3)
    fast = cvfast.functional.conv2d(x, w, padding=1, backend="ext")
    cvfast.set_precision("strict")
    try:
        assert not torch.equal(cvfast.functional.conv2d(x, w, padding=1, backend="ext"), fast)
    finally:
        cvfast.set_precision("fast")
    assert torch.equal(cvfast.functional.conv2d(x, w, padding=1, backend="ext"), fast)
    with pytest.raises(ValueError, match="unknown precision 'exact'; allowed: fast, strict"):
        cvfast.set_precision("exact")


def test_instruction_sets():
    C = _library.C
    assert C.active_isa() == C.best_isa()
    assert set(C.available_isas()) <= set(C.compiled_isas())
    with pytest.raises(ValueError, match="sve.*avx2|sve.*neon|sve.*baseline"):
        C.set_isa("sve")
    assert C.active_isa() == C.best_isa()


@pytest.mark.parametrize(
    ("kernel", "options", "native"),
    [
        ((5, 3, 16, 16), {"stride": 16}, True),
        ((5, 3, 14, 14), {"stride": 14}, True),
        ((5, 3, 8, 8), {"stride": 8}, False),
        ((5, 3, 16, 16), {"stride": 15}, False),
        ((5, 3, 16, 16), {"stride": 16, "padding": 1}, False),
    ],
)
def test_large_patches_of_images_are_torchs_without_gradients(kernel, options, native):
    x, weight = torch.randn(2, 3, 64, 64), torch.randn(kernel)
    chosen = []
    with backend.watch(lambda operator, module, args: chosen.append(backend.name_of(operator, module))):
        with torch.no_grad():
            cvfast.functional.conv2d(x, weight, **options)
        cvfast.functional.conv2d(x, weight, **options)
        with torch.no_grad():
            cvfast.functional.conv2d(x, weight, **options, backend="ext")
    assert chosen == ["native" if native else "ext", "ext", "ext"]


def test_large_patches_of_one_contiguous_image_are_the_kernels_with_avx2_alone(monkeypatch):
    x, weight, chosen = torch.randn(1, 3, 64, 64), torch.randn(5, 3, 16, 16), []
    with torch.no_grad(), backend.watch(lambda name, module, args: chosen.append(backend.name_of(name, module))):
        for avx2_alone in True, False:
            monkeypatch.setattr(ext, "_AVX2_ALONE", avx2_alone)
            for image in x, x.to(memory_format=torch.channels_last):
                cvfast.functional.conv2d(image, weight, stride=16)
    assert chosen == ["ext", "native", "native", "native"]


@pytest.mark.parametrize("gradients", [True, False])
def test_jit_trace_records_torchs_operators(gradients):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(16, 32, 3),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(1152, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    ).eval()
    x = torch.randn(32, 16, 8, 8)
    with torch.set_grad_enabled(gradients):
        expected = model(x)
        traced = torch.jit.trace(cvfast.accelerate(model, fuse=True), x)
        torch.testing.assert_close(traced(x), expected)
        operators = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert "cvfast" not in operators and "cvfast_kernels" not in operators
