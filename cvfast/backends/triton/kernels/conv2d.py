"""The three products of a 2-D convolution as implicit matrix products.

Each kernel computes `output[row, column] = sum over k of a[row, k] * b[k, column]` for every group and gathers its
operands straight from the 4-D tensors: rows, columns and the summed index are flattened positions that `unflatten`
takes apart, and whatever lies outside a tensor is masked. One program owns one tile of the output and adds up in one
fixed order, without atomics, so that results are the same bits from run to run. Each CHUNK of a sum is added up on its
own before it joins the total, so that the rounding error grows with the number of chunks.

Arguments of every kernel, sizes in elements: `shape` is a `cvfast.backends.triton.conv2d.Geometry`, `*_stride` are the
four strides of a tensor, `rows` and `reduction` the extents of the matrix product, WIDE asks for 64-bit offsets.
"""

import triton
import triton.language as tl


@triton.jit
def conv2d(
    input, weight, bias, output, shape, input_stride, weight_stride, output_stride, rows, reduction,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """output [N, K, P, Q]: row = (n, p, q), column = output channel of the group, k = (c, r, s)."""
    group, row, column = tile(shape.groups, shape.out_channels, WIDE, BLOCK_M, BLOCK_N)
    n, p, q = unflatten(row, shape.out_height, shape.out_width)
    out_channel = group * shape.out_channels + column
    y0 = p * shape.stride_h - shape.padding_h
    x0 = q * shape.stride_w - shape.padding_w

    total = tl.zeros((BLOCK_M, BLOCK_N), output.dtype.element_ty)
    for chunk in range(0, reduction, CHUNK):
        part = tl.zeros((BLOCK_M, BLOCK_N), output.dtype.element_ty)
        for start in range(chunk, min(chunk + CHUNK, reduction), BLOCK_K):
            k = offset(tl.arange(0, BLOCK_K), WIDE) + start
            c, r, s = unflatten(k, shape.kernel_height, shape.kernel_width)
            y = y0[:, None] + r[None, :] * shape.dilation_h
            x = x0[:, None] + s[None, :] * shape.dilation_w
            a = load(
                input, input_stride, n[:, None], (group * shape.in_channels + c)[None, :], y, x,
                (row < rows)[:, None] & (k < reduction)[None, :] & within(y, shape.height) & within(x, shape.width),
            )  # fmt: skip
            b = load(
                weight, weight_stride, out_channel[None, :], c[:, None], r[:, None], s[:, None],
                (k < reduction)[:, None] & (column < shape.out_channels)[None, :],
            )  # fmt: skip
            part = multiply_add(a, b, part)
        total += part

    if bias is not None:
        total += tl.load(bias + out_channel, mask=column < shape.out_channels, other=0.0)[None, :]
    store(
        output, output_stride, n[:, None], out_channel[None, :], p[:, None], q[:, None], total,
        (row < rows)[:, None] & (column < shape.out_channels)[None, :],
    )  # fmt: skip


@triton.jit
def conv2d_input_grad(
    grad_output, weight, bias, grad_input, shape, grad_output_stride, weight_stride, grad_input_stride, rows, reduction,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_input [N, C, H, W]: row = (n, y, x), column = input channel of the group, k = (output channel, r, s).

    With a bias [C] added it is the transposed convolution of grad_output.
    Tap (r, s) carried input (y, x) to output ((y + padding - r * dilation) / stride, ...) if that is a whole number.
    """
    group, row, column = tile(shape.groups, shape.in_channels, WIDE, BLOCK_M, BLOCK_N)
    n, y, x = unflatten(row, shape.height, shape.width)
    in_channel = group * shape.in_channels + column

    total = tl.zeros((BLOCK_M, BLOCK_N), grad_input.dtype.element_ty)
    for chunk in range(0, reduction, CHUNK):
        part = tl.zeros((BLOCK_M, BLOCK_N), grad_input.dtype.element_ty)
        for start in range(chunk, min(chunk + CHUNK, reduction), BLOCK_K):
            k = offset(tl.arange(0, BLOCK_K), WIDE) + start
            c, r, s = unflatten(k, shape.kernel_height, shape.kernel_width)
            out_channel = group * shape.out_channels + c
            reach_y = (y + shape.padding_h)[:, None] - r[None, :] * shape.dilation_h
            reach_x = (x + shape.padding_w)[:, None] - s[None, :] * shape.dilation_w
            p = reach_y // shape.stride_h
            q = reach_x // shape.stride_w
            hit_y = (reach_y >= 0) & (p * shape.stride_h == reach_y) & (p < shape.out_height)
            hit_x = (reach_x >= 0) & (q * shape.stride_w == reach_x) & (q < shape.out_width)
            a = load(
                grad_output, grad_output_stride, n[:, None], out_channel[None, :], p, q,
                (row < rows)[:, None] & (k < reduction)[None, :] & hit_y & hit_x,
            )  # fmt: skip
            b = load(
                weight, weight_stride, out_channel[:, None], column[None, :], r[:, None], s[:, None],
                (k < reduction)[:, None] & (column < shape.in_channels)[None, :],
            )  # fmt: skip
            part = multiply_add(a, b, part)
        total += part

    if bias is not None:
        total += tl.load(bias + in_channel, mask=column < shape.in_channels, other=0.0)[None, :]
    store(
        grad_input, grad_input_stride, n[:, None], in_channel[None, :], y[:, None], x[:, None], total,
        (row < rows)[:, None] & (column < shape.in_channels)[None, :],
    )  # fmt: skip


@triton.jit
def conv2d_weight_grad(
    grad_output, input, grad_weight, shape, grad_output_stride, input_stride, grad_weight_stride, rows, reduction,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_weight [K, C/G, R, S]: row = (c, r, s), column = output channel of the group, k = (n, p, q)."""
    group, row, column = tile(shape.groups, shape.out_channels, WIDE, BLOCK_M, BLOCK_N)
    c, r, s = unflatten(row, shape.kernel_height, shape.kernel_width)
    in_channel = group * shape.in_channels + c
    out_channel = group * shape.out_channels + column
    y0 = r * shape.dilation_h - shape.padding_h
    x0 = s * shape.dilation_w - shape.padding_w

    total = tl.zeros((BLOCK_M, BLOCK_N), grad_weight.dtype.element_ty)
    for chunk in range(0, reduction, CHUNK):
        part = tl.zeros((BLOCK_M, BLOCK_N), grad_weight.dtype.element_ty)
        for start in range(chunk, min(chunk + CHUNK, reduction), BLOCK_K):
            k = offset(tl.arange(0, BLOCK_K), WIDE) + start
            n, p, q = unflatten(k, shape.out_height, shape.out_width)
            y = y0[:, None] + (p * shape.stride_h)[None, :]
            x = x0[:, None] + (q * shape.stride_w)[None, :]
            a = load(
                input, input_stride, n[None, :], in_channel[:, None], y, x,
                (row < rows)[:, None] & (k < reduction)[None, :] & within(y, shape.height) & within(x, shape.width),
            )  # fmt: skip
            b = load(
                grad_output, grad_output_stride, n[:, None], out_channel[None, :], p[:, None], q[:, None],
                (k < reduction)[:, None] & (column < shape.out_channels)[None, :],
            )  # fmt: skip
            part = multiply_add(a, b, part)
        total += part

    store(
        grad_weight, grad_weight_stride, out_channel[None, :], c[:, None], r[:, None], s[:, None], total,
        (row < rows)[:, None] & (column < shape.out_channels)[None, :],
    )  # fmt: skip


@triton.jit
def tile(groups, columns, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's group, its BLOCK_M rows and its BLOCK_N columns; `columns` is their number in a group.

    Columns change fastest from program to program, then groups, so that neighbours read the same pixels.
    """
    program = offset(tl.program_id(0), WIDE)
    row_tile, group, column_tile = unflatten(program, groups, tl.cdiv(columns, BLOCK_N))
    return group, row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def unflatten(index, middle, last):
    """(i, j, l) with index = (i * middle + j) * last + l."""
    return index // last // middle, index // last % middle, index % last


@triton.jit
def offset(index, WIDE: tl.constexpr):
    """`index` in 64 bits if WIDE, so that all positions and offsets computed from it are too."""
    return index.to(tl.int64) if WIDE else index


@triton.jit
def within(index, size):
    return (index >= 0) & (index < size)


@triton.jit
def load(tensor, stride, i0, i1, i2, i3, mask):
    """tensor[i0, i1, i2, i3] where `mask` holds, 0 elsewhere."""
    return tl.load(tensor + i0 * stride[0] + i1 * stride[1] + i2 * stride[2] + i3 * stride[3], mask=mask, other=0.0)


@triton.jit
def store(tensor, stride, i0, i1, i2, i3, value, mask):
    """tensor[i0, i1, i2, i3] = value where `mask` holds."""
    tl.store(tensor + i0 * stride[0] + i1 * stride[1] + i2 * stride[2] + i3 * stride[3], value, mask=mask)


@triton.jit
def multiply_add(a, b, total):
    """a @ b + total in the operands' own precision; Triton's default would round float32 to TF32."""
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)
