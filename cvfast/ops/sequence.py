"""Convolutions and pooling in a row by one operator of the compiled libraries, without derivatives.

sequence_prepare makes what `sequence` runs on inputs [N, C, H, W] of any sizes that fit; it is opaque and holds the
tensors. Values are the inputs and then the results, of which the last one is given. `steps`: six numbers for each: the
value that it reads, its residual (-1: none), which of STEP_KINDS it is, conv2d_how's number, 1 where nobody else can
change the weight, so that it is not compared with what was packed of it, and 1 where the result is channels_last.
packed: the weights as conv2d_pack gave them. Pooling has an empty weight.

conv2d: with its epilogue, as conv2d_epilogue. max_pooling: of square windows, whose length is the dilation;
max_pooling_ceil: of those that stick out of the image, too. averaged_linear: a linear layer of the average of an
image's pixels, [N, O]; it is the last step. linear: of contiguous images, flattened, or of the rows of another one. All
but conv2d are for float32.
"""

from __future__ import annotations

from cvfast.ops.card import kernel

STEP_KINDS = ("conv2d", "max_pooling", "max_pooling_ceil", "averaged_linear", "linear")

PREPARE_SEQUENCE = kernel(
    "sequence_prepare(Tensor[] weights, Tensor?[] biases, Tensor?[] packed, int[] steps, float[] negative_slopes, "
    "int inputs) -> Tensor"
)
SEQUENCE = kernel("sequence(Tensor prepared, Tensor[] inputs) -> Tensor")


def pooled_size(size: int, window: int, stride: int, padding: int, ceil: bool) -> int:
    """Length of one spatial dimension of the output of torch.nn.MaxPool2d."""
    whole, rest = divmod(size + 2 * padding - window, stride)
    return whole + 1 + (ceil and rest > 0 and (whole + 1) * stride < size + padding)
