"""self_attention: attention with its projections as one operator of the compiled libraries, without derivatives.

input [N, L, E], in_weight [3 E, E] and in_bias [3 E] of query, key and value, out_weight [E, E], out_bias [E] ->
[N, L, E]. packed_in, packed_out: the weights as conv2d_pack gave them.
"""

from __future__ import annotations

from cvfast.ops.card import kernel

SELF_ATTENTION = kernel(
    "self_attention(Tensor input, Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, int heads, "
    "Tensor? packed_in, Tensor? packed_out) -> Tensor"
)
