"""Average pooling of whole images without gradients, by torch's avg_pool2d.

A first call of what adaptive pooling is made of, after a model has emptied the caches, takes 0.1 ms longer.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import AdaptiveAvgPool2d, Module
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from cvfast._accelerate.plain import unwatched

_ONE_PIXEL = (1, (1, 1))


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
            and module.output_size in _ONE_PIXEL
            and unwatched(module)
            and not _has_any_global_hook()
        )


def replace_global_averages(graph: fx.Graph, root: Module) -> None:
    """Replaces the calls of modules that pool whole images."""
    for node in list(graph.nodes):
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        if type(module) is not AdaptiveAvgPool2d or module.output_size not in _ONE_PIXEL or len(node.args) != 1:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(GlobalAverage(module), node.args))
        graph.erase_node(node)
