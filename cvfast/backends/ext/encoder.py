"""Layers of a transformer's encoder by cvfast's C++ kernels (CPU), as one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from cvfast._packed import when_dropped
from cvfast.backends.ext import conv2d, linear
from cvfast.ops.conv2d import ONE_BY_ONE, conv2d_how
from cvfast.ops.encoder import ENCODER, PREPARE_ENCODER


class PreparedEncoder:
    """Halves of layers in a row, and a norm behind them, for contiguous inputs of that size, without gradients.

    halves: cvfast.functional.Half. norm: weight, bias and epsilon, or None. narrow: as `encoder_prepare` has it.
    RuntimeError: the kernels do not take them, or are not the fastest there are.
    """

    def __init__(
        self, halves: Sequence[tuple], norm: tuple[Tensor, Tensor, float] | None, input: Tensor, narrow: int = -1
    ) -> None:
        operands = [tensor for half in halves for tensor in (*half.norm, *half.first, *half.second)]
        operands += [] if norm is None else norm[:2]
        given = [t for t in operands if t is not None]
        if not all([type(t) in (Tensor, Parameter) and t.is_cpu and t.dtype is torch.float32 for t in given]):
            raise RuntimeError("an encoder's kernels take ordinary float32 tensors of the CPU")
        weights = [weight for half in halves for weight in (half.first[0], half.second[0])]
        if input.dim() == 0 or linear.is_torchs(input, weights[0]):
            raise RuntimeError("torch's products are as fast")
        epsilons = [half.epsilon for half in halves] + ([] if norm is None else [norm[2]])
        heads = [half.heads for half in halves]
        own = [conv2d_how(*ONE_BY_ONE, half.activation, "none") for half in halves]
        plain, rows = conv2d_how(*ONE_BY_ONE), input.numel() // max(1, input.shape[-1])
        hows = [how for first in own for how in (first, plain)]
        wide = len(weights) if narrow < 0 else 2 * narrow + 1  # weights that meet all positions
        counts = [rows] * wide + [input.shape[0]] * (len(weights) - wide)
        packed = [conv2d.packed_for_rows(*weight) for weight in zip(counts, weights, hows, strict=True)]
        # Whoever frees what is kept beside weights frees it here, too.
        self._prepared = [PREPARE_ENCODER(operands, packed, epsilons, heads, own, narrow)]
        self._watch = when_dropped(weights, self._prepared.clear)

    def __call__(self, input: Tensor) -> Tensor | None:
        """None where the layers have to be called. LookupError: packed weights were freed; this has to be made anew."""
        if not conv2d.takes_prepared(input, torch.float32) or not input.is_contiguous():
            return None
        prepared = [*self._prepared]  # held, whoever frees it meanwhile
        if not prepared:
            raise LookupError("the packed weights are gone")
        try:
            return ENCODER(*prepared, input)
        except RuntimeError:  # what does not fit
            return None
