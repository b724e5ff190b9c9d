"""Self-attention with its projections, and half of an encoder layer, by one kernel call where there is one."""

from __future__ import annotations

from collections.abc import Callable

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


_ext = _backend.BACKENDS["attention"]["ext"]


def prepared_encoder_attention(
    norm: tuple[Tensor, Tensor, float],
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
) -> Callable[[Tensor], Tensor | None] | None:
    """input + self_attention(layer_norm(input), ...) for many inputs [N, L, E]; as prepared_linear, None for the parts.

    norm: weight [E], bias [E] and epsilon; the others as self_attention's.
    """
    return _where_free(_ext.prepare_encoder_attention(norm, in_weight, in_bias, out_weight, out_bias, heads))


def prepared_encoder_mlp(
    norm: tuple[Tensor, Tensor, float],
    activation: str,
    weight_1: Tensor,
    bias_1: Tensor | None,
    weight_2: Tensor,
    bias_2: Tensor | None,
) -> Callable[[Tensor], Tensor | None] | None:
    """input + linear_2(activation(linear_1(layer_norm(input)))) for many inputs [*, E], in the same way."""
    return _where_free(_ext.prepare_encoder_mlp(norm, activation, weight_1, bias_1, weight_2, bias_2))


def _where_free(call: Callable[[Tensor], Tensor | None] | None) -> Callable[[Tensor], Tensor | None] | None:
    """`call` while nobody named another backend."""
    if call is None:
        return None
    return lambda input: call(input) if _backend.is_free() and _backend.is_certain("ext") else None
