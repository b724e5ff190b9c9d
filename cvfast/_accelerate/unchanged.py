"""Answers that stay right as long as the modules they were found on are as they were, which C++ compares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from cvfast import _library

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBALS = vars(torch.nn.modules.module)
_GLOBAL_HOOKS = [name for name in _GLOBALS if name.startswith("_global_") and isinstance(_GLOBALS[name], dict)]


def sample(tensor: Tensor) -> int:
    """A number for some of its elements: writes through `.data` and NumPy are seen by nothing else."""
    return 0 if _library.C is None else _library.C.Unchanged.sample(tensor.data_ptr(), _bytes_in_reach(tensor))


def _bytes_in_reach(tensor: Tensor) -> int:
    """How many bytes from its first element on are the tensor's; 0 where they lie apart or elsewhere."""
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return tensor.nbytes if tensor.is_cpu and dense else 0


class Answer:
    """`ask()`, asked again only if something has changed that `look` looks at; only the answer True is kept.

    look: takes a `Snapshot` and notes all that the answer depends on; it may raise ValueError where that won't do.
    """

    def __init__(self, ask: Callable[[], bool], look: Callable[[Snapshot], None]) -> None:
        self._ask, self._look = ask, look
        self._state = None

    def __call__(self) -> bool:
        if self._state is not None and self._state.holds():
            return True
        state = Snapshot.of(self._look)  # before asking: nothing may change unseen in between
        answer = self._ask()
        self._state = state if answer else None
        return answer

    def forget(self) -> None:
        self._state = None


class Snapshot:
    """Notes modules and tensors as they are, and that no hooks see all modules; raises ValueError if some do."""

    @staticmethod
    def of(*looks: Callable[[Snapshot], None]):
        """What `looks` note, whose `holds()` says whether it is still so; None where that won't do."""
        if _library.C is None:
            return None
        try:
            snapshot = Snapshot()
            for look in looks:
                look(snapshot)
        except (ValueError, RuntimeError):  # there are hooks; a tensor has no version
            return None
        return snapshot.state

    def __init__(self) -> None:
        self.state = _library.C.Unchanged()
        for name in _GLOBAL_HOOKS:
            self.state.item(_GLOBALS, name)
            self.state.empty(_GLOBALS[name])

    def unwatched(self, module: Module) -> None:
        """The module's class, and that nobody sees its calls; raises ValueError if somebody does."""
        own = module.__dict__
        self.state.object(module)
        self.state.item(own, "forward")
        for name in _HOOKS:
            self.state.item(own, name)
            self.state.empty(own[name])

    def entries(self, module: Module, names: tuple[str, ...]) -> None:
        """Entries of the module's __dict__, or that there are none."""
        for name in names:
            self.state.item(module.__dict__, name)

    def tensors(self, module: Module, kind: str, names: tuple[str, ...]) -> None:
        """Which tensors these parameters or buffers are (kind: "_parameters" or "_buffers"), and their state."""
        own = module.__dict__[kind]
        self.state.item(module.__dict__, kind)
        for name in names:
            self.state.item(own, name)
            if isinstance(own.get(name), Tensor):
                self.state.tensor(own[name], _bytes_in_reach(own[name]))

    def children(self, module: Module) -> None:
        """The modules in a module, in their order."""
        self.state.object(module)
        self.state.item(module.__dict__, "_modules")
        self.state.values(module._modules)

    def attribute(self, module: Module, name: str) -> None:
        """An attribute wherever it is found."""
        if name in module.__dict__:
            self.state.item(module.__dict__, name)
        else:
            self.state.attribute(module, name)
