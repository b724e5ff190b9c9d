"""Recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from cvfast import functional
from cvfast.nn.leaf import is_recorded, node


def _weights(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor | None]:
    """Attributes that are mostly parameters, in a third of the time; a parametrized weight is not among those."""
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_lstm_cell, _gru_cell = functional.prepared_cell("lstm"), functional.prepared_cell("gru")
_rnn_cells = {nonlinearity: functional.prepared_cell(f"rnn_{nonlinearity}") for nonlinearity in ("tanh", "relu")}
_lstm, _gru = functional.prepared_layers("lstm"), functional.prepared_layers("gru")
_rnns = {nonlinearity: functional.prepared_layers(f"rnn_{nonlinearity}") for nonlinearity in ("tanh", "relu")}


class _Layer(torch.nn.RNNBase):
    """What LSTM, GRU and RNN share."""

    def _run(self, function, input: Tensor | PackedSequence, hx, lengths, **options):
        weights = _weights(self, self._flat_weights_names)
        data = input.data if isinstance(input, PackedSequence) else input
        weight = weights[0]
        if data.dtype != weight.dtype and not torch.is_autocast_enabled(data.device.type):
            raise ValueError(
                f"RNN input dtype ({data.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({data.dtype})"
            )
        return function(
            input, hx, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            self.batch_first, lengths=lengths, **options,
        )  # fmt: skip

    def _run_prepared(self, layers: Callable, input, hx, lstm: bool = False) -> tuple | None:
        """Results of one of `functional.prepared_layers`; None where somebody has to ask."""
        if torch.is_grad_enabled() or is_compiling() or type(input) is not Tensor or input.dim() != 3:
            return None
        if self.batch_first or self.proj_size or (self.dropout and self.training):
            return None
        directions = 2 if self.bidirectional else 1
        if hx is None:
            h_0 = input.new_zeros(directions * self.num_layers, input.size(1), self.hidden_size)
            hx = (h_0, h_0) if lstm else h_0
        if lstm and len(hx) != 2:
            return None
        h_0, c_0 = hx if lstm else (hx, None)
        weights = _weights(self, self._flat_weights_names)
        return layers(input, h_0, c_0, weights, self.bias, directions)


class _Varied(_Layer):
    """What LSTM and GRU can do beside torch's definition; without it there are no more parameters than torch's."""

    layer_norm = False
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    _norms: tuple[str, ...] = ()  # per layer and direction, in the order of functional's layer_norm
    _norm_names: tuple[str, ...] = ()

    def __init__(self, *args, layer_norm: bool = False, recurrent_dropout: float = 0.0, zoneout=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.layer_norm, self.recurrent_dropout, self.zoneout = layer_norm, recurrent_dropout, zoneout
        if layer_norm:
            ends = [n.removeprefix("weight_hh") for n in self._flat_weights_names if n.startswith("weight_hh")]
            self._norm_names = tuple(name + end for end in ends for name in self._norms)
            for name in self._norm_names:
                size = self.hidden_size if name.startswith("norm_c") else self.weight_hh_l0.shape[0]
                self.register_parameter(name, torch.nn.Parameter(self.weight_hh_l0.new_empty(size)))
            self._reset_norms()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_norms()

    def _reset_norms(self) -> None:
        for name in self._norm_names:
            torch.nn.init.constant_(getattr(self, name), 0.0 if "bias" in name else 1.0)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name, off in (("layer_norm", False), ("recurrent_dropout", 0.0), ("zoneout", 0.0)):
            if getattr(self, name) != off:
                text += f", {name}={getattr(self, name)}"
        return text

    def _varies(self) -> bool:
        return bool(self.layer_norm or self.recurrent_dropout or self.zoneout)

    def _variation(self) -> dict:
        if not self._varies():
            return {}
        norms = [getattr(self, name) for name in self._norm_names] if self.layer_norm else None
        return {"layer_norm": norms, "recurrent_dropout": self.recurrent_dropout, "zoneout": self.zoneout}


class LSTM(_Varied, torch.nn.LSTM):
    """torch.nn.LSTM on cvfast's kernels: the same arguments, parameters, state_dict and repr.

    Besides, off by default and then free: layer_norm (bool; adds parameters norm_ih, norm_hh [4 H], norm_c, norm_c_bias
    [H] per layer and direction), recurrent_dropout (float, in training), zoneout (float, or (of h, of c)); see
    cvfast.functional.lstm.
    `forward` also takes `lengths` [B] of padded input; see cvfast.functional.lstm. torch.compile(fullgraph=True)
    refuses all subclasses of torch's recurrent layers unless torch._dynamo.config.allow_rnn is True; the functions
    need no such permission.
    """

    _norms = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        if lengths is None and not self._varies():
            results = self._run_prepared(_lstm, input, hx, lstm=True)
            if results is not None:
                output, h_n, c_n = results
                return output, (h_n, c_n)
        if is_recorded(self, input):
            return node(self, input, hx, lengths=lengths)
        output, h_n, c_n = self._run(functional.lstm, input, hx, lengths, **self._variation())
        return output, (h_n, c_n)


class GRU(_Varied, torch.nn.GRU):
    """torch.nn.GRU on cvfast's kernels: the same arguments, parameters, state_dict and repr; see LSTM."""

    _norms = ("norm_ih", "norm_hh")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if lengths is None and not self._varies():
            results = self._run_prepared(_gru, input, hx)
            if results is not None:
                return results[:2]
        if is_recorded(self, input):
            return node(self, input, hx, lengths=lengths)
        return self._run(functional.gru, input, hx, lengths, **self._variation())


class RNN(_Layer, torch.nn.RNN):
    """torch.nn.RNN on cvfast's kernels: the same arguments, parameters, state_dict and repr; see LSTM."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        layers = _rnns.get(self.nonlinearity) if lengths is None else None
        if layers is not None and (results := self._run_prepared(layers, input, hx)) is not None:
            return results[:2]
        if is_recorded(self, input):
            return node(self, input, hx, lengths=lengths)
        return self._run(functional.rnn, input, hx, lengths, nonlinearity=self.nonlinearity)


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell on cvfast's kernels; see cvfast.functional.lstm_cell."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if not is_compiling() and (state := _lstm_cell(self._parameters, input, hx)) is not None:
            return state
        if is_recorded(self, input):
            return node(self, input, hx)
        return functional.lstm_cell(input, hx, *_weights(self, _CELL_WEIGHTS))


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell on cvfast's kernels; see cvfast.functional.gru_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if not is_compiling() and (state := _gru_cell(self._parameters, input, hx)) is not None:
            return state
        if is_recorded(self, input):
            return node(self, input, hx)
        return functional.gru_cell(input, hx, *_weights(self, _CELL_WEIGHTS))


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell on cvfast's kernels; see cvfast.functional.rnn_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        cell = None if is_compiling() else _rnn_cells.get(self.nonlinearity)
        if cell is not None and (state := cell(self._parameters, input, hx)) is not None:
            return state
        if is_recorded(self, input):
            return node(self, input, hx)
        return functional.rnn_cell(input, hx, *_weights(self, _CELL_WEIGHTS), nonlinearity=self.nonlinearity)
