"""conv_transpose2d by torch's own operator."""

import torch

from cvfast.backends.native.conv2d import why_not, why_slower

__all__ = ["run", "why_not", "why_slower"]

run = torch.conv_transpose2d
