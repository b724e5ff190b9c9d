"""The CPU kernels by themselves: compiled from csrc/cpu without torch, run by ``kernel_check.cpp``.

``kernel_check`` compares each kernel with sums in double and its bits over layouts, threads and batches. Here it runs
plainly, under AddressSanitizer and UndefinedBehaviorSanitizer, and for 64-bit Arm under qemu-user. What the objects
export is read with nm.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp"))
SOURCES = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), Path(__file__).with_name("kernel_check.cpp")]
FLAGS = ["-std=c++17", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread",
         "-DCVFAST_EMULATED512", f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cpu'}"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
X86 = ("baseline", "avx2", "emulated512", "avx512")
ISAS = {"baseline": (16, []), "avx2": (32, AVX2), "emulated512": (64, AVX2), "avx512": (64, AVX512), "neon": (16, [])}

CXX = os.environ.get("CXX", "g++")
ARM_CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64 machine")


def compile_kernels(folder: Path, compiler: str, isa: str, flags: list[str]) -> Path:
    """Compiles the kernels of one instruction set into one object file."""
    vector_bytes, isa_flags = ISAS[isa]
    options = [*FLAGS, *flags, *isa_flags, f"-DCVFAST_ISA={isa}", f"-DCVFAST_VECTOR_BYTES={vector_bytes}"]
    parts = [folder / f"{source.stem}_{isa}.o" for source in KERNELS]
    for source, part in zip(KERNELS, parts, strict=True):
        subprocess.run([compiler, *options, "-c", source, "-o", part], check=True)
    path = folder / f"{isa}.o"
    subprocess.run([compiler, "-r", "-nostdlib", *parts, "-o", path], check=True)
    return path


def link_check(folder: Path, compiler: str, objects: list[Path], *flags: str) -> Path:
    """Links kernels with the checking program."""
    program = folder / "kernel_check"
    subprocess.run([compiler, *FLAGS, "-O2", *flags, *SOURCES, *objects, "-o", program], check=True)
    return program


def run_check(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The optimised x86-64 kernels by instruction set."""
    folder = tmp_path_factory.mktemp("objects")
    return {isa: compile_kernels(folder, CXX, isa, ["-O3"]) for isa in X86}


@pytest.fixture(scope="module")
def program(objects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_check(tmp_path_factory.mktemp("program"), CXX, list(objects.values()))


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
def test_objects_export_their_tables_and_nothing_the_linker_could_merge(objects):
    """A weak symbol compiled for AVX-512 could replace its baseline twin and crash an older machine."""
    for isa, path in objects.items():
        listing = subprocess.run(["nm", "--demangle", path], capture_output=True, text=True, check=True).stdout
        lines = listing.splitlines()
        exported = [line.split(maxsplit=2)[1:] for line in lines if line[17].isupper() and line[17] != "U"]
        assert {name for _, name in exported} == {f"cvfast::{isa}::{source.stem}" for source in KERNELS}
        assert {kind for kind, _ in exported} <= {"D", "R"}
        assert not [line for line in lines if line[17] in "wWvVu"]


@x86
def test_the_peak_is_of_independent_multiply_adds(objects):
    """Sums that a compiler merges or spills would make the measured peak a wrong one."""
    listing = subprocess.run(["objdump", "-d", objects["avx2"]], capture_output=True, text=True, check=True).stdout
    (loop,) = [body for body in listing.split("\n\n") if re.match(r"\w+ <\w*multiply_addsIf", body)]
    sums = re.findall(r"vfmadd132ps (?:%ymm\d+,){2}(%ymm\d+)$", loop, re.M)
    assert len(sums) == len(set(sums)) == 14


@x86
def test_kernels_keep_to_their_memory_and_to_defined_behaviour(objects, tmp_path):
    """The baseline is instrumented, as every machine runs it; the other objects only complete the link."""
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    instrumented = {**objects, "baseline": compile_kernels(tmp_path, CXX, "baseline", sanitizers)}
    program = link_check(tmp_path, CXX, list(instrumented.values()), "-fsanitize=address,undefined")
    run_check(program, "baseline", ASAN_OPTIONS="detect_leaks=1")


def test_kernels_are_right_on_64_bit_arm(tmp_path):
    missing = [tool for tool in (ARM_CXX, QEMU) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user")
    program = link_check(tmp_path, ARM_CXX, [compile_kernels(tmp_path, ARM_CXX, "neon", ["-O2"])], "-static")
    # qemu is slow: the other dtypes' kernels differ from these in a type or a conversion.
    assert "neon: " in run_check(QEMU, program, "f32", "f16")
