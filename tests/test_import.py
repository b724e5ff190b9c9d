"""`import cvfast` works wherever `import torch` does, computes by torch where it must, and `info` says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cvfast"
# An editable install finds cvfast's modules in the source tree, whatever package is imported: not wanted here.
NO_FINDER = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in (getattr(f, "__module__", None) or type(f).__module__)]
"""
COMPUTE = """
import torch, cvfast
x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
torch.testing.assert_close(cvfast.functional.conv2d(x, w), torch.conv2d(x, w))
cvfast.info()
"""


def run(code: str, folder: Path, **env: str) -> str:
    """Runs `code` with the cvfast in `folder`; its output (stdout and stderr)."""
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **env}
    done = subprocess.run([sys.executable, "-c", NO_FINDER + code], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def bare(tmp_path):
    """A folder with cvfast's Python files and no compiled library."""
    shutil.copytree(PACKAGE, tmp_path / "cvfast", ignore=shutil.ignore_patterns("*.so", "__pycache__", "lib"))
    return tmp_path


def test_no_library(bare):
    output = run(COMPUTE, bare)
    assert "CPU operators" in output and "missing: cvfast._C cannot be imported" in output
    assert "libcvfast_cuda.so was not built; reinstall cvfast" in output


def test_broken_libraries(bare):
    (bare / "cvfast" / "lib").mkdir()
    for name in ("libcvfast_cpu.so", "libcvfast_ops.so", "libcvfast_cuda.so"):
        (bare / "cvfast" / "lib" / name).write_bytes(b"not a library")
    shutil.copy(next(PACKAGE.glob("_C.*.so")), bare / "cvfast")
    output = run(COMPUTE, bare)
    assert "missing: cvfast._C cannot be imported" in output
    assert "missing: libcvfast_cuda.so cannot be loaded with torch" in output


def test_operators_of_another_abi(bare):
    """_C and the kernels load, the operators' library misses a symbol of torch's: the reason names it."""
    lib = bare / "cvfast" / "lib"
    shutil.copytree(PACKAGE / "lib", lib)
    shutil.copy(next(PACKAGE.glob("_C.*.so")), bare / "cvfast")
    operators = lib / "libcvfast_ops.so"
    symbol = b"torch_library_impl"
    assert symbol in operators.read_bytes()
    operators.write_bytes(operators.read_bytes().replace(symbol, b"torch_library_imqx"))
    output = run(COMPUTE, bare)
    assert "libcvfast_ops.so cannot be loaded with torch" in output and "torch_library_imqx" in output


def test_torch_older_than_supported():
    code = "import torch; torch.__version__ = '2.9.1'\n" + COMPUTE
    assert "torch 2.9.1 is older than 2.11, the oldest that libcvfast_ops.so works with" in run(code, PACKAGE.parent)


def test_no_triton():
    code = "import sys; sys.modules['triton'] = None\n" + COMPUTE
    assert "missing: pip install triton" in run(code, PACKAGE.parent)


@pytest.mark.parametrize("home", ["/proc/no-such-home", ""])
def test_home_that_cannot_be_written(home):
    run(COMPUTE, PACKAGE.parent, HOME=home)


def test_unknown_instruction_set():
    output = run(COMPUTE, PACKAGE.parent, CVFAST_ISA="sve")
    assert "missing: CVFAST_ISA" in output and "sve" in output


def test_wrong_environment_does_not_stop_the_import():
    run("import cvfast", PACKAGE.parent, CVFAST_BACKEND="nonsense", CVFAST_CACHE="\\0", TRITON_INTERPRET="yes")


def test_importing_is_silent_and_light():
    code = """
import torch, sys
before = set(sys.modules)
import cvfast
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "matplotlib", "onnx", "onnxruntime", "typer", "rich", "torchmetrics", "PIL"}, new
assert not torch.cuda.is_initialized()
"""
    assert run(code, PACKAGE.parent) == ""


def test_info_as_a_module_and_as_a_command():
    module = subprocess.run([sys.executable, "-m", "cvfast.info"], capture_output=True, text=True)
    assert (module.returncode, module.stderr) == (0, "")
    assert "instruction set" in module.stdout
