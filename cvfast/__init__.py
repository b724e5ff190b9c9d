"""cvfast: hand-written kernels that make PyTorch vision models faster.

`cvfast.accelerate(model)` is the one line for an existing model, `cvfast.explain` tells what it does.
`cvfast.functional` has torch.nn.functional's functions, `cvfast.nn` torch's layers; `cvfast.use_backend` chooses who
computes, `cvfast.info()` says what this installation can do. Importing cvfast compiles nothing, prints nothing and
does not touch a GPU.
"""

__version__ = "0.1.0"

from cvfast import functional, nn, ops
from cvfast._info import info
from cvfast.accelerate import accelerate, explain, free_packed, load_choices, override, restore, tune
from cvfast.backend import set_precision, use_backend

__all__ = [
    "__version__",
    "accelerate",
    "explain",
    "free_packed",
    "functional",
    "info",
    "load_choices",
    "nn",
    "ops",
    "override",
    "restore",
    "set_precision",
    "tune",
    "use_backend",
]
