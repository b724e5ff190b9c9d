"""What tests and benchmarks share: an OpSpec per operator and the assertions made of it. Not for library code.

A newcomer's spec enters SPECS here; the tests in tests/ops then run it over every backend, instruction set, dtype and
memory format by themselves.
"""

from cvfast.testing.accuracy import assert_as_accurate, relative_error
from cvfast.testing.additive_attention import AdditiveAttentionSpec
from cvfast.testing.attention import AttentionSpec
from cvfast.testing.conv2d import Conv2dSpec
from cvfast.testing.conv_transpose2d import ConvTranspose2dSpec
from cvfast.testing.extended import widened
from cvfast.testing.linear import LinearSpec
from cvfast.testing.recurrent import RecurrentCellSpec, RecurrentSpec
from cvfast.testing.spec import Case, ErrorCase, OpSpec, Sample

_RECURRENT = (
    *map(RecurrentSpec, ("lstm", "gru", "rnn")),
    *map(RecurrentCellSpec, ("lstm_cell", "gru_cell", "rnn_cell")),
)
_ATTENTION = (AttentionSpec(), AdditiveAttentionSpec())
_PRODUCTS = (Conv2dSpec(), ConvTranspose2dSpec(), LinearSpec())
SPECS: dict[str, OpSpec] = {spec.name: spec for spec in (*_PRODUCTS, *_RECURRENT, *_ATTENTION)}

__all__ = ["SPECS", "Case", "ErrorCase", "OpSpec", "Sample", "assert_as_accurate", "relative_error", "widened"]
