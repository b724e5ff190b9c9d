"""accelerate() on torchvision's architectures with random weights: numbers, state_dicts, and the way back.

They take minutes, hence run only with --torchvision, where torchvision is installed.
"""

from __future__ import annotations

import copy

import pytest
import torch

import cvfast
from benchmarks import architectures
from benchmarks.models import flat, settled
from cvfast.testing.accuracy import relative_error

pytestmark = pytest.mark.skipif(
    "not config.getoption('--torchvision', default=False)", reason="pytest tests/torchvision --torchvision runs these"
)


def make(name: str) -> torch.nn.Module:
    """The model in eval mode, numbers of the size of 1 within."""
    torch.manual_seed(0)
    return settled(architectures.make(name), [architectures.pictures(name, 4)])


@pytest.mark.parametrize("name", architectures.names())
@torch.no_grad()
def test_architecture(name):
    model = make(name)
    inputs = architectures.pictures(name, 2)
    types, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    native = flat(model(inputs))
    exact = flat(model.double()(inputs.double()))
    model.float()

    cvfast.accelerate(model)
    limit, error = relative_error(native, exact), relative_error(flat(model(inputs)), exact)
    cvfast.set_precision("strict")
    try:
        strict = relative_error(flat(model(inputs)), exact)
    finally:
        cvfast.set_precision("fast")
    chains = sum(len(m.__dict__["_cvfast_plan"].chains) for m in model.modules() if "_cvfast_plan" in m.__dict__)
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    print(f"\n{name:<40} torch {limit:.1e}, cvfast {error:.1e}, strict {strict:.1e}; {chains} chains, {norms} norms")
    assert limit > 0
    assert error <= max(1e-5, 10 * limit)
    assert strict <= 2 * limit + 4 * torch.finfo(torch.float32).eps

    assert list(model.state_dict()) == list(state)
    assert not any(model.load_state_dict(state))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert cvfast.restore(model) is model
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(flat(model(inputs)), native)
