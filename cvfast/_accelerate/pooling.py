"""Pooling without gradients: of whole images by torch's avg_pool2d, and by windows in a sequence of chains or alone.

A first call of what adaptive pooling is made of, after a model has emptied the caches, takes 0.1 ms longer.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import AdaptiveAvgPool2d, MaxPool2d, Module
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from cvfast import functional
from cvfast._accelerate.plain import unwatched
from cvfast._accelerate.unchanged import Snapshot

ONE_PIXEL = (1, (1, 1))


class GlobalAverage:
    """An AdaptiveAvgPool2d to one pixel; as avg_pool2d where that is faster."""

    __name__ = __qualname__ = "global_average"  # in the code that torch.fx writes

    def __init__(self, module: AdaptiveAvgPool2d) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._fits(input):
            return self.module(input)
        return F.avg_pool2d(input, input.shape[2:])

    def _fits(self, input: Tensor) -> bool:
        """Whether these are images in channels_last, and nobody watches the module or has changed it."""
        module = self.module
        images = type(input) is Tensor and input.is_cpu and input.dtype is torch.float32 and input.dim() == 4
        return (
            images
            and input.stride(1) == 1
            and input.numel() > 0
            and type(module) is AdaptiveAvgPool2d
            and module.output_size in ONE_PIXEL
            and unwatched(module)
            and not _has_any_global_hook()
        )


class MaxPooling:
    """A MaxPool2d of square windows; float32."""

    __name__ = __qualname__ = "max_pooling"  # in the code that torch.fx writes

    def __init__(self, module: MaxPool2d) -> None:
        self.module, self._options = module, _options(module)
        self.ready = self  # at once

    def __call__(self, input: Tensor, residual: None = None) -> Tensor:
        return self.module(input)

    def is_still_so(self) -> bool:
        module = self.module
        return type(module) is MaxPool2d and unwatched(module) and _options(module) == self._options

    def look(self, snapshot: Snapshot) -> None:
        snapshot.unwatched(self.module)
        snapshot.entries(self.module, _MAX_POOL)

    def step(self, input: int, residual: int) -> functional.Step:
        *lengths, _, ceil, _ = self._options
        pairs = [(length, length) for length in map(_square, lengths)]
        window, stride, padding = pairs
        kind = "max_pooling_ceil" if ceil else "max_pooling"
        return functional.Step(input, residual, "none", 0.0, "none", None, None, (stride, padding, window, 1), kind)

    @staticmethod
    def takes(module: Module) -> bool:
        if type(module) is not MaxPool2d:
            return False
        *lengths, dilation, _, gives_indices = _options(module)
        window, stride, padding = map(_square, lengths)
        known = None not in (window, stride, padding) and dilation == 1 and gives_indices is False
        return known and window > 0 and stride > 0 and 0 <= 2 * padding <= window


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def max_pool_of_call(node: fx.Node) -> MaxPool2d | None:
    """A module that does what a call of torch's function with constant options does; None for other nodes."""
    if node.target not in (F.max_pool2d, torch.max_pool2d) or len(node.args) > 1 + len(_MAX_POOL):
        return None
    given = dict(zip(_MAX_POOL, node.args[1:], strict=False), **node.kwargs)
    if "kernel_size" not in given or not given.keys() <= set(_MAX_POOL) or node.all_input_nodes != [node.args[0]]:
        return None
    return MaxPool2d(**given)


def _options(module: MaxPool2d) -> tuple:
    return tuple([getattr(module, name) for name in _MAX_POOL])


def _square(lengths: object) -> int | None:
    """The length of both sides of a square; None for anything else."""
    first, second = lengths if isinstance(lengths, (tuple, list)) and len(lengths) == 2 else (lengths, lengths)
    return first if type(first) is type(second) is int and first == second else None
