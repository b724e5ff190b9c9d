"""The linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfast import functional
from cvfast.nn.leaf import is_recorded, node


class Linear(torch.nn.Linear):
    """torch.nn.Linear on cvfast's kernels: the same arguments, parameters, state_dict and repr.

    Input [*, I], output [*, O]. See cvfast.functional.linear for dtypes and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_recorded(self, input):
            return node(self, input)
        return functional.linear(input, self.weight, self.bias)
