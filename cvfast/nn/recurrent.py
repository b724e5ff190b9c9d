"""Recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from cvfast import functional


class _Layer(torch.nn.RNNBase):
    """What LSTM, GRU and RNN share."""

    def _run(self, function, input: Tensor | PackedSequence, hx, lengths, **options):
        self._update_flat_weights()
        data = input.data if isinstance(input, PackedSequence) else input
        weight = self._flat_weights[0]
        if data.dtype != weight.dtype and not torch.is_autocast_enabled(data.device.type):
            raise ValueError(
                f"RNN input dtype ({data.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({data.dtype})"
            )
        return function(
            input, hx, self._flat_weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            self.batch_first, lengths=lengths, **options,
        )  # fmt: skip


class LSTM(_Layer, torch.nn.LSTM):
    """torch.nn.LSTM on cvfast's kernels: the same arguments, parameters, state_dict and repr.

    `forward` also takes `lengths` [B] of padded input; see cvfast.functional.lstm. torch.compile(fullgraph=True)
    refuses all subclasses of torch's recurrent layers unless torch._dynamo.config.allow_rnn is True; the functions
    need no such permission.
    """

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        output, h_n, c_n = self._run(functional.lstm, input, hx, lengths)
        return output, (h_n, c_n)


class GRU(_Layer, torch.nn.GRU):
    """torch.nn.GRU on cvfast's kernels: the same arguments, parameters, state_dict and repr; see LSTM."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        return self._run(functional.gru, input, hx, lengths)


class RNN(_Layer, torch.nn.RNN):
    """torch.nn.RNN on cvfast's kernels: the same arguments, parameters, state_dict and repr; see LSTM."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        return self._run(functional.rnn, input, hx, lengths, nonlinearity=self.nonlinearity)


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell on cvfast's kernels; see cvfast.functional.lstm_cell."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return functional.lstm_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell on cvfast's kernels; see cvfast.functional.gru_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return functional.gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell on cvfast's kernels; see cvfast.functional.rnn_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return functional.rnn_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, nonlinearity=self.nonlinearity
        )
