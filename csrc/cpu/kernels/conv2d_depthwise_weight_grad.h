// The gradient to the weights of a depthwise convolution: vectors of neighbouring channels as in conv2d_depthwise.h. While a
// line passes by, the sums of a kernel line's taps stay in registers, and a pixel loaded serves all of them. The chain of
// operations per element is that of the implicit GEMM.
#pragma once
#include "conv2d_depthwise.h"

namespace cvfast {
namespace {

constexpr int64_t weight_grad_sums_bytes = 16 << 10;  // of the sums that pass through the L1 cache for each run of pixels

// From this size of both images on they are asked for a line ahead (measured with AVX2: 8x192x28x28 takes half of the time; what
// lies in the caches takes a sixth longer).
constexpr int64_t weight_grad_ahead_bytes = 8 << 20;

inline bool depthwise_applies(const Conv2dWeightGrad& p) { return is_depthwise(p.shape); }

// Pixels [first, first + pixels) of a line: of row i of the kernel's taps, pixel p's begin at rows[i][p * step].
template <class S>
struct WeightGradLine {
  const S* const* const* rows;
  int64_t row_count, first, pixels, step;
  const S* grads;  // pixel `first`
  int64_t grad_stride;
  bool ahead;  // what the next line is the first to read, of next_rows and of next_grads, is asked for
  const S* const* next_rows[2];
  const S* next_grads;
};

// sum[row, tap] += sum over Pixels * tiles pixels of source * gradient, for `lanes` channels from `channel` on.
template <class S, int Taps, int Step, int Rows, int Pixels>
void weight_grad_tiles(const WeightGradLine<S>& line, int64_t row, int64_t pixel, int64_t tiles, int64_t channel,
                       Compute<S>* sums) {
  using V = Vector<Compute<S>>;
  constexpr int64_t L = lanes<Compute<S>>;
  constexpr int spacing = Step ? Step : 1, columns = (Pixels - 1) * spacing + Taps;
  const int64_t step = Step ? Step : line.step;
  V sum[Rows][Taps];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) sum[r][t] = load_as<V>(sums + (r * Taps + t) * L);
  const bool asks = square_tiles_ask && line.ahead && row + Rows == line.row_count && channel % line_elements<S> < L;
  for (int64_t tile = 0; tile < tiles; ++tile, pixel += Pixels) {
    if (asks) {
#pragma GCC unroll 16
      for (int j = 0; j < Pixels * spacing; ++j) {
        const int64_t column = (line.first + pixel) * spacing + j;
        __builtin_prefetch(line.next_rows[0][column] + channel, 0, 2);
        if (spacing > 1) __builtin_prefetch(line.next_rows[1][column] + channel, 0, 2);
      }
#pragma GCC unroll 16
      for (int p = 0; p < Pixels; ++p)
        __builtin_prefetch(line.next_grads + (pixel + p) * line.grad_stride + channel, 0, 2);
    }
    V grad[Pixels];
#pragma GCC unroll 8
    for (int p = 0; p < Pixels; ++p) grad[p] = load_vector(line.grads + (pixel + p) * line.grad_stride + channel);
#pragma GCC unroll 32
    for (int j = 0; j < columns; ++j) {
      const int64_t column = (line.first + pixel) * step + (Step ? j : j * step);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const V x = load_vector(line.rows[row + r][column] + channel);
#pragma GCC unroll 8
        for (int t = 0; t < Taps; ++t)
          if (j >= t && (j - t) % spacing == 0 && (j - t) / spacing < Pixels) sum[r][t] += x * grad[(j - t) / spacing];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) store_as(sums + (r * Taps + t) * L, sum[r][t]);
}

template <class S, int Taps, int Step, int Rows>
void weight_grad_rows(const WeightGradLine<S>& line, int64_t row, int64_t channel, Compute<S>* sums) {
  constexpr int pixels = 4;
  const int64_t tiles = line.pixels / pixels;
  weight_grad_tiles<S, Taps, Step, Rows, pixels>(line, row, 0, tiles, channel, sums);
  weight_grad_tiles<S, Taps, Step, Rows, 1>(line, row, tiles * pixels, line.pixels - tiles * pixels, channel, sums);
}

// sums is [row, tap][lanes]. As many rows at a time as hide the latency of a multiply-add and fit the registers.
template <class S, int Taps, int Step>
void weight_grad_line(const WeightGradLine<S>& line, int64_t channel, Compute<S>* sums) {
  constexpr int rows = Taps == 1 ? 4 : Taps == 3 || tile_rows == 12 ? 3 : Taps == 5 ? 2 : 1;
  int64_t row = 0;
  for (; row + rows <= line.row_count; row += rows, sums += rows * Taps * lanes<Compute<S>>)
    weight_grad_rows<S, Taps, Step, rows>(line, row, channel, sums);
  if constexpr (rows > 2)
    for (; row + 2 <= line.row_count; row += 2, sums += 2 * Taps * lanes<Compute<S>>)
      weight_grad_rows<S, Taps, Step, 2>(line, row, channel, sums);
  for (; row < line.row_count; ++row, sums += Taps * lanes<Compute<S>>)
    weight_grad_rows<S, Taps, Step, 1>(line, row, channel, sums);
}

template <class S>
struct WeightGradLineKernel {
  int64_t row_taps;
  void (*run)(const WeightGradLine<S>&, int64_t channel, Compute<S>* sums);
};

template <class S>
WeightGradLineKernel<S> weight_grad_line_kernel(const Axis& x) {
  if (x.tap_offset == 1 && x.step == 1) switch (x.taps) {
      case 3: return {3, weight_grad_line<S, 3, 1>};
      case 5: return {5, weight_grad_line<S, 5, 1>};
      case 7: return {7, weight_grad_line<S, 7, 1>};
    }
  if (x.tap_offset == 1 && x.step == 2) switch (x.taps) {
      case 3: return {3, weight_grad_line<S, 3, 2>};
      case 5: return {5, weight_grad_line<S, 5, 2>};
      case 7: return {7, weight_grad_line<S, 7, 2>};
    }
  return {1, weight_grad_line<S, 1, 0>};
}

// The channels of a piece of work in vectors; the last one overlaps the one before if `in_place`.
struct ChannelVectors {
  int64_t first, count, last;  // channel of the first and of the last one

  int64_t at(int64_t i, int64_t lanes) const { return min(first + i * lanes, last); }
};

// Sums [vector of channels, tap][lanes]: the chain over at most block_depth pixels that is under way, and those before it.
template <class T>
struct DepthwiseSums {
  T *chain, *sum;
  int64_t elements;
  int64_t length = 0;  // pixels in the chain

  void add(int64_t pixels) {
    length += pixels;
    if (length == block_depth) close();
  }
  void close() {
    for (int64_t i = 0; i < elements; ++i) sum[i] += chain[i], chain[i] = T{};
    length = 0;
  }
};

// With three taps in a line: pixels whose products are added to the sums of one vector of channels before the next one's turn.
// Memory is then read nearly in its order. More sums take longer to load and store than that gains.
constexpr int64_t weight_grad_run = 8;

// Adds pixels [begin, end) of the band of lines that starts with `position` in one sample, counted from the band's start.
template <class S>
void add_band(const Axis& y, const Axis& x, const PixelTable<S>& table, const PixelLines<const S>& grads, int64_t position,
              int64_t begin, int64_t end, const ChannelVectors& channels, bool ahead, DepthwiseSums<Compute<S>>& sums) {
  constexpr int64_t L = lanes<Compute<S>>;
  const WeightGradLineKernel<S> kernel = weight_grad_line_kernel<S>(x);
  const int64_t run = kernel.row_taps == 3 ? weight_grad_run : x.positions;
  const int64_t rows_per_line = x.taps / kernel.row_taps, taps = y.taps * x.taps;
  const S* const* rows[block_depth];
  WeightGradLine<S> line = {rows, y.taps * rows_per_line, 0, 0, x.step, nullptr, grads.pixel_stride, ahead, {}, nullptr};
  for (int64_t pixel = begin; pixel < end; pixel += line.pixels) {
    const int64_t i = position + pixel / x.positions;
    line.first = pixel % x.positions;
    line.pixels = min(min(x.positions - line.first, end - pixel), min(block_depth - sums.length, run));
    line.grads = grads.at(i, line.first);
    for (int64_t row = 0; row < line.row_count; ++row)
      rows[row] = table.line(y.source(i, row / rows_per_line)) + row % rows_per_line * x.tap_offset;
    for (int64_t row = 0; row < 2; ++row) line.next_rows[row] = table.line(y.source(i + 1, y.taps - 1 - row));
    line.next_grads = grads.at(i + 1, line.first);
    for (int64_t v = 0; v < channels.count; ++v) kernel.run(line, channels.at(v, L), sums.chain + v * taps * L);
    sums.add(line.pixels);
  }
}

// The sums over one slice, [tap][group], for those that are added up; `to` is the place of `channel`.
template <class T>
Block<T> slice_block(T* to, int64_t groups, int64_t taps_x) { return {to, 1, taps_x * groups, groups}; }

template <class S>
Block<S> weight_grad_block_at(const WeightGrad<S>& w, int64_t channel) {
  return {w.result + channel * w.result_stride[0], w.result_stride[0], w.result_stride[2], w.result_stride[3]};
}

// Adds the slices up and stores the sums.
template <class S>
void sum_depthwise_slices(const WeightGrad<S>& w, const Slices<S>& slices) {
  using T = Compute<S>;
  if (!slices.partial) return;
  for (int64_t slice = 1; slice < slices.count; ++slice)
    for (int64_t j = 0; j < slices.elements; ++j) slices.partial[j] += slices.partial[slice * slices.elements + j];
  copy_planes(slice_block<const T>(slices.partial, w.groups, w.input.x.taps), weight_grad_block_at(w, 0), w.groups,
              w.input.y.taps, w.input.x.taps);
}

template <class S>
void weight_grad_depthwise(const Conv2dWeightGrad& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const WeightGrad<S> w = weight_grad<S>(problem);
  if (w.groups * w.rows == 0) return;
  const Slices<S> slices(w);
  const Axis &y = w.input.y, &x = w.input.x;
  const bool in_place = w.input.channel_stride == 1 && w.grad_output.channel_stride == 1 && w.groups >= L;
  const int64_t whole = in_place ? ceil_div(w.groups, L) : 1;
  const int64_t most = max<int64_t>(1, weight_grad_sums_bytes / (w.rows * CVFAST_VECTOR_BYTES));
  const int64_t wanted = pool.threads > 1 ? ceil_div(4 * pool.threads, slices.count) : 1;  // pieces of a slice
  const int64_t vectors = even_block(whole, min(most, ceil_div(whole, wanted)), 1), blocks = ceil_div(w.groups, vectors * L);
  const bool ahead = image_bytes<S>(problem.shape) >= weight_grad_ahead_bytes;
  const Columns columns(x);
  const int64_t line_bytes = (x.inputs + x.positions) * L * static_cast<int64_t>(sizeof(T));
  const int64_t span = (y.taps - 1) * y.tap_offset + 1;
  const int64_t band = even_block(y.positions, max<int64_t>(1, (depthwise_band_bytes / line_bytes - span) / y.step), 1);
  const int64_t lines = min((band - 1) * y.step + span, y.inputs), band_pixels = band * x.positions;
  const int64_t sums_elements = vectors * w.rows * L;
  parallel_for(pool, slices.count * blocks, [&](int64_t begin, int64_t end) {
    const int64_t pointers = (lines + 1) * columns.count, copies = in_place ? 0 : (lines * x.inputs + band_pixels) * L;
    T* chain = scratch<T>(ScratchUse::worker, 2 * sums_elements + copies + round_up(w.groups, L) +
                                                  pointers * ceil_div(sizeof(T*), sizeof(T)));
    DepthwiseSums<T> sums = {chain, chain + sums_elements, sums_elements};
    T *source = sums.sum + sums_elements, *grads = source + lines * x.inputs * L;
    T* zeros = source + copies;
    void* pixels = zeros + round_up(w.groups, L);
    zero_matrix(Matrix<T>{zeros, 0, 1}, 1, round_up(w.groups, L));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slice = i / blocks, channel = i % blocks * vectors * L;
      const int64_t last = min((slice + 1) * slices.pixels, w.pixels), valid = min(w.groups - channel, vectors * L);
      zero_matrix(Matrix<T>{chain, 0, 1}, 1, 2 * sums_elements);
      const ChannelVectors in = {channel, ceil_div(valid, L), w.groups - L};
      for (int64_t pixel = slice * slices.pixels, next; pixel < last; pixel = next) {
        // The rest of the band that the pixel lies in.
        const int64_t sample_pixels = y.positions * x.positions, n = pixel / sample_pixels, in_sample = pixel % sample_pixels;
        const int64_t position = in_sample / band_pixels * band, first = in_sample - position * x.positions;
        const int64_t stop = min(first + last - pixel, min(band_pixels, sample_pixels - position * x.positions));
        next = pixel + stop - first;
        const int64_t first_line = position + first / x.positions, count = ceil_div(stop, x.positions) - first / x.positions;
        const Range from = source_lines(y, first_line, count);
        const S* input = w.input.data + n * w.input.batch_stride;
        const S* grad = w.grad_output.data + n * w.grad_output.batch_stride;
        if (in_place) {
          PixelTable<S> table = {static_cast<const S**>(pixels), from.begin, from.end - from.begin, columns.count};
          table.fill(columns, PixelLines<const S>{input, 0, w.input.y_stride, w.input.x_stride},
                     reinterpret_cast<const S*>(zeros));
          add_band(y, x, table, PixelLines<const S>{grad, 0, w.grad_output.y_stride, w.grad_output.x_stride}, position,
                           first, stop, in, ahead, sums);
        } else {
          copy_planes(Block<const S>{input + channel * w.input.channel_stride + from.begin * w.input.y_stride,
                                     w.input.channel_stride, w.input.y_stride, w.input.x_stride},
                      Block<T>{source, 1, x.inputs * L, L}, valid, from.end - from.begin, x.inputs);
          copy_planes(Block<const S>{grad + channel * w.grad_output.channel_stride + first_line * w.grad_output.y_stride,
                                     w.grad_output.channel_stride, w.grad_output.y_stride, w.grad_output.x_stride},
                      Block<T>{grads, 1, x.positions * L, L}, valid, count, x.positions);
          PixelTable<T> table = {static_cast<const T**>(pixels), from.begin, from.end - from.begin, columns.count};
          table.fill(columns, PixelLines<const T>{source, from.begin, x.inputs * L, L}, zeros);
          add_band(y, x, table, PixelLines<const T>{grads, first_line, x.positions * L, L}, position, first, stop,
                           ChannelVectors{0, 1, 0}, false, sums);
        }
      }
      sums.close();
      for (int64_t v = 0; v < in.count; ++v) {
        const int64_t c = channel + v * L, lane = in_place ? c - in.at(v, L) : 0, count = min(L, w.groups - c);
        const Block<const T> from = {sums.sum + v * w.rows * L + lane, 1, x.taps * L, L};
        if (slices.partial)
          copy_planes(from, slice_block(slices.partial + slice * slices.elements + c, w.groups, x.taps), count, y.taps, x.taps);
        else
          copy_planes(from, weight_grad_block_at(w, c), count, y.taps, x.taps);
      }
    }
  });
  sum_depthwise_slices(w, slices);
}

}  // namespace
}  // namespace cvfast
