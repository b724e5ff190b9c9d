"""A transformer's encoder layer by one operator of the compiled libraries for each half, without derivatives.

encoder_attention: input + attention(layer_norm(input)); encoder_mlp: input +
linear_2(activation(linear_1(layer_norm(input)))), where `how` is conv2d_how's number with the activation. Float32.
self_attention: attention alone, with its projections.

input [N, L, E] (encoder_mlp: [*, E]), in_weight [3 E, E] and in_bias [3 E] of query, key and value, out_weight [E, E],
out_bias [E], weight_1 [H, E], weight_2 [E, H] -> the input's sizes. packed_*: the weights as conv2d_pack gave them.
"""

from __future__ import annotations

from cvfast.ops.card import kernel

SELF_ATTENTION = kernel(
    "self_attention(Tensor input, Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, int heads, "
    "Tensor? packed_in, Tensor? packed_out) -> Tensor"
)
ENCODER_ATTENTION = kernel(
    "encoder_attention(Tensor input, Tensor norm_weight, Tensor norm_bias, float epsilon, Tensor in_weight, "
    "Tensor? in_bias, Tensor out_weight, Tensor? out_bias, int heads, Tensor? packed_in, Tensor? packed_out) -> Tensor"
)
ENCODER_MLP = kernel(
    "encoder_mlp(Tensor input, Tensor norm_weight, Tensor norm_bias, float epsilon, Tensor weight_1, Tensor? bias_1, "
    "int how, Tensor weight_2, Tensor? bias_2, Tensor? packed_1, Tensor? packed_2) -> Tensor"
)
