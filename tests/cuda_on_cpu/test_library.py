"""The built CUDA library beside a torch without CUDA: it loads, registers its operators and needs no libtorch_cuda."""

from __future__ import annotations

import subprocess

import pytest
import torch

from cvfast import _library


@pytest.fixture(autouse=True)
def library():
    if not _library.cuda.loaded:
        pytest.skip(f"no CUDA library: {_library.cuda.reason}")


@pytest.mark.parametrize("operator", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad", "conv_transpose2d"])
def test_operators_are_registered(operator: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cvfast::{operator}", "CUDA")


def test_what_it_is_linked_with():
    path = str(_library.FOLDER / "libcvfast_cuda.so")
    table = subprocess.run(("readelf", "-d", path), capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split(".so")[0] for line in table.splitlines() if "(NEEDED)" in line}
    assert "libtorch_cpu" in needed
    assert not needed & {
        "libtorch_cuda",
        "libc10_cuda",
        "libc10",
        "libtorch",
        "libtorch_python",
        "libcudart",
        "libcuda",
    }
