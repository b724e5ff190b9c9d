"""self_attention: the projections of a layer and its attention by one kernel call, where there is one."""

from __future__ import annotations

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
