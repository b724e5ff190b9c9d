"""Layers of a transformer's encoder by one operator of the compiled libraries, without derivatives.

encoder: halves of layers, one after the other: input + attention(layer_norm(input)) with so many `heads`, or (0 heads)
input + linear_2(activation(linear_1(layer_norm(input)))), where `hows` are conv2d_how's numbers with the activation.
Operands of each: weight and bias of the norm, then of the projection to query, key and value and of that of the output,
or of the linear layers. Behind the halves there may be weight and bias of one more norm, and one more of the epsilons.
input [N, L, E] -> [N, L, E]; [*, E] where there is no attention; [N, 1, E], the results of the first position, where
`narrow` is the number of a half of attention, behind which nobody needs the others. Float32. encoder_prepare makes what
`encoder` runs; it is opaque and holds the operands.

self_attention: input [N, L, E], in_weight [3 E, E] and in_bias [3 E] of query, key and value, out_weight [E, E],
out_bias [E] -> [N, L, E].

packed*: the weights (two of each half) as conv2d_pack gave them.
"""

from __future__ import annotations

from cvfast.ops.card import kernel

SELF_ATTENTION = kernel(
    "self_attention(Tensor input, Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, int heads, "
    "Tensor? packed_in, Tensor? packed_out) -> Tensor"
)
PREPARE_ENCODER = kernel(
    "encoder_prepare(Tensor?[] operands, Tensor?[] packed, float[] epsilons, int[] heads, int[] hows, int narrow=-1) "
    "-> Tensor"
)
ENCODER = kernel("encoder(Tensor prepared, Tensor input) -> Tensor")
