"""Pooling without gradients: of whole images by torch's avg_pool2d, and by windows in a sequence of chains.

A first call of what adaptive pooling is made of, after a model has emptied the caches, takes 0.1 ms longer.
"""

from __future__ import annotations

import torch
from torch import Tensor
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
        window, stride, padding = self._options[:3]
        pairs = ((length, length) for length in (stride, padding, window))
        return functional.Step(input, residual, "none", 0.0, "none", None, None, (*pairs, 1), "max_pooling")

    @staticmethod
    def takes(module: Module) -> bool:
        if type(module) is not MaxPool2d:
            return False
        window, stride, padding, *others = _options(module)
        square = all(type(length) is int for length in (window, stride, padding))
        return square and others == [1, False, False] and 2 * padding <= window


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def _options(module: MaxPool2d) -> tuple:
    return tuple([getattr(module, name) for name in _MAX_POOL])
