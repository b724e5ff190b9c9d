"""cvfast: hand-written kernels that make PyTorch vision models faster.

`cvfast.functional` has torch.nn.functional's functions, `cvfast.nn` torch's layers; `cvfast.use_backend` chooses who
computes, `cvfast.info()` says what this installation can do. Importing cvfast compiles nothing, prints nothing and
does not touch a GPU.
"""

__version__ = "0.1.0"

from cvfast import functional, nn, ops
from cvfast._info import info
from cvfast.accelerate import accelerate, override, restore
from cvfast.backend import set_precision, use_backend

__all__ = [
    "__version__",
    "accelerate",
    "functional",
    "info",
    "nn",
    "ops",
    "override",
    "restore",
    "set_precision",
    "use_backend",
]
