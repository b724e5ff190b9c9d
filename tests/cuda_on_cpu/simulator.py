"""Builds a .cu file for the simulated device and runs it: nvcc -> PTX -> C++ -> a shared library.

The library holds the file's kernels, translated from the PTX that nvcc wrote, and the file's host code, which nvcc
compiled: the real launchers run, and their ``<<<...>>>`` reaches ``runtime/cudart.cpp`` in place of the CUDA runtime.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from tests.cuda_on_cpu.ptx import parse, translate

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
RUNTIME = HERE / "runtime"
GXX = ("g++", "-std=c++17", "-fPIC", f"-I{RUNTIME}")
RUNTIME_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")
# -ffp-contract=off: only PTX's own fma may fuse. -fwrapv: PTX integers wrap.
KERNEL_FLAGS = ("-O1", "-march=native", "-ffp-contract=off", "-fwrapv")
NVCC = ("nvcc", "-std=c++17", "-O3", "-lineinfo", f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}")


class SimulationError(Exception):
    """The kernel did something it must not: the text says what, where, and in which thread."""


class CudaError(Exception):
    """A launcher returned a CUDA error without any kernel having failed."""

    def __init__(self, code: int) -> None:
        super().__init__(f"CUDA error {code}")
        self.code = code


class Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32))

    def as_tuple(self) -> tuple[int, int, int]:
        return self.x, self.y, self.z


@dataclass(frozen=True)
class Launch:
    """A launch as the launcher made it."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    stream: int


class Module:
    """Kernels and launchers of one .cu file on the simulated device."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.sim_error.restype = ctypes.c_char_p
        self._library.sim_launched_kernel.restype = ctypes.c_char_p
        self._library.sim_launch_count.restype = ctypes.c_size_t
        self._library.sim_launched_grid.restype = Dim3
        self._library.sim_launched_block.restype = Dim3
        self._library.sim_launched_stream.restype = ctypes.c_void_p
        self._library.sim_launch.argtypes = (
            ctypes.c_char_p, Dim3, Dim3, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64
        )  # fmt: skip

    def call(
        self,
        launcher: str,
        arguments: ctypes.Structure,
        *,
        reads: Mapping[str, torch.Tensor],
        writes: Mapping[str, torch.Tensor],
        seed: int = 0,
        check_races: bool = True,
        stream: int = 0,
    ) -> list[Launch]:
        """Calls ``cudaError_t cvfast::cuda::<launcher>(const cvfast::<type of arguments>&, cudaStream_t)``.

        Kernels may touch the memory of ``reads`` and ``writes`` (CPU tensors, by the name used in messages), from the
        first to the last element of each, and write that of ``writes`` only. ``seed`` draws the order of blocks and
        threads. Returns the launches made; raises ``SimulationError`` or ``CudaError``.
        """
        self._configure(reads, writes, seed, check_races)
        struct = type(arguments).__name__
        function = getattr(
            self._library, f"_ZN6cvfast4cuda{len(launcher)}{launcher}ERKNS_{len(struct)}{struct}EP11CUstream_st"
        )
        self._raise_for(function(ctypes.byref(arguments), ctypes.c_void_p(stream)))
        return [
            Launch(
                self._library.sim_launched_kernel(ctypes.c_size_t(i)).decode(),
                self._library.sim_launched_grid(ctypes.c_size_t(i)).as_tuple(),
                self._library.sim_launched_block(ctypes.c_size_t(i)).as_tuple(),
                self._library.sim_launched_stream(ctypes.c_size_t(i)) or 0,
            )
            for i in range(self._library.sim_launch_count())
        ]

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: bytes,
        *,
        reads: Mapping[str, torch.Tensor],
        writes: Mapping[str, torch.Tensor],
        dynamic_shared: int = 0,
        seed: int = 0,
        check_races: bool = True,
    ) -> None:
        """Launches one kernel (its name in the PTX) by hand; ``arguments`` is its parameter memory. See ``call``."""
        self._configure(reads, writes, seed, check_races)
        name = kernel.encode()
        self._raise_for(
            self._library.sim_launch(name, Dim3(*grid), Dim3(*block), dynamic_shared, arguments, len(arguments))
        )

    def _configure(
        self, reads: Mapping[str, torch.Tensor], writes: Mapping[str, torch.Tensor], seed: int, check_races: bool
    ) -> None:
        self._library.sim_configure(ctypes.c_uint64(seed), ctypes.c_bool(check_races))
        for buffers, writable in ((reads, False), (writes, True)):
            for name, tensor in buffers.items():
                self._library.sim_add_buffer(
                    name.encode(), ctypes.c_uint64(tensor.data_ptr()), ctypes.c_uint64(_span_bytes(tensor)),
                    ctypes.c_bool(writable),
                )  # fmt: skip

    def _raise_for(self, code: int) -> None:
        if code == 0:
            return
        message = self._library.sim_error().decode()
        raise SimulationError(message) if message else CudaError(code)


def _span_bytes(tensor: torch.Tensor) -> int:
    """From the first element to the end of the last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def compile_module(source: str, cache: Path, *, arch: int = 80, only: str = "") -> Module:
    """Compiles the text of a .cu file, or takes what an earlier call left in the folder ``cache``.

    ``arch`` is the virtual architecture of the PTX; ``only`` keeps the kernels whose name in the PTX contains it.
    """
    runtime = cached(cache, _build_runtime, contents(RUNTIME.glob("*")))

    def build(folder: Path) -> None:
        _build_module(source, arch, only, runtime, folder)

    headers = contents([*CSRC.glob("include/**/*.h"), *CSRC.glob("cuda/*.*h")])
    translator = contents([*HERE.glob("ptx/*.py"), Path(__file__)])
    key = f"{source}\0{arch}\0{only}\0{runtime.name}\0{headers}\0{translator}\0{nvcc_version()}"
    return Module(cached(cache, build, key) / "module.so")


def contents(files: Iterable[Path]) -> str:
    """The texts of files, as a part of a key of ``cached``."""
    return "\0".join(file.read_text() for file in sorted(files))


@functools.cache
def nvcc_version() -> str:
    return run(HERE, "nvcc", "--version")


@functools.cache
def gxx_version() -> str:
    return run(HERE, "g++", "--version")


def cached(cache: Path, build: Callable[[Path], None], key: str) -> Path:
    """The folder that ``build`` fills, once for each ``key`` (and version of g++), also with several processes."""
    folder = cache / hashlib.sha256(f"{key}\0{gxx_version()}".encode()).hexdigest()[:32]
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as building:
                unfinished = Path(building, "folder")
                unfinished.mkdir()
                build(unfinished)
                unfinished.rename(folder)
    return folder


def _build_runtime(folder: Path) -> None:
    for source in sorted(RUNTIME.glob("*.cpp")):
        run(folder, *GXX, *RUNTIME_FLAGS, "-c", str(source))


def _build_module(source: str, arch: int, only: str, runtime: Path, folder: Path) -> None:
    (folder / "source.cu").write_text(source)
    gencode = f"arch=compute_{arch},code=compute_{arch}"
    # -keep leaves source.ptx, whose kernels bear the very names that host.o registers.
    run(folder, *NVCC, "-gencode", gencode, "-Xcompiler", "-fPIC", "-keep", "-c", "source.cu", "-o", "host.o")
    module = parse((folder / "source.ptx").read_text())
    module.kernels = [kernel for kernel in module.kernels if only in kernel.name]
    (folder / "kernels.cpp").write_text(translate(module))
    run(folder, *GXX, *KERNEL_FLAGS, "-c", "kernels.cpp")
    objects = ("kernels.o", "host.o", *map(str, sorted(runtime.glob("*.o"))))
    run(folder, *GXX, "-shared", "-Wl,-Bsymbolic,--no-undefined", "-o", "module.so", *objects)
    for intermediate in folder.iterdir():
        if intermediate.name not in ("module.so", "source.cu", "source.ptx", "kernels.cpp"):
            intermediate.unlink()


def run(folder: Path, *command: str) -> str:
    """What the command printed; ``RuntimeError`` with that where it failed."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr
