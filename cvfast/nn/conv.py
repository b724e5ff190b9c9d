"""Convolution layers."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast import functional
from cvfast.nn.leaf import is_recorded, node


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d on cvfast's kernels: the same arguments, parameters, state_dict and repr.

    Input [N, C, H, W] or [C, H, W], output [N, K, P, Q] or [K, P, Q]; all padding modes ("zeros", "reflect",
    "replicate", "circular"), string padding, and every memory format. See cvfast.functional.conv2d for dtypes
    and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_recorded(self, input):
            return node(self, input)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, **epilogue) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, **epilogue)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on cvfast's kernels: the same arguments, parameters, state_dict and repr.

    Input [N, C, H, W] or [C, H, W], output [N, K, P, Q] or [K, P, Q], `output_size` of forward, every memory format.
    See cvfast.functional.conv_transpose2d for dtypes and errors.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """`output_size`: (P, Q) among the sizes that the stride allows; None: as output_padding says."""
        if is_recorded(self, input):
            return node(self, input, output_size)
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
            )
        return functional.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )
