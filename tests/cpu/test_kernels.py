"""The CPU kernels by themselves, run without torch by ``kernel_check.cpp``.

``kernel_check`` compares each kernel with sums in double and its bits over layouts, threads and batches. Here it runs
on the built library, on kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer, and on those for 64-bit
Arm under qemu-user. What the kernels export is read with nm.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import cvfast

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(cvfast.__file__).parent / "lib" / "libcvfast_cpu.so"
CHECKED = {"conv2d"}  # what kernel_check.cpp calls; the other kernels are there for the linker
KERNELS = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp"))
CHOICE = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
CHECK = Path(__file__).with_name("kernel_check.cpp")
FLAGS = ["-std=c++17", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread",
         f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cpu'}"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
ISAS = {"baseline": (16, []), "avx2": (32, AVX2), "avx512": (64, AVX512), "neon": (16, [])}

CXX = os.environ.get("CXX", "g++")
ARM_CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64 machine")


def compile_kernel(source: Path, folder: Path, compiler: str, isa: str, *flags: str) -> Path:
    """Compiles one file of kernels for one instruction set."""
    vector_bytes, isa_flags = ISAS[isa]
    path = folder / f"{source.stem}_{isa}.o"
    options = [*FLAGS, *flags, *isa_flags, f"-DCVFAST_ISA={isa}", f"-DCVFAST_VECTOR_BYTES={vector_bytes}"]
    subprocess.run([compiler, *options, "-c", source, "-o", path], check=True)
    return path


def compile_check(folder: Path, compiler: str, isa: str, *flags: str, link: tuple[str, ...] = ()) -> Path:
    """Compiles the kernels of one instruction set, the only one there, and the checking program.

    `flags` are the checked kernels' alone; the program around them is the same whatever it looks for.
    """
    objects = [
        compile_kernel(source, folder, compiler, isa, *(flags if source.stem in CHECKED else ["-O0"]))
        for source in KERNELS
    ]
    program = folder / "kernel_check"
    options = [*FLAGS, "-O2", *link, "-DCVFAST_BASELINE_ONLY"]
    subprocess.run([compiler, *options, CHECK, *CHOICE, *objects, "-o", program], check=True)
    return program


def run_check(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checking program on the built library."""
    path = tmp_path_factory.mktemp("program") / "kernel_check"
    subprocess.run([CXX, *FLAGS, "-O2", CHECK, LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}", "-o", path], check=True)
    return path


@x86
def test_kernels_are_right_for_each_instruction_set_of_this_machine(program):
    output = run_check(program)
    assert "baseline: " in output


@x86
def test_unavailable_instruction_set_is_refused_by_name(program):
    result = subprocess.run([program, "sse9"], capture_output=True, text=True)
    assert result.returncode != 0
    assert "'sse9'; available here: " in result.stderr
    assert "baseline" in result.stderr


@x86
@pytest.mark.parametrize("isa", ["baseline", "avx512"])
def test_kernels_export_their_tables_and_nothing_the_linker_could_merge(isa, tmp_path):
    """A weak symbol compiled for AVX-512 could replace its baseline twin and crash an older machine.

    Without optimisation no function is inlined away that the linker could see.
    """
    for source in KERNELS:
        path = compile_kernel(source, tmp_path, CXX, isa, "-O0")
        listing = subprocess.run(["nm", "--demangle", path], capture_output=True, text=True, check=True).stdout
        lines = listing.splitlines()
        exported = [line.split(maxsplit=2)[1:] for line in lines if line[17].isupper() and line[17] != "U"]
        assert {name for _, name in exported} == {f"cvfast::{isa}::{source.stem}"}
        assert {kind for kind, _ in exported} <= {"D", "R"}
        assert not [line for line in lines if line[17] in "wWvVu"]


@x86
def test_the_peak_is_of_independent_multiply_adds(tmp_path):
    """Sums that a compiler merges or spills would make the measured peak a wrong one."""
    (source,) = [path for path in KERNELS if path.stem == "peak"]
    path = compile_kernel(source, tmp_path, CXX, "avx2", "-O3")
    listing = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    (loop,) = [body for body in listing.split("\n\n") if re.match(r"\w+ <\w*multiply_addsIf", body)]
    sums = re.findall(r"vfmadd132ps (?:%ymm\d+,){2}(%ymm\d+)$", loop, re.M)
    assert len(sums) == len(set(sums)) == 14


@x86
def test_kernels_keep_to_their_memory_and_to_defined_behaviour(tmp_path):
    """The baseline is instrumented: every machine runs it. f16 differs from bf16 in conversions alone."""
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = compile_check(tmp_path, CXX, "baseline", "-Og", "-g1", *sanitizers, link=sanitizers)
    run_check(program, "f32", "f64", "bf16", ASAN_OPTIONS="detect_leaks=1")


def test_kernels_are_right_on_64_bit_arm(tmp_path):
    missing = [tool for tool in (ARM_CXX, QEMU) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user")
    program = compile_check(tmp_path, ARM_CXX, "neon", "-O2", link=("-static",))
    # qemu is slow: the other dtypes' kernels differ in a type, or in conversions that x86's baseline checks, too.
    assert "neon: " in run_check(QEMU, program, "f32")


@pytest.mark.parametrize(("isa", "vector_bytes"), [("baseline", 16), ("avx2", 32), ("avx2", 64), ("avx512", 64)])
@x86
def test_sigmoid_and_tanh_keep_to_their_stated_errors(isa, vector_bytes, tmp_path):
    """3 units in the last place; NaN and infinities."""
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": avx512}[isa]
    if not needed <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this machine lacks {isa}")
    _, flags = ISAS[isa]
    program = tmp_path / "check"
    defines = [f"-DCVFAST_ISA={isa}", f"-DCVFAST_VECTOR_BYTES={vector_bytes}"]
    source = Path(__file__).with_name("sigmoid_tanh_check.cpp")
    own_headers = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's, of AVX-512
    subprocess.run([CXX, *FLAGS, "-O2", *flags, *own_headers, *defines, source, "-o", program], check=True)
    assert run_check(program).count("ulp") == 4
