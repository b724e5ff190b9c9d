"""The mathematics of every operator, readable, in any dtype: the oracle that every backend is measured against.

Imported by tests, benchmarks and cvfast.testing only.
"""

from cvfast.reference.additive_attention import additive_attention
from cvfast.reference.attention import scaled_dot_product_attention
from cvfast.reference.conv2d import conv2d
from cvfast.reference.conv_transpose2d import conv_transpose2d
from cvfast.reference.linear import linear
from cvfast.reference.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

__all__ = [
    "additive_attention",
    "conv2d",
    "conv_transpose2d",
    "gru",
    "gru_cell",
    "linear",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]
