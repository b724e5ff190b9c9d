"""The few things that differ when ``torchrun`` starts several processes of a training run.

Without torchrun there is one process: rank 0 of 1, and every function here returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started (gloo on the CPU, NCCL on CUDA), and leaves them at the end."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU where ``device`` is CUDA without an index."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
    return device


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: nn.Module) -> nn.Module:
    """``model`` with its gradients averaged over all processes."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def sum_over_processes(values: Tensor) -> Tensor:
    """The element-wise sum of every process's ``values``, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set in at least one process, so that all of them act on it at the same step."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)))


def gather(value: Tensor) -> Tensor:
    """Every process's ``value``, stacked: [world_size, ...]."""
    if not dist.is_initialized():
        return value.unsqueeze(0)
    values = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(values, value)
    return torch.stack(values)


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns in process 0, in all processes; only process 0 calls it."""
    result = [make() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    return result[0]
