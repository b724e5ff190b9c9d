"""Self-attention with its projections, and layers of an encoder, by one kernel call where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from cvfast import backend as _backend


def self_attention(
    input: Tensor, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, heads: int
) -> Tensor | None:
    """linear(scaled_dot_product_attention(...)) of the `heads` parts of linear(input), which are query, key and value.

    Without derivatives, where the kernels are the fastest backend of all parts; None where these have to be called.

    Args:
        input: [N, L, E]; in_weight: [3 E, E]; in_bias: [3 E] or None; out_weight: [E, E]; out_bias: [E] or None.
        heads: divides E.

    Returns:
        [N, L, E]
    """
    if not (_backend.is_free() and _backend.is_certain("ext")):
        return None
    return _ext.self_attention(input, in_weight, in_bias, out_weight, out_bias, heads)


class Half(NamedTuple):
    """Half of a transformer's encoder layer: input + linear(f(linear(layer_norm(input)))).

    norm, first, second: weight and bias of each; biases but the norm's may be None. epsilon: the norm's. heads: f is
    the attention of so many of them; or 0: f is `activation`.
    """

    norm: tuple[Tensor, Tensor]
    epsilon: float
    first: tuple[Tensor, Tensor | None]
    second: tuple[Tensor, Tensor | None]
    heads: int = 0
    activation: str = "none"


def prepared_encoder(
    halves: Sequence[Half], norm: tuple[Tensor, Tensor, float] | None, input: Tensor, narrow: int = -1
) -> Callable[[Tensor], Tensor | None] | None:
    """The halves one after the other for many inputs [N, L, E] of this one's size; None where they have to be called.

    norm: weight, bias and epsilon of a layer norm behind them, or None.
    narrow: the number of a half of attention behind which only the first position is computed, so that the result is
    [N, 1, E]; -1: none.
    The call gives None, too, where that is so of it, and raises LookupError once it has to be prepared anew.
    """
    try:
        call = _ext.PreparedEncoder(halves, norm, input, narrow)
    except RuntimeError:
        return None
    return lambda input: call(input) if _backend.is_free() and _backend.is_certain("ext") else None


_ext = _backend.BACKENDS["attention"]["ext"]
