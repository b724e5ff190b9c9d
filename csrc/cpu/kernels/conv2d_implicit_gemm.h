// The algorithm that is always able: a matrix product over cache-sized blocks whose patches are gathered on the way.
// Padding takes part as zeros, as in torch: a NaN or infinite weight gives NaN where it meets padding.
#pragma once
#include "../scratch.h"
#include "conv2d_epilogue.h"
#include "conv2d_packed.h"
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

// Columns of a block: as many as channels often are. Gathered columns have rows of 17 tiles: an odd number of cache
// lines spreads a panel over all sets of the L1 cache.
template <class T>
constexpr int64_t conv_cols = 16 * tile_cols<T>;
template <class T>
constexpr int64_t gathered_stride = 17 * tile_cols<T>;
template <class T>
Panels<T> gathered_panels(const T* data, int64_t cols) {
  const int64_t width = even_block(cols, panel_cols<T>, lanes<T>);
  return {data, width, width, gathered_stride<T>};
}

// Scratch of a worker, in elements: one block of A, one of B and `c_elements` of C.
template <class T>
constexpr int64_t a_elements = block_rows * block_depth;
template <class T>
constexpr int64_t b_elements = gathered_stride<T> * block_depth;

template <class T>
struct WorkerBlocks {
  T *a, *b, *c;
  explicit WorkerBlocks(int64_t c_elements) {
    a = scratch<T>(ScratchUse::worker, a_elements<T> + b_elements<T> + c_elements);
    b = a + a_elements<T>;
    c = b + b_elements<T>;
  }
};

// Channels of a piece of work at most: those that share the gathered patches.
constexpr int64_t most_channels = 1024;
// Below (in the gradient to the input, 4 times as many), channels are the columns: their weights are packed faster.
constexpr int64_t few_pixels = 256;
// Pixels along an edge, in all samples, that are worth a cell of their own.
constexpr int64_t edge_pixels = 48;
// Rows of a block of pixels that is read in place: it stays in L2, and weights, which pass by, are read once for all of them.
constexpr int64_t most_rows_in_place = 204;
// Patches of few pixels are gathered as a whole up to this many elements.
constexpr int64_t most_gathered = int64_t{1} << 20;

// How many taps of an axis lie inside the source, summed over the positions.
inline int64_t taps_inside(const Axis& axis) {
  int64_t inside = 0;
  for (int64_t tap = 0; tap < axis.taps; ++tap) inside += axis.inside(tap).end - axis.inside(tap).begin;
  return inside;
}

// How an axis is cut into cells, whose positions are computed together. Taps that meet only padding for a whole cell can be
// passed over.
struct Cells {
  int64_t count, length;  // equal cells; or 3 with length 0: the positions before `begin`, up to `end` and after it
  int64_t begin, end, positions;

  Range at(int64_t cell) const {
    if (length > 0) return {cell * length, min((cell + 1) * length, positions)};
    return {cell == 0 ? 0 : cell == 1 ? begin : end, cell == 0 ? begin : cell == 1 ? end : positions};
  }
  int64_t largest() const { return length > 0 ? length : max(end - begin, max(begin, positions - end)); }
};

// One cell; but few neighbours where most taps meet padding (a kernel about as long as the image or longer).
inline Cells equal_cells(const Axis& axis, int64_t inside) {
  const int64_t n = axis.positions;
  const int64_t length = 5 * inside >= 3 * axis.taps * n ? max<int64_t>(1, n) : max<int64_t>(1, inside / n / 4);
  return {ceil_div(n, length), length, 0, n, n};
}

// The positions with taps in the padding apart, at both ends, where those taps are more than 4 % of all.
inline Cells cut_edges(const Cells& cells, const Axis& axis, int64_t inside) {
  const int64_t reach = (axis.taps - 1) * axis.tap_offset, lowest = axis.offset + min<int64_t>(0, reach);
  const int64_t highest = axis.offset + max<int64_t>(0, reach);
  const int64_t begin = lowest >= 0 ? 0 : ceil_div(-lowest, axis.step);
  const int64_t end = highest >= axis.inputs ? 0 : min(axis.positions, ceil_div(axis.inputs - highest, axis.step));
  const bool much = 25 * inside < 24 * axis.taps * axis.positions;
  return cells.count == 1 && much && begin < end ? Cells{3, 0, begin, end, axis.positions} : cells;
}

// How a Correlation is laid over the matrix product and cut into pieces of work. Either pixels are the rows and output
// channels the columns, or the other way round; an element's bits are the same. The cut depends on the number of threads,
// an element's bits don't.
struct CorrelationPlan {
  bool channels_are_cols;
  bool weights_used_once;                    // each piece packs its own, and the patches are gathered as a whole
  bool skip_padding;                         // it pays to look for taps that meet only padding
  Cells y, x;                                // positions of a phase computed together
  bool samples_apart;                        // a block of pixels lies in one sample, else they follow each other
  int64_t pixel_block, pixel_blocks;         // of the largest cell, in a sample or in all
  int64_t channel_block;                     // of a product
  int64_t channel_range, channel_ranges;     // of a piece
  int64_t panel_channels;                    // of a panel of weights
  int64_t packed_channels;                   // out_channels, rounded up to whole panels where they are the columns
};

// Threads share the pixels of `units` equal parts of the problem first; what is missing to four pieces for each thread is cut
// from the channels, at last from the pixels again.
template <class T>
void cut_into_pieces(CorrelationPlan& p, int64_t pixels, int64_t most_pixels, int64_t channels, int64_t units, int64_t threads) {
  const int64_t channel_multiple = p.channels_are_cols ? p.panel_channels : tile_rows;
  const int64_t pixel_multiple = p.channels_are_cols ? tile_rows : panel_cols<T>;
  const int64_t wanted = threads == 1 ? 1 : ceil_div(4 * threads, units);
  p.pixel_block = even_block(pixels, most_pixels, pixel_multiple);
  const int64_t ranges = ceil_div(wanted, ceil_div(pixels, p.pixel_block));
  const int64_t most = min(most_channels, round_up(ceil_div(channels, ranges), 4 * channel_multiple));
  p.channel_range = even_block(channels, most, channel_multiple);
  p.channel_ranges = ceil_div(channels, p.channel_range);
  p.channel_block = even_block(p.channel_range, p.channels_are_cols ? conv_cols<T> : block_rows, channel_multiple);
  const int64_t least = round_up(ceil_div(pixels, ceil_div(wanted, p.channel_ranges)), 2 * pixel_multiple);
  p.pixel_block = even_block(pixels, min(p.pixel_block, least), pixel_multiple);
  p.pixel_blocks = ceil_div(pixels, p.pixel_block);
}

// Whether the patches are rows of the image itself, of a 1x1 kernel on neighbouring channels.
template <class S>
bool patches_in_place(const Correlation<S>& c, const Phase<S>& phase) {
  return __is_same(S, Compute<S>) && phase.patches.channel_stride == 1 &&
         evenly_spaced(phase.patches, 0, phase.pixels(c.batch)).data;
}

// weights_kept: the weights are packed already.
template <class S>
CorrelationPlan plan(const Correlation<S>& c, int64_t threads, bool weights_kept = false) {
  using T = Compute<S>;
  CorrelationPlan p;
  const Phase<S> phase = make_phase(c, 0, 0);
  const Axis &y = phase.patches.y, &x = phase.patches.x;
  const int64_t inside_y = taps_inside(y), inside_x = taps_inside(x);
  p.y = equal_cells(y, inside_y), p.x = equal_cells(x, inside_x);
  // With fewer channels than half a vector, most of a tile of channels would be computed in vain.
  p.channels_are_cols = (c.result_stride[1] == 1 ||
                         c.batch * p.y.largest() * p.x.largest() < (c.input_grad ? 4 : 1) * few_pixels) &&
                        2 * c.out_channels > lanes<T>;
  if (c.batch * x.positions >= edge_pixels) p.y = cut_edges(p.y, y, inside_y);
  // Where pixels are neighbours, few of them would be slow to gather.
  if (c.batch * y.positions >= edge_pixels && p.channels_are_cols && c.source_stride[1] == 1)
    p.x = cut_edges(p.x, x, inside_x);
  const int64_t cells = p.y.count * p.x.count, sample_pixels = p.y.largest() * p.x.largest();
  p.skip_padding = cells > 1 || 5 * inside_y < 4 * y.taps * y.positions || 5 * inside_x < 4 * x.taps * x.positions;
  p.panel_channels = even_block(c.out_channels, panel_cols<T>, lanes<T>);
  p.packed_channels = p.channels_are_cols ? round_up(c.out_channels, p.panel_channels) : c.out_channels;
  // Then products can add up the results in place.
  p.samples_apart = !p.channels_are_cols && sample_pixels % lanes<T> == 0;
  const int64_t pixels = p.samples_apart ? sample_pixels : c.batch * sample_pixels;
  const int64_t units = c.groups * c.phases_y() * c.phases_x() * cells * (p.samples_apart ? c.batch : 1);
  const int64_t kernel_depth = c.shape.kernel_height * c.shape.kernel_width * c.groups * c.in_channels;
  p.weights_used_once = p.channels_are_cols && cells == 1 && pixels <= block_rows &&
                        kernel_depth * max<int64_t>(pixels, panel_cols<T>) <= most_gathered &&
                        !(weights_kept && patches_in_place(c, phase));
  if (p.weights_used_once) {
    p.pixel_block = pixels;
  } else {
    const int64_t most_rows = patches_in_place(c, phase) ? most_rows_in_place : block_rows;
    const int64_t most_pixels = p.channels_are_cols ? most_rows : conv_cols<T>;
    cut_into_pieces<T>(p, pixels, most_pixels, c.out_channels, units, threads);
  }
  return p;
}

// Packed weights of one phase and group: for each block of depth, output channels as columns in panels
// [panel][depth][channel], or as rows [row][depth].
template <class T>
struct PackedWeights {
  T* data;
  int64_t depth, channels;  // channels: rounded up to whole panels where they are columns
  int64_t panel;            // its channels
  bool channels_are_cols;

  int64_t block(int64_t start) const { return min(depth - start, block_depth); }
  // Output channels from `channel` on, within the block of depth from `start` on.
  T* at(int64_t start, int64_t channel) const { return data + start * channels + channel * block(start); }
  // Channels as columns from `channel` on, within the block of depth from `start` on, but for its first `skipped` rows.
  Panels<T> panels(int64_t start, int64_t channel, int64_t skipped = 0) const {
    return {at(start, channel) + skipped * panel, panel, panel * block(start), panel};
  }
  // Row `k` of the panel of columns that begins with `channel`.
  T* row(int64_t k, int64_t channel) const {
    const int64_t start = k / block_depth * block_depth;
    return at(start, channel) + (k - start) * panel;
  }
};

template <class S>
PackedWeights<Compute<S>> packed_weights(Compute<S>* packed, const Correlation<S>& c, const CorrelationPlan& p,
                                         const Phase<S>& phase, int64_t group) {
  const int64_t taps = phase.taps_before * c.groups + group * phase.patches.y.taps * phase.patches.x.taps;
  return {packed + taps * c.in_channels * p.packed_channels, phase.patches.columns(), p.packed_channels, p.panel_channels,
          p.channels_are_cols};
}

// Kept panels; they are read only.
template <class T>
T* kept_panels(const PackedHeader* kept) { return static_cast<T*>(const_cast<void*>(kept->data())); }

// A panel of `outs` >= lanes output channels whose weights lie in memory as [out][channel, tap]. `weight` is the panel's.
template <class S>
void pack_planes(const S* weight, int64_t out_stride, int64_t outs, int64_t channels, int64_t taps, int64_t place,
                 const PackedWeights<Compute<S>>& to) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const int64_t count = channels * taps;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t first = min(i, count - L);  // the last ones overlap
    int64_t channel = first / taps, tap = first % taps;
    T* row[L];
    for (int k = 0; k < L; ++k) {
      row[k] = to.row(tap * channels + channel, place);
      if (++tap == taps) tap = 0, ++channel;
    }
    for (int64_t j = 0; j < outs; j += L) {
      const int64_t out = min(j, outs - L);
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) square[k] = load_vector(weight + (out + k) * out_stride + first);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) store_vector(square[k], row[k] + out);
    }
  }
}

// The same where they lie as [channel][out][tap], as the gradient to the input sees them: whole cache lines of taps are loaded,
// of which the phase takes its own. `taps`: of the kernel, kernel_width of them in a row.
template <class S>
void pack_phase_of_planes(const S* weight, int64_t in_stride, int64_t outs, int64_t kernel_width, int64_t taps,
                          const Patches<S>& patches, int64_t place, const PackedWeights<Compute<S>>& to) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>, ahead = 6;  // channels, each of which is another page of memory
  const Axis &y = patches.y, &x = patches.x;
  const auto place_of = [&](int64_t tap) {
    return (y.first_tap + tap / x.taps * y.tap_step) * kernel_width + x.first_tap + tap % x.taps * x.tap_step;
  };
  for (int64_t channel = 0; channel < patches.channels; ++channel, weight += in_stride)
    for (int64_t j = 0; j < outs; j += L) {
      const int64_t out = min(j, outs - L);  // the last ones overlap
      for (int64_t first = 0; first < taps; first += L) {
        Vector<T> square[L];
#pragma GCC unroll 16
        for (int k = 0; k < L; ++k) {
          const S* from = weight + (out + k) * taps + first;
          square[k] = load_first(from, min(taps - first, L));
          __builtin_prefetch(from + ahead * in_stride);
        }
        transpose_square<T>(square);
        for (int64_t tap = 0; tap < y.taps * x.taps; ++tap) {
          const int64_t lane = place_of(tap) - first;
          if (lane >= 0 && lane < L) store_vector(square[lane], to.row(tap * patches.channels + channel, place) + out);
        }
      }
    }
}

// Packs the weights of the panel of output channels from `channel` on of one group and phase, at channel `place` of `to`.
template <class S>
void pack_weights(const Correlation<S>& c, const Phase<S>& phase, int64_t group, int64_t channel, int64_t place,
                  const PackedWeights<Compute<S>>& to) {
  using T = Compute<S>;
  const Patches<S>& patches = phase.patches;
  const int64_t width = to.panel, depth = to.depth, channels = min(c.out_channels - channel, width);
  const int64_t taps = patches.y.taps * patches.x.taps;
  const S* weight = c.weight + group * c.weight_group_stride + channel * c.weight_out_stride;
  if (to.channels_are_cols && channels < width)
    for (int64_t start = 0; start < depth; start += block_depth)
      zero_matrix(Matrix<T>{to.at(start, place) + channels, width, 1}, to.block(start), width - channels);
  const bool planes = !c.input_grad && taps > 1 && c.weight_x_stride == 1 && c.weight_y_stride == patches.x.taps &&
                      c.weight_in_stride == taps;
  if (to.channels_are_cols && planes && channels >= lanes<T> && depth >= lanes<T>)
    return pack_planes(weight, c.weight_out_stride, channels, c.in_channels, taps, place, to);
  const int64_t kernel_taps = c.shape.kernel_height * c.shape.kernel_width;
  const bool inner_planes = c.input_grad && kernel_taps > 1 && c.weight_x_stride == 1 &&
                            c.weight_y_stride == c.shape.kernel_width && c.weight_out_stride == kernel_taps;
  if (to.channels_are_cols && inner_planes && channels >= lanes<T>)
    return pack_phase_of_planes(weight, c.weight_in_stride, channels, c.shape.kernel_width, kernel_taps, patches, place, to);
  for (int64_t start = 0; start < depth; start += block_depth) {
    const int64_t block = to.block(start);
    T* block_data = to.at(start, place);
    Matrix<T> at = to.channels_are_cols ? Matrix<T>{block_data, 1, width} : Matrix<T>{block_data, block, 1};
    for (int64_t column = start; column < start + block;) {
      const int64_t tap = column / c.in_channels, in = column % c.in_channels;
      const int64_t run = min(c.in_channels - in, start + block - column);
      const int64_t r = patches.y.first_tap + tap / patches.x.taps * patches.y.tap_step;
      const int64_t s = patches.x.first_tap + tap % patches.x.taps * patches.x.tap_step;
      const S* source = weight + in * c.weight_in_stride + r * c.weight_y_stride + s * c.weight_x_stride;
      copy_block(Matrix<const S>{source, c.weight_out_stride, c.weight_in_stride}, at, channels, run);
      at.data += run * at.col_stride;
      column += run;
    }
  }
}

// Whether all of the packed output channels' weights, whole panels from `channel` on, are finite.
template <class T>
bool all_finite(const PackedWeights<T>& w, int64_t channel, int64_t channels) {
  Vector<T> nan = {};
  for (int64_t start = 0; start < w.depth; start += block_depth) {
    const T* weights = w.at(start, channel);
    const int64_t count = channels * w.block(start);
    for (int64_t i = 0; i < count; i += lanes<T>) {
      const Vector<T> x = load_first(weights + i, count - i);
      nan += x - x;
    }
  }
  for (int i = 0; i < lanes<T>; ++i)
    if (nan[i] != 0) return false;
  return true;
}

// to[i, j] += bias[j] for i < pixels, j < channels, which are the rows or columns of a block.
template <class S, class T>
void add_bias(const S* bias, Matrix<T> to, int64_t pixels, int64_t channels) {
  constexpr int64_t L = lanes<T>;
  T value[max(block_rows, conv_cols<T>)];
  copy_contiguous(bias, value, channels);
  const auto add = [](T* at, int64_t count, Vector<T> x) { store_first(load_first(at, count) + x, at, count); };
  if (to.col_stride == 1) {
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t j = 0; j < channels; j += L)
        add(to.data + i * to.row_stride + j, channels - j, load_first(value + j, channels - j));
  } else {
    for (int64_t j = 0; j < channels; ++j)
      for (int64_t i = 0; i < pixels; i += L) add(to.data + i + j * to.col_stride, pixels - i, Vector<T>{} + value[j]);
  }
}

// Pixels [pixel, pixel + pixels) of the output channels [channel, channel + channels) of one group.
template <class S>
struct CorrelationPiece {
  Phase<S> phase;
  int64_t group, pixel, pixels, channel, channels;
};

// The piece's results [pixel, channel] where products can add them up in place: in the compute type, whole vectors. Else its
// data is nullptr.
template <class S>
Matrix<Compute<S>> results_in_place(const Correlation<S>& c, const CorrelationPlan& p, const CorrelationPiece<S>& piece) {
  using T = Compute<S>;
  if constexpr (__is_same(S, T)) {
    const Phase<S>& phase = piece.phase;
    const int64_t positions_x = phase.patches.x.positions, positions_y = phase.patches.y.positions;
    const int64_t step = phase.result_x_stride, line = piece.pixel / positions_x;
    const int64_t last_line = (piece.pixel + piece.pixels - 1) / positions_x;
    const bool lines_follow = positions_y == 1 || phase.result_y_stride == positions_x * step;
    const bool samples_follow = lines_follow && phase.result_batch_stride == positions_y * positions_x * step;
    const bool one_sample = line / positions_y == last_line / positions_y;
    const bool whole_vectors = p.channels_are_cols ? phase.result_channel_stride == 1 && piece.channels % lanes<T> == 0
                                                   : step == 1 && piece.pixels % lanes<T> == 0;
    if (whole_vectors && (line == last_line || (one_sample ? lines_follow : samples_follow)))
      return {phase.result + (piece.group * c.out_channels + piece.channel) * phase.result_channel_stride +
                  line / positions_y * phase.result_batch_stride + line % positions_y * phase.result_y_stride +
                  piece.pixel % positions_x * step,
              step, phase.result_channel_stride};
  }
  return {};
}

// What a product with channels as columns does to its results before it stores them: all that is left. The bias of `channels`
// output channels from `channel` of all on is copied into `bias`, up to a whole vector. `residual`: what is added, or nullptr.
template <class S, class T>
Finish<T> finish_of(const Correlation<S>& c, int64_t channel, int64_t channels, T* bias, const T* residual) {
  if (c.bias) {
    zero_matrix(Matrix<T>{bias + channels, 0, 1}, 1, round_up(channels, lanes<T>) - channels);
    copy_contiguous(c.bias + channel, bias, channels);
  }
  const ActivationOf<T> activation(c.epilogue);
  return {c.bias ? bias : nullptr, residual, activation.bounds.some(), activation.bounds, activation.run, activation.slope};
}

// Stores the results of output channels [channel, channel + channels), if they are not in place. Before that adds the bias and
// then applies the epilogue, if the products didn't.
template <class S>
void finish_results(const Correlation<S>& c, const CorrelationPiece<S>& piece, int64_t channel, int64_t channels,
                    Matrix<Compute<S>> result, bool in_place, bool finished) {
  using T = Compute<S>;
  const Phase<S>& phase = piece.phase;
  const int64_t first_channel = piece.group * c.out_channels + channel;
  if (in_place && finished) return;
  if (c.bias && !finished) add_bias(c.bias + first_channel, result, piece.pixels, channels);
  for_each_line(phase.patches.y, phase.patches.x, piece.pixel, piece.pixels,
                [&](int64_t n, int64_t y, int64_t x, int64_t count, int64_t index) {
    S* to = phase.result + n * phase.result_batch_stride + y * phase.result_y_stride + x * phase.result_x_stride +
            first_channel * phase.result_channel_stride;
    T* from = result.data + index * result.row_stride;
    const Block<S> block = {to, phase.result_channel_stride, 0, phase.result_x_stride};
    const bool first = !in_place && !finished && finish_in_scratch(c, block, channels);
    if (first)
      apply_epilogue(c.epilogue, Block<T>{from, result.col_stride, 0, result.row_stride}, residual_of(c, block), channels, 1,
                     count);
    if (!in_place)
      copy_block(Matrix<const T>{from, result.row_stride, result.col_stride},
                 Matrix<S>{to, phase.result_x_stride, phase.result_channel_stride}, count, channels);
    if (!first && !finished) finish_with_epilogue(c, block, channels, 1, count);
  });
}

// The patches of a piece for the columns given, as an operand [pixel, column] of the product: gathered into a block, or in
// place if they are the rows of a 1x1 kernel with neighbouring channels.
template <class S>
Matrix<const Compute<S>> piece_patches(const Correlation<S>& c, const CorrelationPlan& p, const CorrelationPiece<S>& piece,
                                       Range columns, const WorkerBlocks<Compute<S>>& blocks) {
  using T = Compute<S>;
  Patches<S> patches = piece.phase.patches;
  patches.data += piece.group * c.in_channels * patches.channel_stride;
  const int64_t depth = columns.end - columns.begin;
  if constexpr (__is_same(S, T)) {
    if (p.channels_are_cols && patches.channel_stride == 1) {
      const Matrix<const T> rows = evenly_spaced(patches, piece.pixel, piece.pixels);
      if (rows.data) return {rows.data + columns.begin, rows.row_stride, 1};
    }
  }
  const Matrix<T> to = p.channels_are_cols ? Matrix<T>{blocks.a, depth, 1} : Matrix<T>{blocks.b, 1, gathered_stride<T>};
  gather_patches(patches, piece.pixel, piece.pixels, columns.begin, depth, to);
  if (!p.channels_are_cols)
    zero_matrix(Matrix<T>{to.data + piece.pixels, gathered_stride<T>, 1}, depth,
                round_up(piece.pixels, lanes<T>) - piece.pixels);
  return {to.data, to.row_stride, to.col_stride};
}

// `skip_padding`: taps that meet only padding may be passed over. `far`: the weights may not be in the second-level cache.
template <class S>
void correlate_piece(const Correlation<S>& c, const CorrelationPlan& p, const CorrelationPiece<S>& piece,
                     const PackedWeights<Compute<S>>& weights, bool far, bool skip_padding,
                     const WorkerBlocks<Compute<S>>& blocks) {
  using T = Compute<S>;
  const Matrix<T> in_place = results_in_place(c, p, piece);
  const int64_t scratch_stride = round_up(p.channels_are_cols ? piece.channels : piece.pixels, tile_cols<T>);
  const Matrix<T> block = p.channels_are_cols ? Matrix<T>{blocks.c, scratch_stride, 1} : Matrix<T>{blocks.c, 1, scratch_stride};
  const Matrix<T> result = in_place.data ? in_place : block;
  const T* residual = nullptr;
  if constexpr (__is_same(S, T))
    if (c.residual && in_place.data) residual = c.residual + (in_place.data - c.result);
  // Whether products finish their results.
  const bool finished = p.channels_are_cols && !skip_padding && weights.depth > 0 && (residual || !c.residual);
  T bias[conv_cols<T>];
  bool add = false;
  for (int64_t start = 0; start < weights.depth; start += block_depth) {
    const int64_t whole = weights.block(start);
    Range columns = {start, start + whole};
    if (skip_padding) columns = columns_inside(piece.phase.patches, piece.pixel, piece.pixels, start, start + whole);
    const int64_t depth = columns.end - columns.begin, skipped = columns.begin - start;
    if (depth == 0) continue;
    const Matrix<const T> patches = piece_patches(c, p, piece, columns, blocks);
    for (int64_t first = 0; first < piece.channels; first += p.channel_block) {
      const int64_t channels = min(piece.channels - first, p.channel_block);
      const T* operand = weights.at(start, piece.channel + first);
      Panels<T> panels = weights.panels(start, piece.channel + first, skipped);
      panels.far = far;
      T* to = result.data + first * result.col_stride;
      Finish<T> finish;
      if (finished && start + whole == weights.depth)
        finish = finish_of(c, piece.group * c.out_channels + piece.channel + first, channels, bias,
                           residual ? residual + first : nullptr);
      if (p.channels_are_cols)
        block_product(piece.pixels, channels, depth, patches, panels, to, result.row_stride, add, finish);
      else
        block_product(channels, piece.pixels, depth, Matrix<const T>{operand + skipped, whole, 1},
                      gathered_panels(patches.data, piece.pixels), to, result.col_stride, add);
    }
    add = true;
  }
  for (int64_t first = 0; first < piece.channels; first += p.channel_block) {
    const int64_t channels = min(piece.channels - first, p.channel_block);
    const Matrix<T> part = {result.data + first * result.col_stride, result.row_stride, result.col_stride};
    if (!add) zero_matrix(part, piece.pixels, channels);
    finish_results(c, piece, piece.channel + first, channels, part, in_place.data != nullptr, finished);
  }
}

// Each weight meets one block of pixels: the patches are gathered as a whole, a piece of work packs a panel of weights, if
// they aren't kept, and uses it at once.
template <class S>
void correlate_few_pixels(const Correlation<S>& c, const CorrelationPlan& p, const PackedHeader* kept, const ThreadPool& pool) {
  using T = Compute<S>;
  const int64_t phases_x = c.phases_x(), phases = c.phases_y() * phases_x;
  const int64_t kernel_depth = c.shape.kernel_height * c.shape.kernel_width * c.in_channels;
  const int64_t depth_blocks = max<int64_t>(1, ceil_div(kernel_depth, block_depth));
  const int64_t width = p.panel_channels, panels = ceil_div(c.out_channels, width);
  T* gathered = scratch<T>(ScratchUse::caller, kernel_depth * c.groups * p.pixel_block);
  // [depth block][pixel][depth]
  const auto patches_of = [&](const Phase<S>& phase, int64_t group) {
    return gathered + (phase.taps_before * c.groups * c.in_channels + group * phase.patches.columns()) * p.pixel_block;
  };
  parallel_for(pool, phases * c.groups * depth_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % depth_blocks * block_depth, group = i / depth_blocks % c.groups;
      const int64_t index = i / (depth_blocks * c.groups);
      const Phase<S> phase = make_phase(c, index / phases_x, index % phases_x);
      const int64_t pixels = phase.pixels(c.batch), block = min(phase.patches.columns() - start, block_depth);
      if (pixels == 0 || block <= 0) continue;
      Patches<S> patches = phase.patches;
      patches.data += group * c.in_channels * patches.channel_stride;
      gather_patches(patches, 0, pixels, start, block, Matrix<T>{patches_of(phase, group) + start * pixels, block, 1});
    }
  });
  parallel_for(pool, phases * c.groups * panels, [&](int64_t begin, int64_t end) {
    T* weights_data = scratch<T>(ScratchUse::worker, (kernel_depth + p.pixel_block) * width);
    T* result = weights_data + kernel_depth * width;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % panels * width, group = i / panels % c.groups, index = i / panels / c.groups;
      const Phase<S> phase = make_phase(c, index / phases_x, index % phases_x);
      const int64_t pixels = phase.pixels(c.batch), channels = min(c.out_channels - channel, width);
      if (pixels == 0) continue;
      const PackedWeights<T> weights =
          kept ? packed_weights(kept_panels<T>(kept), c, p, phase, group)
               : PackedWeights<T>{weights_data, phase.patches.columns(), width, width, true};
      const int64_t place = kept ? channel : 0;
      if (!kept) pack_weights(c, phase, group, channel, place, weights);
      const T* patches = patches_of(phase, group);
      if (weights.depth == 0) zero_matrix(Matrix<T>{result, width, 1}, pixels, width);
      for (int64_t start = 0; start < weights.depth; start += block_depth) {
        const int64_t block = weights.block(start);
        block_product(pixels, channels, block, Matrix<const T>{patches + start * pixels, block, 1},
                      weights.panels(start, place), result, width, start > 0);
      }
      finish_results(c, CorrelationPiece<S>{phase, group, 0, pixels, channel, channels}, channel, channels,
                     Matrix<T>{result, width, 1}, false, false);
    }
  });
}

// Packs all weights; whether they are finite, where that is asked for.
template <class S>
bool pack_all_weights(const Correlation<S>& c, const CorrelationPlan& p, bool ask, Compute<S>* packed, const ThreadPool& pool) {
  using T = Compute<S>;
  bool finite = true;
  const int64_t phases_x = c.phases_x(), phases = c.phases_y() * phases_x;
  const int64_t width = p.panel_channels, panels = ceil_div(c.out_channels, width);
  parallel_for(pool, phases * c.groups * panels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % panels * width, group = i / panels % c.groups, index = i / panels / c.groups;
      const Phase<S> phase = make_phase(c, index / phases_x, index % phases_x);
      const PackedWeights<T> weights = packed_weights(packed, c, p, phase, group);
      pack_weights(c, phase, group, channel, channel, weights);
      if (ask && !all_finite(weights, channel, min(p.packed_channels - channel, width)))
        __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    }
  });
  return finite;
}

template <class S>
int64_t packed_elements(const Correlation<S>& c, const CorrelationPlan& p) {
  return c.shape.kernel_height * c.shape.kernel_width * c.groups * c.in_channels * p.packed_channels;
}

// With more pixels the packing hardly counts (with 1576 it is 2 % of the time); and rows of weights are packed faster than
// columns.
constexpr int64_t most_pixels_to_pack = 2048;

template <class S, class Problem>
Conv2dPacking gemm_packing(const Problem& problem) {
  const Correlation<S> c = correlation<S>(problem);
  const int64_t pixels = make_phase(c, 0, 0).pixels(c.batch);
  if (pixels == 0 || pixels > most_pixels_to_pack || c.groups * c.out_channels * c.in_channels == 0) return {};
  const CorrelationPlan p = plan(c, 1);
  if (!p.channels_are_cols) return {};
  return packing(PackedForm::panels, packed_elements(c, p) * static_cast<int64_t>(sizeof(Compute<S>)));
}

template <class S, class Problem>
void gemm_pack(const Problem& problem, PackedHeader& to, const ThreadPool& pool) {
  const Correlation<S> c = correlation<S>(problem);
  to.finite = pack_all_weights(c, plan(c, 1), true, static_cast<Compute<S>*>(to.data()), pool);
}

// Whether one phase of the result has all taps, in the gradient to the input of a 1x1 kernel with a stride: what lies around
// its pixels is 0.
template <class S>
bool one_phase_has_taps(const Correlation<S>& c) {
  const Conv2dShape& s = c.shape;
  const Patches<S> patches = make_phase(c, 0, 0).patches;
  const bool joined = patches.y.positions != ceil_div(s.in_height, s.stride_h);
  return c.input_grad && !c.bias && !c.finishes() && s.kernel_height * s.kernel_width == 1 && s.stride_h * s.stride_w > 1 &&
         s.padding_h == 0 && s.padding_w == 0 && !joined;
}

// Stores these zeros around the pixels of a piece of that phase.
template <class S>
void zero_around(const Correlation<S>& c, const CorrelationPiece<S>& piece) {
  const Conv2dShape& s = c.shape;
  const int64_t* stride = c.result_stride;
  S* channel = c.result + (piece.group * c.out_channels + piece.channel) * stride[1];
  for_each_line(piece.phase.patches.y, piece.phase.patches.x, piece.pixel, piece.pixels,
                [&](int64_t n, int64_t y, int64_t x, int64_t count, int64_t) {
    const int64_t first = y * s.stride_h, pixels = min(count * s.stride_w, s.in_width - x * s.stride_w);
    S* to = channel + n * stride[0] + first * stride[2] + x * s.stride_w * stride[3];
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      if (pixel % s.stride_w) zero_matrix(Matrix<S>{to + pixel * stride[3], 0, stride[1]}, 1, piece.channels);
    for (int64_t line = 1; line < min(s.stride_h, s.in_height - first); ++line)
      zero_matrix(Matrix<S>{to + line * stride[2], stride[3], stride[1]}, pixels, piece.channels);
  });
}

template <class S, class Problem>
void correlate_by_gemm(const Problem& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  const Correlation<S> c = correlation<S>(problem);
  if (c.batch == 0 || c.groups * c.out_channels == 0 || make_phase(c, 0, 0).pixels(c.batch) == 0) return;
  const PackedHeader* kept = kept_weights(problem, PackedForm::panels);
  const CorrelationPlan p = plan(c, pool.threads, kept != nullptr);
  if (p.weights_used_once) return correlate_few_pixels(c, p, kept, pool);
  const bool around = one_phase_has_taps(c) && p.y.count * p.x.count == 1;
  const int64_t phases_x = c.phases_x(), phases = around ? 1 : c.phases_y() * phases_x;
  T* packed = kept ? kept_panels<T>(kept) : scratch<T>(ScratchUse::caller, packed_elements(c, p));
  const bool finite = kept ? kept->finite : pack_all_weights(c, p, p.skip_padding, packed, pool);
  const bool skip_padding = p.skip_padding && finite;  // else a weight may give NaN where it meets padding

  const int64_t units = p.samples_apart ? c.batch : 1, unit_batch = p.samples_apart ? 1 : c.batch;
  const int64_t cells = p.y.count * p.x.count, cell_pieces = units * p.pixel_blocks * c.groups * p.channel_ranges;
  const int64_t c_elements = round_up(p.channel_range, tile_cols<T>) * round_up(p.pixel_block, tile_cols<T>);
  parallel_for(pool, phases * cells * cell_pieces, [&](int64_t begin, int64_t end) {
    const WorkerBlocks<T> blocks(c_elements);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t range = i % p.channel_ranges, group = i / p.channel_ranges % c.groups;
      const int64_t pixel_block = i / (p.channel_ranges * c.groups) % p.pixel_blocks;
      const int64_t unit = i / (p.channel_ranges * c.groups * p.pixel_blocks) % units;
      const int64_t cell = i / cell_pieces % cells, index = i / cell_pieces / cells;
      Phase<S> phase = make_phase(c, index / phases_x, index % phases_x);
      const PackedWeights<T> weights = packed_weights(packed, c, p, phase, group);
      if (cells > 1) restrict_positions(phase, p.y.at(cell / p.x.count), p.x.at(cell % p.x.count));
      const int64_t first = pixel_block * p.pixel_block, pixel = unit * phase.pixels(1) + first;
      const int64_t pixels = min(phase.pixels(unit_batch) - first, p.pixel_block);
      const int64_t channel = range * p.channel_range, channels = min(c.out_channels - channel, p.channel_range);
      const CorrelationPiece<S> piece = {phase, group, pixel, pixels, channel, channels};
      if (pixels <= 0) continue;
      correlate_piece(c, p, piece, weights, kept != nullptr, skip_padding, blocks);
      if (around) zero_around(c, piece);
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

// The operand A [row, pixel] of the product for pixels [pixel, pixel + pixels): gathered in the order in which the image's
// elements lie in memory, or in place for a 1x1 kernel on neighbouring pixels.
template <class S>
Matrix<const Compute<S>> weight_grad_input(const Patches<S>& input, int64_t row, int64_t rows, int64_t pixel, int64_t pixels,
                                           Compute<S>* block) {
  using T = Compute<S>;
  if constexpr (__is_same(S, T)) {
    const Matrix<const T> spaced = evenly_spaced(input, pixel, pixels);
    if (spaced.data && spaced.row_stride == 1) return {spaced.data + row * spaced.col_stride, spaced.col_stride, 1};
  }
  const Matrix<T> to = input.channel_stride == 1 ? Matrix<T>{block, block_rows, 1} : Matrix<T>{block, 1, block_depth};
  gather_patches(input, pixel, pixels, row, rows, to);
  return {to.data, to.col_stride, to.row_stride};
}

// The part of the gradient that belongs to one group and to its input channels [channel, channel + channels).
template <class S>
WeightGrad<S> part_of(WeightGrad<S> w, int64_t group, int64_t channel, int64_t channels) {
  w.input.data += (group * w.input.channels + channel) * w.input.channel_stride;
  w.grad_output.data += group * w.cols * w.grad_output.channel_stride;
  w.result += group * w.cols * w.result_stride[0] + channel * w.result_stride[1];
  w.groups = 1, w.input.channels = channels, w.rows = w.input.columns();
  return w;
}

// Sums pixels [pixel, end) of all rows and the columns given, of one group, into blocks.c [rows, c_stride]: chains over
// block_depth pixels, added in order. The columns are gathered once for all rows.
template <class S>
void weight_grad_block(const WeightGrad<S>& w, int64_t row_block, int64_t col, int64_t cols, int64_t pixel, int64_t end,
                       const WorkerBlocks<Compute<S>>& blocks, int64_t c_stride) {
  using T = Compute<S>;
  Patches<S> grad_output = w.grad_output;
  grad_output.data += col * grad_output.channel_stride;
  if (pixel >= end) zero_matrix(Matrix<T>{blocks.c, c_stride, 1}, w.rows, cols);
  for (int64_t start = pixel; start < end; start += block_depth) {
    const int64_t depth = min(end - start, block_depth);
    zero_matrix(Matrix<T>{blocks.b + cols, gathered_stride<T>, 1}, depth, c_stride - cols);
    gather_patches(grad_output, start, depth, 0, cols, Matrix<T>{blocks.b, gathered_stride<T>, 1});
    for (int64_t first = 0; first < w.rows; first += row_block) {
      const int64_t count = min(w.rows - first, row_block);
      const Matrix<const T> a = weight_grad_input(w.input, first, count, start, depth, blocks.a);
      block_product(count, cols, depth, a, gathered_panels<T>(blocks.b, cols),
                    blocks.c + first * c_stride, c_stride, start > pixel);
    }
  }
}

// Stores all rows of one group and `cols` >= lanes columns where the weights lie in memory as [out][channel, tap]. `to` is
// the place of the first.
template <class S>
void store_planes(const WeightGrad<S>& w, S* to, int64_t cols, const Compute<S>* from, int64_t from_stride) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const int64_t channels = w.input.channels, taps = w.rows / channels;
  for (int64_t j = 0; j < cols; j += L) {
    const int64_t col = min(j, cols - L);  // the last ones overlap
    for (int64_t i = 0; i < w.rows; i += L) {
      const int64_t first = min(i, w.rows - L);
      int64_t channel = first / taps, tap = first % taps;
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) {
        square[k] = load_vector(from + (tap * channels + channel) * from_stride + col);
        if (++tap == taps) tap = 0, ++channel;
      }
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) store_vector(square[k], to + (col + k) * w.result_stride[0] + first);
    }
  }
}

// Stores rows [row, row + rows) and columns [col, col + cols) of one group into the weights' layout.
template <class S>
void store_weight_grad(const WeightGrad<S>& w, int64_t group, int64_t row, int64_t rows, int64_t col, int64_t cols,
                       Matrix<const Compute<S>> from) {
  constexpr int64_t L = lanes<Compute<S>>;
  const int64_t channels = w.input.channels, taps_x = w.input.x.taps, taps = w.input.y.taps * taps_x;
  const bool planes = taps > 1 && w.result_stride[1] == taps && w.result_stride[2] == taps_x && w.result_stride[3] == 1;
  if (planes && rows == w.rows && min(rows, cols) >= L && from.col_stride == 1)
    return store_planes(w, w.result + (group * w.cols + col) * w.result_stride[0], cols, from.data, from.row_stride);
  for (int64_t i = row; i < row + rows;) {
    const int64_t tap = i / channels, channel = i % channels;
    const int64_t run = min(channels - channel, row + rows - i);
    S* to = w.result + (group * w.cols + col) * w.result_stride[0] + channel * w.result_stride[1] +
            tap / w.input.x.taps * w.result_stride[2] + tap % w.input.x.taps * w.result_stride[3];
    copy_block(from, Matrix<S>{to, w.result_stride[1], w.result_stride[0]}, run, cols);
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

// Sums of a piece of work, in elements, at most.
constexpr int64_t most_sums = int64_t{1} << 18;

template <class S>
void weight_grad_by_gemm(const Conv2dWeightGrad& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  WeightGrad<S> w = weight_grad<S>(problem);
  if (w.groups * w.rows * w.cols == 0) return;
  // Both operands see the same pixels in the same order, with joined lines or without.
  if (lines_follow(w.grad_output)) join_lines(w.grad_output);
  if (lines_follow(w.input)) join_lines(w.input);
  const Slices<S> slices(w);
  const int64_t col_block = even_block(w.cols, conv_cols<T>, tile_cols<T>), col_blocks = ceil_div(w.cols, col_block);
  // Four pieces or more for each of several threads. A piece has all taps of its channels, so that it stores whole runs.
  const int64_t wanted = pool.threads == 1 ? 1 : ceil_div(4 * pool.threads, slices.count * w.groups * col_blocks);
  const int64_t most_rows = min(most_sums / col_block, ceil_div(w.rows, wanted));
  const int64_t taps = w.rows / w.input.channels;
  const int64_t range = even_block(w.input.channels, max<int64_t>(most_rows / taps, lanes<T>), lanes<T>);
  const int64_t ranges = ceil_div(w.input.channels, range), row_block = even_block(range * taps, block_rows, tile_rows);
  parallel_for(pool, slices.count * w.groups * ranges * col_blocks, [&](int64_t begin, int64_t end) {
    const WorkerBlocks<T> blocks(range * taps * col_block);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % ranges * range, channels = min(w.input.channels - channel, range);
      const int64_t col = i / ranges % col_blocks * col_block, cols = min(w.cols - col, col_block);
      const int64_t group = i / (ranges * col_blocks) % w.groups;
      const int64_t slice = i / (ranges * col_blocks * w.groups);
      const int64_t pixel = slice * slices.pixels, c_stride = round_up(cols, tile_cols<T>);
      const int64_t stop = min(pixel + slices.pixels, w.pixels);
      const WeightGrad<S> part = part_of(w, group, channel, channels);
      weight_grad_block(part, row_block, col, cols, pixel, stop, blocks, c_stride);
      if (!slices.partial) {
        store_weight_grad(part, 0, 0, part.rows, col, cols, Matrix<const T>{blocks.c, c_stride, 1});
        continue;
      }
      for (int64_t tap = 0; tap < taps; ++tap)
        store_slice(w, slices, slice, group, tap * w.input.channels + channel, channels, col, cols,
                    Matrix<const T>{blocks.c + tap * channels * c_stride, c_stride, 1});
    }
  });
  sum_slices(w, slices, pool);
}

}  // namespace
}  // namespace cvfast
