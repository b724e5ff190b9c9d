"""Triton kernels run in the strict interpreter here. tests/conftest.py turns the interpreter on."""

import pytest

from cvfast import _env
from tests.triton.interpreter import strict


@pytest.fixture(autouse=True)
def interpreter():
    if not _env.triton_interpret:
        pytest.skip("Triton's interpreter is off: the kernels run on the GPU")
    with strict():
        yield
