"""Transfer learning: weights from a file, a new head, frozen layers, and learning rates layer by layer.

    model = create_model("resnet18", num_classes=1000)
    print(load_weights(model, "resnet18.pth"))
    replace_head(model, 10)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, decay=0.8))
    for epoch in range(20):
        unfreeze_gradually(model, "layer4", epoch, every=2)  # at first only fc learns, from epoch 2 on layer4.1, too
        ...

"Up to" and "behind" are meant in the order of definition, which is that of the state_dict. In the zoo's classifiers
and torchvision's it is the order from the input to the output. All functions work on any `torch.nn.Module` that keeps
to it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cvfast.engine.checkpoint import FORMAT, CheckpointError, checkpoint_file, read_safetensors


def freeze(model: nn.Module, upto: str | None = None) -> None:
    """Stops the training of a model's first layers, up to and including the module called ``upto`` (None: of all).

    Their parameters get no gradient, and they compute as in eval mode, whatever ``model.train()`` says: batch-norm
    normalises with its running statistics and leaves them as they are, dropout lets everything pass.

    Raises:
        ValueError: if ``model`` has no module called ``upto``.
    """
    for module, whole in _upto(model, upto):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
            parameter.grad = None
        if whole and _stay_in_eval_mode not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_stay_in_eval_mode)


def unfreeze(model: nn.Module, behind: str | None = None) -> None:
    """Lets a model's last layers train again: those behind the module called ``behind`` (None: all).

    Layers compute as in training again from the next ``model.train()`` on.

    Raises:
        ValueError: if ``model`` has no module called ``behind``.
    """
    frozen = set() if behind is None else {module for module, _ in _upto(model, behind)}
    for module in model.modules():
        if module not in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
            for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _stay_in_eval_mode]:
                del module._forward_pre_hooks[key]


def unfreeze_gradually(model: nn.Module, upto: str, epoch: int, every: int = 1) -> str | None:
    """Freezes what is frozen in epoch ``epoch``, counted from 0, and nothing else (Howard and Ruder 2018).

    In the first ``every`` epochs it is all up to the module ``upto``; then, every so many epochs, one stage less (see
    `stages`), from the output to the input. As it depends on the epoch only, a resumed run goes on alike.

    Returns:
        The name of the last frozen stage (at first ``upto``), None where everything learns.

    Raises:
        ValueError: if ``model`` has no module called ``upto``, or ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"every must be positive, got {every}")
    _upto(model, upto)
    names = list(stages(model))
    last = max(i for i, name in enumerate(names) if f"{upto}.".startswith(f"{name}.") or name.startswith(f"{upto}."))
    number = last - epoch // every
    frozen = upto if epoch < every else names[number] if number >= 0 else None
    if frozen is not None:
        freeze(model, frozen)
    unfreeze(model, frozen)
    return frozen


def stages(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """A model's parameters, in the order of definition, by the name of the module that learns as one.

    The stages are the model's children; of a child that is a list (nn.Sequential, nn.ModuleList), or that contains one
    and more than half of all parameters, its own children, and so on. ResNet's are conv1, bn1, layer1.0, layer1.1, ...,
    fc. Parameters that a divided module itself has belong to the stage that follows.
    """
    lists = (nn.Sequential, nn.ModuleList)
    half = sum(p.numel() for p in model.parameters()) / 2
    result: dict[str, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    waiting: list[nn.Parameter] = []

    def unseen(parameters: Iterator[nn.Parameter]) -> list[nn.Parameter]:
        found = [p for p in parameters if p not in seen]
        seen.update(found)
        return found

    def visit(name: str, module: nn.Module) -> None:
        large = sum(p.numel() for p in module.parameters()) > half
        divided = (
            module is model
            or isinstance(module, lists)
            or (large and any(isinstance(child, lists) for child in module.children()))
        )
        if divided and next(module.children(), None) is not None:
            waiting.extend(unseen(module.parameters(recurse=False)))
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)
        elif parameters := unseen(module.parameters()):
            result[name] = waiting + parameters
            waiting.clear()

    visit("", model)
    return result


def parameter_groups(model: nn.Module, lr: float, decay: float = 1.0) -> list[dict]:
    """Groups for a torch optimiser whose learning rate falls from the output to the input (Howard and Ruder 2018).

    Args:
        lr: learning rate of the last stage (see `stages`).
        decay: each stage before has ``decay`` times the learning rate of the one behind it.

    Returns:
        A dict for each stage: "name", "params" (frozen ones, too, which an optimiser leaves alone), "lr", and "scale",
        its share of ``lr``, for schedules.

    Raises:
        ValueError: if ``decay`` is not in (0, 1].
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    found = stages(model)
    return [
        {"name": name, "params": parameters, "scale": scale, "lr": lr * scale}
        for i, (name, parameters) in enumerate(found.items())
        for scale in [decay ** (len(found) - 1 - i)]
    ]


def replace_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Puts a freshly initialised layer with ``num_classes`` outputs in the place of the last one, and returns it.

    The last layer is the last nn.Linear or nn.Conv2d in the order of definition; the new one is of the same class, with
    its inputs, device and dtype.

    Raises:
        ValueError: if ``num_classes`` is not positive, or ``model`` is, or has, no such layer.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    name = _head_name(model)
    old = model.get_submodule(name)
    options = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        new = type(old)(old.in_features, num_classes, **options)
    else:
        new = type(old)(old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, **options)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new.train(old.training))
    return new


@dataclass(frozen=True)
class WeightsReport:
    """What became of a file's tensors.

    Attributes:
        loaded: names that the model took.
        missing: names that the model has and the file has not.
        unexpected: names that the file has and the model has not.
        mismatched: names with different shapes, (in the file, in the model).
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[list[int], list[int]]]

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{name} (file {file}, model {model})" for name, (file, model) in self.mismatched.items()]
        parts = {"missing": self.missing, "unexpected": self.unexpected, "mismatched": shapes}
        lines = [f"{len(names)} {word}: {_first(names)}" for word, names in parts.items() if names]
        return "; ".join([f"{len(self.loaded)} tensors fit", *lines])


def load_weights(model: nn.Module, path: str | Path, *, head: bool = True, strict: bool = True) -> WeightsReport:
    """Loads the tensors of a local file into a model.

    Args:
        path: a .safetensors file, a checkpoint of cvfast or the folder of a run (its best epoch), or a file that
            torch.save made of a state_dict (.pth, .pt), also under the key "state_dict" or "model", also of a model in
            DistributedDataParallel. Such a file may hold tensors and plain containers only (``weights_only``).
        head: False leaves the last layer as it is (see `replace_head`), whatever the file says of it.
        strict: False loads what fits, and leaves the rest as it is.

    Returns:
        What was loaded, and, unless ``strict``, what was not. Counters of batches, which older files lack, may be
        missing.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be read, or, with ``strict``, does not fit; the model is as it was.
    """
    found = _read(checkpoint_file(path, "best"))
    expected = model.state_dict()
    if not head:
        start = _head_name(model) + "."
        found, expected = ({n: t for n, t in d.items() if not n.startswith(start)} for d in (found, expected))
    common = [name for name in expected if name in found]
    shapes = {name: (list(found[name].shape), list(expected[name].shape)) for name in common}
    report = WeightsReport(
        loaded=[name for name, (file, own) in shapes.items() if file == own],
        missing=[n for n in expected if n not in found and not n.endswith("num_batches_tracked")],
        unexpected=[name for name in found if name not in expected],
        mismatched={name: (file, own) for name, (file, own) in shapes.items() if file != own},
    )
    if strict and not report.fits:
        raise CheckpointError(f"{path} does not fit the model: {report}")
    model.load_state_dict({name: found[name] for name in report.loaded}, strict=False)
    return report


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        tensors, header = read_safetensors(path)
        if header.get("format") == FORMAT:
            tensors = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        return tensors
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is damaged, or holds more than tensors; not loaded: {error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no file of torch.save, or a damaged one: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"{path} holds no state_dict (tensors by name)")
    parallel = all(name.startswith("module.") for name in content)
    return {name.removeprefix("module.") if parallel else name: tensor for name, tensor in content.items()}


def _head_name(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)) and name]
    if not names:
        raise ValueError("the model has no nn.Linear or nn.Conv2d that could be its last layer")
    return names[-1]


def _upto(model: nn.Module, upto: str | None) -> list[tuple[nn.Module, bool]]:
    """All modules up to and including ``upto`` with its parts, and whether each is among them with all its parts."""
    if upto is None:
        return [(module, True) for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    if not upto or upto not in names:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"the model has no module called {upto!r}; its children are {children}")
    last = max(i for i, name in enumerate(names) if f"{name}.".startswith(f"{upto}."))
    return [(model.get_submodule(name), bool(name) and not upto.startswith(f"{name}.")) for name in names[: last + 1]]


def _stay_in_eval_mode(module: nn.Module, inputs) -> None:
    module.training = False


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if len(names) > count else "")
