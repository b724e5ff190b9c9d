"""accelerate() on torchvision's architectures with random weights: numbers, state_dicts, and the way back.

They take minutes, hence run only with --torchvision, where torchvision is installed.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import architectures
from benchmarks.models import settled
from tests.accelerated import check_accelerated

pytestmark = pytest.mark.skipif(
    "not config.getoption('--torchvision', default=False)", reason="pytest tests/torchvision --torchvision runs these"
)


@pytest.mark.parametrize("name", architectures.names())
def test_architecture(name):
    torch.manual_seed(0)
    model = settled(architectures.make(name), [architectures.pictures(name, 4)])
    check_accelerated(model, [architectures.pictures(name, 2)], name)
