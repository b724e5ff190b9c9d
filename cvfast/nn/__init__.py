"""Drop-in layers: subclasses of torch.nn's, with the same parameters, state_dict, repr and isinstance."""

from cvfast.nn.attention import AdditiveAttention, AttentionLSTMCell, MultiheadAttention
from cvfast.nn.conv import Conv2d, ConvTranspose2d
from cvfast.nn.linear import Linear
from cvfast.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionLSTMCell",
    "Conv2d",
    "ConvTranspose2d",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "RNNCell",
]
