"""One line for an existing model: accelerate(), restore(), override(); explain() and tune() tell what it gains."""

from __future__ import annotations

import copy as _copy

import torch
from torch.nn import Module

from cvfast import _packed
from cvfast._accelerate import chains as _chains
from cvfast._accelerate import fuse as _fuse
from cvfast._accelerate import layers as _layers
from cvfast._accelerate.explain import Explanation, explain
from cvfast._accelerate.measure import load_choices, tune
from cvfast._accelerate.override import override

__all__ = ["Explanation", "accelerate", "explain", "free_packed", "load_choices", "override", "restore", "tune"]


def accelerate(model: Module, *, copy: bool = False, fuse: bool | None = None) -> Module:
    """The model with torch's layers swapped for cvfast's, which share their parameters.

    Conv2d, ConvTranspose2d, Linear, LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell and MultiheadAttention of torch.nn
    change their class and nothing else: state_dict, hooks, names, devices, modes, parametrizations, tied weights and
    every reference to a layer stay as they are. Subclasses, whatever they change, stay torch's; see `override` for
    those.
    A model may be accelerated twice; layers that are cvfast's already stay so.

    Args:
        model: any torch.nn.Module; changed in place.
        copy: leave `model` as it is and change a copy, which holds the same parameters and buffers: training one of
            both trains the other. For parameters of its own accelerate `copy.deepcopy(model)`.
        fuse: fold batch-norm into the convolution before it, and run convolution, batch-norm, an added tensor and the
            activation as one, where the source of a module's forward proves that nothing else changes. Batch-norm that
            trains is not folded, but runs as one with what follows it; layers with hooks run one by one. None: if the
            model is in eval mode and gradients are off (torch.no_grad, torch.inference_mode). Folded weights are made
            anew when a parameter changes. One in place that autograd does not see (`parameter.data.mul_`, NumPy) is
            seen by a few elements at both ends and between: accelerate the model again after one that spares them.

    Returns:
        The model (with `copy`, the copy).

    Raises:
        TypeError: `model` is no Module.
    """
    _check(model)
    if fuse is None:
        fuse = not model.training and not torch.is_grad_enabled()
    if copy:
        model = _copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in model.modules():
        _layers.swap(module)
    (_fuse.fuse if fuse else _fuse.unfuse)(model)
    return model


def restore(model: Module) -> Module:
    """Undoes `accelerate`, in place and exactly: each layer gets the class back that it had. Returns the model.

    Parameters keep the values that they have now. Raises TypeError if `model` is no Module.
    """
    _check(model)
    _fuse.unfuse(model)
    for module in model.modules():
        _layers.restore(module)
    return model


def free_packed(model: Module | None = None) -> None:
    """Frees the copies of a model's weights that kernels keep without gradients; None: those of all models.

    They are about as large as the weights (`explain` says how large), and made again when the model is called again.
    Raises TypeError if `model` is no Module.
    """
    if model is None:
        _chains.forget()
        return _packed.free()
    _check(model)
    for module in model.modules():
        _chains.forget(module)
    _packed.free(model.parameters())


def _check(model: Module) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
