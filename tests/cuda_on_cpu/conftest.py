"""Set-up of the tests that compile CUDA sources: they need nvcc and g++, but no GPU and no driver."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cuda_on_cpu.simulator import CSRC, Module, compile_module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("nvcc"):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents and "build_folder" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="nvcc is not in PATH: CUDA sources can't be compiled"))


@pytest.fixture(scope="session")
def build_folder(request: pytest.FixtureRequest) -> Path:
    """Where compiled modules stay from run to run, each under a hash of all that went into it."""
    return request.config.cache.mkdir("cuda_on_cpu")


@pytest.fixture(scope="session")
def conv2d_source() -> str:
    return (CSRC / "cuda" / "conv2d.cu").read_text()


@pytest.fixture(scope="session")
def conv2d_module(conv2d_source: str, build_folder: Path) -> Module:
    return compile_module(conv2d_source, build_folder)
