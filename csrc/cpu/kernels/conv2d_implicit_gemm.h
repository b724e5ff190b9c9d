// The algorithm that is always able: a matrix product over cache-sized blocks whose patches are gathered on the way.
// Padding takes part as zeros, as in torch: a NaN or infinite weight gives NaN where it meets padding.
#pragma once
#include "../scratch.h"
#include "conv2d_problem.h"
#include "gemm.h"
#include "parallel.h"

namespace cvfast {
namespace {

template <class T>
T* scratch(ScratchUse use, int64_t count) {
  return static_cast<T*>(thread_scratch(use, count * static_cast<int64_t>(sizeof(T))));
}

// The size of equal blocks, multiples of `multiple` and at most `most`, that cut `total`.
inline int64_t even_block(int64_t total, int64_t most, int64_t multiple) {
  const int64_t blocks = max<int64_t>(1, ceil_div(total, most));
  return max(multiple, round_up(ceil_div(total, blocks), multiple));
}

// Scratch of a worker, in elements: one block of A, of B and of C.
template <class T>
constexpr int64_t a_elements = block_rows * block_depth;
template <class T>
constexpr int64_t b_elements = block_cols<T> * block_depth;
template <class T>
constexpr int64_t c_elements = block_rows * block_cols<T>;

template <class T>
struct WorkerBlocks {
  T *a, *b, *c;
  WorkerBlocks() {
    a = scratch<T>(ScratchUse::worker, a_elements<T> + b_elements<T> + c_elements<T>);
    b = a + a_elements<T>;
    c = b + b_elements<T>;
  }
};

// How a Correlation is laid over the matrix product and cut into pieces of work. Pixels are the rows and output channels
// the columns where the result's channels are neighbours in memory, else the other way round; an element's bits are the
// same. The cut depends on the number of threads, an element's bits don't.
struct CorrelationPlan {
  bool channels_are_cols;
  int64_t pixel_block, channel_block;
  int64_t pixel_blocks, channel_blocks;  // of the largest phase
  int64_t packed_channels;               // out_channels, rounded up to whole panels where they are the columns
};

template <class S>
CorrelationPlan plan(const Correlation<S>& c, int64_t threads) {
  using T = Compute<S>;
  CorrelationPlan p;
  // With fewer channels than half a tile is wide, most of a tile of channels would be computed in vain.
  p.channels_are_cols = c.result_stride[1] == 1 && 2 * c.out_channels > tile_cols<T>;
  const int64_t pixel_multiple = p.channels_are_cols ? tile_rows : tile_cols<T>;
  const int64_t channel_multiple = p.channels_are_cols ? tile_cols<T> : tile_rows;
  const int64_t pixels = make_phase(c, 0, 0).pixels(c.batch);
  p.packed_channels = p.channels_are_cols ? round_up(c.out_channels, tile_cols<T>) : c.out_channels;
  p.channel_block = even_block(c.out_channels, p.channels_are_cols ? block_cols<T> : block_rows, channel_multiple);
  p.channel_blocks = ceil_div(c.out_channels, p.channel_block);
  const int64_t others = max<int64_t>(1, c.groups * c.phases_y() * c.phases_x() * p.channel_blocks);
  const int64_t wanted = ceil_div(4 * threads, others);  // pieces per thread: 4, so that they can even out
  const int64_t most = min(p.channels_are_cols ? block_rows : block_cols<T>,
                           round_up(ceil_div(max<int64_t>(1, pixels), wanted), 2 * pixel_multiple));
  p.pixel_block = even_block(pixels, most, pixel_multiple);
  p.pixel_blocks = ceil_div(pixels, p.pixel_block);
  return p;
}

// The packed weights of one phase and group: for each block of depth, output channels as columns in panels
// [panel][depth][tile_cols], or as rows [row][depth].
template <class S>
Compute<S>* packed_weights(Compute<S>* packed, const Correlation<S>& c, const CorrelationPlan& p, const Phase<S>& phase,
                           int64_t group) {
  const int64_t taps = phase.taps_before * c.groups + group * phase.patches.y.taps * phase.patches.x.taps;
  return packed + taps * c.in_channels * p.packed_channels;
}

// Packs the weights of output channels [channel, channel + tile_cols) of one group and phase.
template <class S>
void pack_weights(const Correlation<S>& c, const CorrelationPlan& p, const Phase<S>& phase, int64_t group, int64_t channel,
                 Compute<S>* packed) {
  using T = Compute<S>;
  constexpr int64_t width = tile_cols<T>;
  const Patches<S>& patches = phase.patches;
  const int64_t depth = patches.columns(), channels = min(c.out_channels - channel, width);
  for (int64_t start = 0; start < depth; start += block_depth) {
    const int64_t block = min(depth - start, block_depth);
    T* block_data = packed + start * p.packed_channels + channel * block;
    Matrix<T> to = p.channels_are_cols ? Matrix<T>{block_data, 1, width} : Matrix<T>{block_data, block, 1};
    if (p.channels_are_cols && channels < width)
      zero_matrix(Matrix<T>{block_data + channels, width, 1}, block, width - channels);
    for (int64_t column = start; column < start + block;) {
      const int64_t tap = column / c.in_channels, in = column % c.in_channels;
      const int64_t run = min(c.in_channels - in, start + block - column);
      const int64_t r = patches.y.first_tap + tap / patches.x.taps * patches.y.tap_step;
      const int64_t s = patches.x.first_tap + tap % patches.x.taps * patches.x.tap_step;
      const S* source = c.weight + group * c.weight_group_stride + channel * c.weight_out_stride +
                        in * c.weight_in_stride + r * c.weight_y_stride + s * c.weight_x_stride;
      copy_matrix(Matrix<const S>{source, c.weight_out_stride, c.weight_in_stride}, to, channels, run);
      to.data += run * to.col_stride;
      column += run;
    }
  }
}

// to[i, j] += bias[j] for i < pixels, j < channels, which are the rows or columns of a block.
template <class S, class T>
void add_bias(const S* bias, Matrix<T> to, int64_t pixels, int64_t channels) {
  T value[max(block_rows, block_cols<T>)];
  copy_contiguous(bias, value, channels);
  if (to.col_stride == 1) {
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t j = 0; j < channels; ++j) to.data[i * to.row_stride + j] += value[j];
  } else {
    for (int64_t j = 0; j < channels; ++j)
      for (int64_t i = 0; i < pixels; ++i) to.data[i + j * to.col_stride] += value[j];
  }
}

// Computes pixels [pixel, pixel + pixels) of the output channels [channel, channel + channels) of one group.
template <class S>
void correlate_block(const Correlation<S>& c, const CorrelationPlan& p, const Phase<S>& phase, int64_t group,
                     int64_t pixel, int64_t pixels, int64_t channel, int64_t channels, const Compute<S>* packed,
                     const WorkerBlocks<Compute<S>>& blocks) {
  using T = Compute<S>;
  Patches<S> patches = phase.patches;
  patches.data += group * c.in_channels * patches.channel_stride;
  const int64_t depth = patches.columns();
  const int64_t rows = p.channels_are_cols ? pixels : channels, cols = p.channels_are_cols ? channels : pixels;
  const int64_t c_stride = round_up(cols, tile_cols<T>);
  if (depth == 0) zero_matrix(Matrix<T>{blocks.c, c_stride, 1}, rows, cols);
  for (int64_t start = 0; start < depth; start += block_depth) {
    const int64_t block = min(depth - start, block_depth);
    const T* weights = packed + start * p.packed_channels + channel * block;
    if (p.channels_are_cols) {
      gather_patches(patches, pixel, pixels, start, block, Matrix<T>{blocks.a, block, 1});
      block_product(rows, cols, block, Matrix<const T>{blocks.a, block, 1},
                    Panels<T>{weights, block * tile_cols<T>, tile_cols<T>}, blocks.c, c_stride, start > 0);
    } else {
      gather_patches(patches, pixel, pixels, start, block, Matrix<T>{blocks.b, 1, block_cols<T>});
      zero_matrix(Matrix<T>{blocks.b + cols, block_cols<T>, 1}, block, c_stride - cols);
      block_product(rows, cols, block, Matrix<const T>{weights, block, 1},
                    Panels<T>{blocks.b, tile_cols<T>, block_cols<T>}, blocks.c, c_stride, start > 0);
    }
  }
  const Matrix<T> result = p.channels_are_cols ? Matrix<T>{blocks.c, c_stride, 1} : Matrix<T>{blocks.c, 1, c_stride};
  if (c.bias) add_bias(c.bias + group * c.out_channels + channel, result, pixels, channels);
  const int64_t first_channel = group * c.out_channels + channel;
  for_each_line(patches.y, patches.x, pixel, pixels, [&](int64_t n, int64_t y, int64_t x, int64_t count, int64_t index) {
    S* to = phase.result + n * phase.result_batch_stride + y * phase.result_y_stride + x * phase.result_x_stride +
            first_channel * phase.result_channel_stride;
    copy_matrix(Matrix<const T>{result.data + index * result.row_stride, result.row_stride, result.col_stride},
                Matrix<S>{to, phase.result_x_stride, phase.result_channel_stride}, count, channels);
  });
}

template <class S, class Problem>
void correlate_by_gemm(const Problem& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  const Correlation<S> c = correlation<S>(problem);
  if (c.batch == 0 || c.groups * c.out_channels == 0 || make_phase(c, 0, 0).pixels(c.batch) == 0) return;
  const CorrelationPlan p = plan(c, pool.threads);
  const int64_t phases_x = c.phases_x(), phases = c.phases_y() * phases_x;
  T* packed = scratch<T>(ScratchUse::caller, c.shape.kernel_height * c.shape.kernel_width * c.groups * c.in_channels *
                                                 p.packed_channels);

  const int64_t panels = ceil_div(c.out_channels, tile_cols<T>);
  parallel_for(pool, phases * c.groups * panels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % panels, group = i / panels % c.groups, index = i / panels / c.groups;
      const Phase<S> phase = make_phase(c, index / phases_x, index % phases_x);
      pack_weights(c, p, phase, group, panel * tile_cols<T>, packed_weights(packed, c, p, phase, group));
    }
  });

  const int64_t phase_pieces = p.pixel_blocks * c.groups * p.channel_blocks;
  parallel_for(pool, phases * phase_pieces, [&](int64_t begin, int64_t end) {
    const WorkerBlocks<T> blocks;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % p.channel_blocks * p.channel_block;
      const int64_t group = i / p.channel_blocks % c.groups;
      const int64_t pixel = i / (p.channel_blocks * c.groups) % p.pixel_blocks * p.pixel_block;
      const int64_t index = i / phase_pieces;
      const Phase<S> phase = make_phase(c, index / phases_x, index % phases_x);
      const int64_t pixels = min(phase.pixels(c.batch) - pixel, p.pixel_block);
      if (pixels > 0)
        correlate_block(c, p, phase, group, pixel, pixels, channel, min(c.out_channels - channel, p.channel_block),
                        packed_weights(packed, c, p, phase, group), blocks);
    }
  });
}

// The gradient to the weights: rows (tap y, tap x, input channel), columns output channels, depth the pixels of the
// output over the whole batch.
template <class S>
struct WeightGrad {
  Patches<S> input, grad_output;  // of group 0; grad_output as patches with one tap
  int64_t groups, rows, cols, pixels;
  S* result;
  int64_t result_stride[4];
};

template <class S>
WeightGrad<S> weight_grad(const Conv2dWeightGrad& p) {
  const Conv2dShape& s = p.shape;
  const int64_t *i = p.input.stride, *g = p.grad_output.stride, *w = p.grad_weight.stride;
  WeightGrad<S> result;
  result.input = {static_cast<const S*>(p.input.data), i[0], i[1], i[2], i[3], s.in_channels / s.groups,
                  forward_axis(s.in_height, s.out_height, s.kernel_height, s.stride_h, s.padding_h, s.dilation_h),
                  forward_axis(s.in_width, s.out_width, s.kernel_width, s.stride_w, s.padding_w, s.dilation_w)};
  result.grad_output = {static_cast<const S*>(p.grad_output.data), g[0], g[1], g[2], g[3], s.out_channels / s.groups,
                        forward_axis(s.out_height, s.out_height, 1, 1, 0, 1),
                        forward_axis(s.out_width, s.out_width, 1, 1, 0, 1)};
  result.groups = s.groups;
  result.rows = result.input.columns();
  result.cols = s.out_channels / s.groups;
  result.pixels = s.batch * s.out_height * s.out_width;
  result.result = static_cast<S*>(p.grad_weight.data);
  for (int d = 0; d < 4; ++d) result.result_stride[d] = w[d];
  return result;
}

// Sums pixels [pixel, end) of the rows and columns given into blocks.c [rows, c_stride]: chains over block_depth pixels,
// added in order.
template <class S>
void weight_grad_block(const WeightGrad<S>& w, int64_t group, int64_t row, int64_t rows, int64_t col, int64_t cols,
                       int64_t pixel, int64_t end, const WorkerBlocks<Compute<S>>& blocks, int64_t c_stride) {
  using T = Compute<S>;
  Patches<S> input = w.input, grad_output = w.grad_output;
  input.data += group * input.channels * input.channel_stride;
  grad_output.data += (group * w.cols + col) * grad_output.channel_stride;
  // A in the order in which the image's elements lie in memory: [pixel][row] or [row][pixel].
  const Matrix<T> a = input.channel_stride == 1 ? Matrix<T>{blocks.a, block_rows, 1} : Matrix<T>{blocks.a, 1, block_depth};
  zero_matrix(Matrix<T>{blocks.c, c_stride, 1}, rows, cols);
  zero_matrix(Matrix<T>{blocks.b + cols, block_cols<T>, 1}, block_depth, c_stride - cols);
  for (int64_t start = pixel; start < end; start += block_depth) {
    const int64_t depth = min(end - start, block_depth);
    gather_patches(input, start, depth, row, rows, a);
    gather_patches(grad_output, start, depth, 0, cols, Matrix<T>{blocks.b, block_cols<T>, 1});
    block_product(rows, cols, depth, Matrix<const T>{a.data, a.col_stride, a.row_stride},
                  Panels<T>{blocks.b, tile_cols<T>, block_cols<T>}, blocks.c, c_stride, true);
  }
}

// Stores rows [row, row + rows) and columns [col, col + cols) of one group into the weights' layout.
template <class S>
void store_weight_grad(const WeightGrad<S>& w, int64_t group, int64_t row, int64_t rows, int64_t col, int64_t cols,
                       Matrix<const Compute<S>> from) {
  const int64_t channels = w.input.channels;
  for (int64_t i = row; i < row + rows;) {
    const int64_t tap = i / channels, channel = i % channels;
    const int64_t run = min(channels - channel, row + rows - i);
    S* to = w.result + (group * w.cols + col) * w.result_stride[0] + channel * w.result_stride[1] +
            tap / w.input.x.taps * w.result_stride[2] + tap % w.input.x.taps * w.result_stride[3];
    copy_matrix(from, Matrix<S>{to, w.result_stride[1], w.result_stride[0]}, run, cols);
    from.data += run * from.row_stride;
    i += run;
  }
}

// The pixels are cut into slices, so that a small kernel over many pixels gives work to all threads. Their number depends
// on the shape alone; they are summed in order; their memory is bounded (2^20 elements).
template <class S>
struct Slices {
  int64_t count, pixels;         // pixels of each but the last
  int64_t elements;              // of the gradient
  Compute<S>* partial = nullptr;  // [slice, group, row, col]; nullptr if there is just one slice

  explicit Slices(const WeightGrad<S>& w) : elements(w.groups * w.rows * w.cols) {
    const int64_t most = min<int64_t>(16, (int64_t{1} << 20) / elements);
    count = max<int64_t>(1, min(most, w.pixels / (8 * block_depth)));
    pixels = round_up(ceil_div(w.pixels, count), block_depth);
    if (count > 1) partial = scratch<Compute<S>>(ScratchUse::caller, count * elements);
  }
};

// Takes the sum over one slice for rows [row, row + rows) and columns [col, col + cols) of one group.
template <class S>
void store_slice(const WeightGrad<S>& w, const Slices<S>& slices, int64_t slice, int64_t group, int64_t row, int64_t rows,
                 int64_t col, int64_t cols, Matrix<const Compute<S>> sum) {
  if (!slices.partial) return store_weight_grad(w, group, row, rows, col, cols, sum);
  Compute<S>* to = slices.partial + slice * slices.elements + (group * w.rows + row) * w.cols + col;
  copy_matrix(sum, Matrix<Compute<S>>{to, w.cols, 1}, rows, cols);
}

template <class S>
void sum_slices(const WeightGrad<S>& w, const Slices<S>& slices, const ThreadPool& pool) {
  if (!slices.partial) return;
  const int64_t row_blocks = ceil_div(w.rows, block_rows);
  parallel_for(pool, w.groups * row_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / row_blocks, row = i % row_blocks * block_rows, rows = min(w.rows - row, block_rows);
      Compute<S>* sum = slices.partial + (group * w.rows + row) * w.cols;
      for (int64_t slice = 1; slice < slices.count; ++slice)
        for (int64_t j = 0; j < rows * w.cols; ++j) sum[j] += sum[slice * slices.elements + j];
      store_weight_grad(w, group, row, rows, 0, w.cols, Matrix<const Compute<S>>{sum, w.cols, 1});
    }
  });
}

template <class S>
void weight_grad_by_gemm(const Conv2dWeightGrad& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  const WeightGrad<S> w = weight_grad<S>(problem);
  if (w.groups * w.rows * w.cols == 0) return;
  const Slices<S> slices(w);
  const int64_t row_block = even_block(w.rows, block_rows, tile_rows);
  const int64_t col_block = even_block(w.cols, block_cols<T>, tile_cols<T>);
  const int64_t row_blocks = ceil_div(w.rows, row_block), col_blocks = ceil_div(w.cols, col_block);
  parallel_for(pool, slices.count * w.groups * row_blocks * col_blocks, [&](int64_t begin, int64_t end) {
    const WorkerBlocks<T> blocks;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % row_blocks * row_block, rows = min(w.rows - row, row_block);
      const int64_t col = i / row_blocks % col_blocks * col_block, cols = min(w.cols - col, col_block);
      const int64_t group = i / (row_blocks * col_blocks) % w.groups;
      const int64_t slice = i / (row_blocks * col_blocks * w.groups);
      const int64_t pixel = slice * slices.pixels, c_stride = round_up(cols, tile_cols<T>);
      weight_grad_block(w, group, row, rows, col, cols, pixel, min(pixel + slices.pixels, w.pixels), blocks, c_stride);
      store_slice(w, slices, slice, group, row, rows, col, cols, Matrix<const T>{blocks.c, c_stride, 1});
    }
  });
  sum_slices(w, slices, pool);
}

}  // namespace
}  // namespace cvfast
