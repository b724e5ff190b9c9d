"""What the compiler makes of a .cu file for one architecture: resources of each kernel and its machine code."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_on_cpu.simulator import CSRC, NVCC, cached, contents, nvcc_version, run

_ENTRY = re.compile(r"Compiling entry function '([\w$]+)' for '(sm_\w+)'")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_OPCODE = re.compile(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)[.\w]*[ ;]")


@dataclass(frozen=True)
class CompiledKernel:
    registers: int
    shared_bytes: int
    opcodes: Counter[str]  # without modifiers: FFMA, LDS, BAR


def compile_kernels(source: Path, arch: int, cache: Path) -> dict[str, CompiledKernel]:
    """Kernels of a .cu file by name, compiled for ``sm_<arch>``. A kernel that spills registers is a RuntimeError."""

    def build(folder: Path) -> None:
        command = (*NVCC, "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v,-warn-spills,-Werror", str(source))
        report = run(folder, *command, "-o", "kernels.cubin")
        (folder / "report").write_text(report)
        (folder / "sass").write_text(run(folder, str(disassembler()), "-c", "kernels.cubin"))

    headers = contents([*CSRC.glob("include/**/*.h"), *CSRC.glob("cuda/*.*h")])
    folder = cached(
        cache, build, f"{source.read_text()}\0{headers}\0sm_{arch}\0{nvcc_version()}\0{Path(__file__).read_text()}"
    )
    opcodes = _opcodes((folder / "sass").read_text())
    kernels = {}
    for section in re.split(r"(?=Compiling entry function)", (folder / "report").read_text())[1:]:
        name = _ENTRY.match(section)[1]
        shared = _SHARED.search(section)
        registers = int(_REGISTERS.search(section)[1])
        kernels[name] = CompiledKernel(registers, int(shared[1]) if shared else 0, opcodes[name])
    return kernels


def _opcodes(sass: str) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for line in sass.splitlines():
        if section := re.match(r"\.text\.([\w$]+):", line):
            counts[section[1]] = current = Counter()
        elif counts and (opcode := _OPCODE.match(line)):
            current[opcode[1]] += 1
    return counts


def disassembler() -> Path:
    """nvdisasm, of the package nvidia-cuda-nvdisasm."""
    files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    return next(Path(file.locate()) for file in files if file.name == "nvdisasm")
