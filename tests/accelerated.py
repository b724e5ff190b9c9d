"""What must hold for every model that is accelerated as a whole."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import cvfast
from benchmarks.models import converted, flat
from cvfast.testing.accuracy import relative_error


@torch.no_grad()
def check_accelerated(model: nn.Module, inputs: list[Tensor], name: str) -> None:
    """accelerate() and restore() on a model in eval mode, in place: numbers, state_dict, and the way back."""
    before, state = _all_of(model), copy.deepcopy(model.state_dict())
    with cvfast.use_backend("native"):
        native = flat(model(*inputs))
        exact = flat(model.double()(*converted(inputs, torch.float64)))
    model.float()

    cvfast.accelerate(model)
    assert _types(model) != before[0]
    limit, error = relative_error(native, exact), relative_error(flat(model(*inputs)), exact)
    cvfast.set_precision("strict")
    try:
        strict = relative_error(flat(model(*inputs)), exact)
    finally:
        cvfast.set_precision("fast")
    chains = sum(len(m.__dict__["_cvfast_plan"].chains) for m in model.modules() if "_cvfast_plan" in m.__dict__)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    print(f"\n{name:<40} torch {limit:.1e}, cvfast {error:.1e}, strict {strict:.1e}; {chains} chains, {norms} norms")
    assert limit > 0
    assert error <= max(1e-5, 10 * limit)
    assert strict <= 2 * limit + 4 * torch.finfo(torch.float32).eps

    _assert_same(_all_of(model)[1:], before[1:])
    assert list(model.state_dict()) == list(state)
    assert not any(model.load_state_dict(state))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert cvfast.restore(model) is model
    _assert_same(_all_of(model), before)
    with cvfast.use_backend("native"):
        assert torch.equal(flat(model(*inputs)), native)


def _types(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def _all_of(model: nn.Module) -> tuple[list, list, list, dict[str, Tensor]]:
    """Types, modes, names of the parameters, and buffers, of which state_dicts lack those that are not persistent."""
    modes = [(name, m.training) for name, m in model.named_modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return _types(model), modes, [name for name, _ in model.named_parameters()], buffers


def _assert_same(one, other) -> None:
    assert one[:-1] == other[:-1]
    assert one[-1].keys() == other[-1].keys()
    assert all(torch.equal(buffer, other[-1][name]) for name, buffer in one[-1].items())
