"""Set-up shared by all tests."""

import os

# Triton reads this when it is imported: its kernels then run in its interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")
# And oneDNN this: with AMX its gradient to the input of few channels in bfloat16 is wrong (torch 2.13), and results are
# measured by torch's.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch

from cvfast import _choices, _library

_choices.clear()  # what was measured on this machine must not decide what is tested


def isas() -> list[str]:
    """Instruction sets of the CPU kernels that this machine runs."""
    return _library.C.available_isas() if _library.C else []


@pytest.fixture
def isa(request):
    """Runs the test with the CPU kernels of instruction set `request.param` (None: as they are)."""
    if request.param is None:
        yield None
        return
    before = _library.C.active_isa()
    _library.C.set_isa(request.param)
    yield request.param
    _library.C.set_isa(before)


@pytest.fixture
def poisoned():
    """Results start as NaN, those that cvfast's CPU bindings and those that torch.empty allocates: gaps show."""
    _library.C.poison_results(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    _library.C.poison_results(False)


@pytest.fixture
def threads():
    """A function that sets the number of threads; the number from before comes back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
