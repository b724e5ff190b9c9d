// Depthwise convolution (one channel in and one out per group): vectors of neighbouring channels, read in place or, where
// channels are no neighbours in memory, from a transposed copy of some lines. A tile of pixels is computed at a time: of two
// lines where the kernel is square, so that a pixel loaded serves all taps of up to two results' sums (the second-level cache
// gives 25 bytes a cycle, which bound a tile of one line), else of one line, whose pixels serve every tap of a kernel line.
// The chain of operations per element is that of the implicit GEMM, zeros for padding included, so the bits are too.
#pragma once
#include "../isa.h"
#include "conv2d_implicit_gemm.h"
#include "transpose.h"

namespace cvfast {
namespace {

inline bool is_depthwise(const Conv2dShape& s) {
  return s.in_channels == s.groups && s.out_channels == s.groups && s.kernel_height * s.kernel_width <= block_depth;
}
// Transposing costs more than the direct algorithm's plain copy where that has long lines without a stride. With AVX-512 a
// transposed vector serves 16 channels: where they fill it, the direct algorithm takes up to 2.3 times as long on lines of 20 to
// 56 pixels, and about the same on 112 (Zen 4).
inline bool depthwise_pays(const Conv2dShape& s, const int64_t* stride, const int64_t* other_stride) {
  const bool full = CVFAST_VECTOR_BYTES == 64 && 4 * s.groups >= 3 * round_up(s.groups, lanes<float>);
  return (stride[1] == 1 && other_stride[1] == 1) || s.out_width < (full ? 64 : 20) || s.stride_w > 1;
}
inline bool depthwise_applies(const Conv2dForward& p) {
  return is_depthwise(p.shape) && depthwise_pays(p.shape, p.input.stride, p.output.stride);
}
inline bool depthwise_applies(const Conv2dInputGrad& p) {
  return is_depthwise(p.shape) && depthwise_pays(p.shape, p.grad_output.stride, p.grad_input.stride);
}

// The source's columns in the order in which a line's pixels and taps need them, both upwards: pixel i (counted from the
// line's end if tap offsets are negative) and tap t read column i * step + t * tap_step of the list.
struct Columns {
  int64_t count, first, direction, inputs, step, tap_step;

  explicit Columns(const Axis& x)
      : count((x.positions - 1) * x.step + 1), first(x.offset), direction(1), inputs(x.inputs), step(x.step),
        tap_step(x.tap_offset) {
    if (tap_step < 0) direction = -1, tap_step = -tap_step, first += (x.positions - 1) * x.step;
    if (x.taps > 0) count += (x.taps - 1) * tap_step;
  }
};

// Lines of pixels with neighbouring channels.
template <class S>
struct PixelLines {
  S* data;  // line `first`
  int64_t first, line_stride, pixel_stride;

  S* at(int64_t line, int64_t pixel) const { return data + (line - first) * line_stride + pixel * pixel_stride; }
};

// Where the pixels of one source line lie, by list of columns: to[column]; `zeros` if outside of the source.
template <class S>
void point_at_pixels(const Columns& columns, const PixelLines<const S>& source, int64_t line, bool inside, const S* zeros,
                     const S** to) {
  for (int64_t j = 0; j < columns.count; ++j) {
    const int64_t x = columns.first + j * columns.direction;
    to[j] = inside && x >= 0 && x < columns.inputs ? source.at(line, x) : zeros;
  }
}

// Pointers to the pixels of source lines [first, first + lines) and, last, a line outside: [line][column].
template <class S>
struct PixelTable {
  const S** pixels;
  int64_t first, lines, columns;

  void fill(const Columns& list, const PixelLines<const S>& source, const S* zeros) {
    for (int64_t i = 0; i <= lines; ++i)
      point_at_pixels(list, source, first + i, i < lines, zeros, pixels + i * columns);
  }
  const S* const* line(int64_t y) const { return pixels + (y >= first && y < first + lines ? y - first : lines) * columns; }
};

// The lines, inside the source, that positions [position, position + count) read.
inline Range source_lines(const Axis& y, int64_t position, int64_t count) {
  if (y.taps == 0 || count <= 0) return {0, 0};
  const int64_t a = y.source(position, 0), b = y.source(position, y.taps - 1), more = (count - 1) * y.step;
  const int64_t begin = min(max<int64_t>(min(a, b), 0), y.inputs);
  return {begin, max(begin, min(max(a, b) + more + 1, y.inputs))};
}

// Channels [begin, end), at least `lanes`, of one line of results, or of several: rows of taps are then those of all of
// them. The taps of row i and pixel p begin at rows[i][p * step].
template <class S>
struct DepthwiseLine {
  int64_t begin, end;
  const S* const* const* rows;
  int64_t row_count, pixels, step;
  const S* const* const* next_rows;  // of the next line of results; of square tiles those that the next lines are the first to read
  const Compute<S>* weights;  // [row, tap][weight_stride]
  int64_t weight_stride;
  const Compute<S>* bias;  // or nullptr
  Bounds<Compute<S>> bounds;
  bool ahead;  // what comes next is asked for
  S* to = nullptr;
  int64_t to_stride = 0, to_line_stride = 0;
  // Of phases together: lines of results, and whether the last position's second column exists.
  int64_t phase_lines = 1;
  bool last_column = true;
};

// From this size of source and result on what comes next is asked for. What lies in the caches Zen 5 fetches in time by itself,
// and asking for it costs a fifth of the time; Zen 4 and Zen 1 gain as much by it, Zen 4 as soon as its L2 cannot hold them. With AVX2
// it costs a sixth of the time in the caches of Zen 3, and beyond them saves half or more.
inline int64_t ahead_bytes() {
  const int64_t with_avx512 = int64_t{halves_avx512() ? 2 : 8} << 20;
  return CVFAST_VECTOR_BYTES < 64 ? int64_t{5} << 20 : with_avx512;
}
// Of both images of a depthwise convolution.
template <class S>
int64_t image_bytes(const Conv2dShape& s) {
  const int64_t pixels = s.in_height * s.in_width + s.out_height * s.out_width;
  return s.batch * s.groups * pixels * static_cast<int64_t>(sizeof(S));
}

// Step 0: line.step.
template <class S, int Taps, int Step, int Pixels>
void depthwise_tile(const DepthwiseLine<S>& line, int64_t pixel) {
  using V = Vector<Compute<S>>;
  constexpr int64_t L = lanes<Compute<S>>;
  const int64_t step = Step ? Step : line.step;
  S* to = line.to + pixel * line.to_stride;
  // The pixels that the next line of results is the first to read, and the next tile's results, are fetched meanwhile.
  const bool another = line.ahead && Pixels > 1 && pixel + 2 * Pixels <= line.pixels;
  for (int64_t c = line.begin; c < line.end; c += L) {
    const int64_t channel = min(c, line.end - L);  // the last vector may overlap the one before
    if (Pixels > 1 && Step > 0 && line.ahead)
      for (int64_t i = max<int64_t>(0, line.row_count - Step); i < line.row_count; ++i)
#pragma GCC unroll 32
        for (int j = 0; j < Pixels * Step; ++j) __builtin_prefetch(line.next_rows[i][pixel * Step + j] + channel);
    if (another)
#pragma GCC unroll 16
      for (int p = 0; p < Pixels; ++p) __builtin_prefetch(to + (Pixels + p) * line.to_stride + channel, 1);
    const Compute<S>* weights = line.weights + channel;
    V sum[Pixels] = {};
    for (int64_t i = 0; i < line.row_count; ++i) {
      const S* const* source = line.rows[i] + pixel * step;
      V w[Taps];
#pragma GCC unroll 8
      for (int t = 0; t < Taps; ++t, weights += line.weight_stride) w[t] = load_as<V>(weights);
      if constexpr (Step == 0) {
#pragma GCC unroll 8
        for (int p = 0; p < Pixels; ++p) sum[p] += load_vector(source[p * step] + channel) * w[0];
      } else {
#pragma GCC unroll 32
        for (int j = 0; j < (Pixels - 1) * Step + Taps; ++j) {
          const V x = load_vector(source[j] + channel);
#pragma GCC unroll 8
          for (int t = 0; t < Taps; ++t)
            if (j >= t && (j - t) % Step == 0 && (j - t) / Step < Pixels) sum[(j - t) / Step] += x * w[t];
        }
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < Pixels; ++p) {
      if (line.bias) sum[p] += load_as<V>(line.bias + channel);
      store_vector(line.bounds.clamp(sum[p]), to + p * line.to_stride + channel);
    }
  }
}

// With AVX-512 the tiles of square kernels and those of gradients do without asking ahead.
constexpr bool square_tiles_ask = CVFAST_VECTOR_BYTES < 64;

// Pixels of `Lines` neighbouring lines with a square kernel: a pixel that is loaded serves the taps of all kernel lines. Each
// sum's taps keep their order.
template <class S, int Taps, int Step, int Lines, int Pixels>
void depthwise_square_tile(const DepthwiseLine<S>& line, int64_t pixel) {
  using V = Vector<Compute<S>>;
  constexpr int64_t L = lanes<Compute<S>>;
  constexpr int rows = (Lines - 1) * Step + Taps, columns = (Pixels - 1) * Step + Taps;
  const S* const* source[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) source[i] = line.rows[i] + pixel * Step;
  S* const to = line.to + pixel * line.to_stride;
  const int64_t to_stride = line.to_stride, to_line_stride = line.to_line_stride, weight_stride = line.weight_stride;
  const int64_t end = line.end;
  const Compute<S>*const line_weights = line.weights, *const bias = line.bias;
  const auto bounds = line.bounds;
  const bool another = pixel + 2 * Pixels <= line.pixels;
  for (int64_t c = line.begin; c < end; c += L) {
    const int64_t channel = min(c, end - L);  // the last vector may overlap the one before
    if (square_tiles_ask && line.ahead && (c - line.begin) % line_elements<S> < L) {
#pragma GCC unroll 16
      for (int i = 0; i < Lines * Step; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Pixels * Step; ++j) __builtin_prefetch(line.next_rows[i][pixel * Step + j] + channel);
      if (another)
#pragma GCC unroll 4
        for (int l = 0; l < Lines; ++l)
#pragma GCC unroll 16
          for (int p = 0; p < Pixels; ++p)
            __builtin_prefetch(to + l * to_line_stride + (Pixels + p) * to_stride + channel, 1);
    }
    const Compute<S>* weights = line_weights + channel;
    V sum[Lines][Pixels] = {};
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      V w[Lines][Taps];
#pragma GCC unroll 4
      for (int l = 0; l < Lines; ++l)
        if (const int r = i - l * Step; r >= 0 && r < Taps)
#pragma GCC unroll 8
          for (int t = 0; t < Taps; ++t) w[l][t] = load_as<V>(weights + (r * Taps + t) * weight_stride);
#pragma GCC unroll 32
      for (int j = 0; j < columns; ++j) {
        const V x = load_vector(source[i][j] + channel);
#pragma GCC unroll 4
        for (int l = 0; l < Lines; ++l)
#pragma GCC unroll 8
          for (int t = 0; t < Taps; ++t)
            if (i >= l * Step && i - l * Step < Taps && j >= t && (j - t) % Step == 0 && (j - t) / Step < Pixels)
              sum[l][(j - t) / Step] += x * w[l][t];
      }
    }
#pragma GCC unroll 4
    for (int l = 0; l < Lines; ++l)
#pragma GCC unroll 16
      for (int p = 0; p < Pixels; ++p) {
        if (bias) sum[l][p] += load_as<V>(bias + channel);
        store_vector(bounds.clamp(sum[l][p]), to + l * to_line_stride + p * to_stride + channel);
      }
  }
}

constexpr int square_lines = 2;
template <class S, int Taps, int Step>
void depthwise_square(const DepthwiseLine<S>& line) {
  const int64_t pixels = line.pixels;
  if constexpr (tile_rows == 12)
    if (pixels >= 7 && round_up(pixels, 7) <= round_up(pixels, 4)) {
      for (int64_t p = 0; p < pixels; p += 7) depthwise_square_tile<S, Taps, Step, square_lines, 7>(line, min(p, pixels - 7));
      return;
    }
  for (int64_t p = 0; p < pixels; p += 4) depthwise_square_tile<S, Taps, Step, square_lines, 4>(line, min(p, pixels - 4));
}

// ---- The gradient to the input with stride 2: four phases together ----
//
// With K = (Taps + 1) / 2, position (i, j) stands for the results (2 i + h, 2 j + g), h and g 0 or 1. They read K x K pixels of
// the source, one of them with the kernel's taps (2 a + h - odd, 2 b + g - odd) where these exist; odd: the padding's parity.
// Each pixel that is loaded serves all phases, and the result is written line by line.

// Positions [pixel, pixel + Positions) of a line, counted from its end, as the source's columns are. Weights: [kernel's tap].
template <class S, int Taps, int Odd, int Positions>
void depthwise_phases_tile(const DepthwiseLine<S>& line, int64_t pixel) {
  using V = Vector<Compute<S>>;
  constexpr int64_t L = lanes<Compute<S>>;
  constexpr int K = (Taps + 1) / 2, columns = Positions - 1 + K;
  const S* const* source[K];
#pragma GCC unroll 8
  for (int a = 0; a < K; ++a) source[a] = line.rows[a] + pixel;
  const int64_t to_stride = line.to_stride, to_line_stride = line.to_line_stride, weight_stride = line.weight_stride;
  const int64_t begin = line.begin, end = line.end, lines = line.phase_lines;
  S* const to = line.to + 2 * pixel * to_stride;
  const bool last_column = pixel > 0 || line.last_column;
  const Compute<S>*const line_weights = line.weights, *const bias = line.bias;
  const auto bounds = line.bounds;
  const bool another = pixel + 2 * Positions <= line.pixels;
  for (int64_t c = begin; c < end; c += L) {
    const int64_t channel = min(c, end - L);  // the last vector may overlap the one before
    if (square_tiles_ask && line.ahead && (c - begin) % line_elements<S> < L) {
#pragma GCC unroll 16
      for (int j = 0; j < Positions; ++j) __builtin_prefetch(line.next_rows[0][pixel + j] + channel);
      if (another)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 16
          for (int p = 0; p < 2 * Positions; ++p)
            __builtin_prefetch(to + h * to_line_stride + (2 * Positions + p) * to_stride + channel, 1);
    }
    const Compute<S>* weights = line_weights + channel;
    V sum[2][2][Positions] = {};
#pragma GCC unroll 8
    for (int a = 0; a < K; ++a)
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        const V x = load_vector(source[a][j] + channel);
#pragma GCC unroll 8
        for (int b = 0; b < K; ++b)
#pragma GCC unroll 4
          for (int phase = 0; phase < 4; ++phase) {
            const int h = phase / 2, g = phase % 2, r = 2 * a + h - Odd, s = 2 * b + g - Odd, p = j - b;
            if (r >= 0 && r < Taps && s >= 0 && s < Taps && p >= 0 && p < Positions)
              sum[h][g][p] += x * load_as<V>(weights + (r * Taps + s) * weight_stride);
          }
      }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
      if (h < lines)
#pragma GCC unroll 16
        for (int p = 0; p < Positions; ++p)
#pragma GCC unroll 2
          for (int g = 0; g < 2; ++g) {
            if (bias) sum[h][g][p] += load_as<V>(bias + channel);
            if (p > 0 || g == 0 || last_column)
              store_vector(bounds.clamp(sum[h][g][p]), to + h * to_line_stride + (2 * p - g) * to_stride + channel);
          }
  }
}

constexpr int64_t phases_positions = tile_rows / 3;  // of a tile: 4 or 2, so that its sums fit the registers
template <class S, int Taps, int Odd>
void depthwise_phases(const DepthwiseLine<S>& line) {
  for (int64_t p = 0; p < line.pixels; p += phases_positions)
    depthwise_phases_tile<S, Taps, Odd, phases_positions>(line, min(p, line.pixels - phases_positions));
}

// In tiles of 7 or 4 pixels, whichever computes fewer twice; the last one overlaps its neighbour. Of 14 for many taps, where there are
// registers for that.
template <class S, int Taps, int Step>
void depthwise_line(const DepthwiseLine<S>& line) {
  const int64_t pixels = line.pixels;
  if constexpr (tile_rows == 12 && Taps >= 5 && Step == 1)
    if (pixels >= 14 && round_up(pixels, 14) <= round_up(pixels, 4)) {
      for (int64_t p = 0; p < pixels; p += 14) depthwise_tile<S, Taps, Step, 14>(line, min(p, pixels - 14));
      return;
    }
  if (pixels >= 7 && round_up(pixels, 7) <= round_up(pixels, 4))
    for (int64_t p = 0; p < pixels; p += 7) depthwise_tile<S, Taps, Step, 7>(line, min(p, pixels - 7));
  else if (pixels >= 4)
    for (int64_t p = 0; p < pixels; p += 4) depthwise_tile<S, Taps, Step, 4>(line, min(p, pixels - 4));
  else
    for (int64_t p = 0; p < pixels; ++p) depthwise_tile<S, Taps, Step, 1>(line, p);
}

template <class S>
struct DepthwiseLineKernel {
  int64_t row_taps;  // taps in a row: those of a kernel line, or one
  void (*run)(const DepthwiseLine<S>&);
};

// The kernel for square_lines lines of at least 4 pixels, or nullptr.
template <class S>
auto depthwise_square_kernel(const Axis& y, const Axis& x) -> void (*)(const DepthwiseLine<S>&) {
  const Columns columns(x);
  const bool dense = y.tap_offset * y.tap_offset == 1 && columns.tap_step == 1;
  if (!dense || y.taps != x.taps || y.step != x.step || x.positions < 4) return nullptr;
  if (x.step == 1) switch (x.taps) {
      case 3: return depthwise_square<S, 3, 1>;
      case 5: return depthwise_square<S, 5, 1>;
    }
  if (x.step == 2) switch (x.taps) {
      case 3: return depthwise_square<S, 3, 2>;
      case 5: return depthwise_square<S, 5, 2>;
    }
  return nullptr;
}

template <class S>
DepthwiseLineKernel<S> depthwise_line_kernel(const Axis& x) {
  const Columns columns(x);
  if (columns.tap_step == 1 && x.step == 1) switch (x.taps) {
      case 2: return {2, depthwise_line<S, 2, 1>};
      case 3: return {3, depthwise_line<S, 3, 1>};
      case 4: return {4, depthwise_line<S, 4, 1>};
      case 5: return {5, depthwise_line<S, 5, 1>};
      case 7: return {7, depthwise_line<S, 7, 1>};
    }
  if (columns.tap_step == 1 && x.step == 2) switch (x.taps) {
      case 3: return {3, depthwise_line<S, 3, 2>};
      case 5: return {5, depthwise_line<S, 5, 2>};
      case 7: return {7, depthwise_line<S, 7, 2>};
    }
  return {1, depthwise_line<S, 1, 0>};
}

// Whether all four phases of a gradient to the input are computed together.
template <class S>
bool joins_phases(const Correlation<S>& c) {
  const Conv2dShape& s = c.shape;
  return c.input_grad && s.stride_h == 2 && s.stride_w == 2 && s.dilation_h == 1 && s.dilation_w == 1 &&
         s.kernel_height == s.kernel_width && (s.kernel_height == 3 || s.kernel_height == 5) &&
         (s.padding_h - s.padding_w) % 2 == 0 && s.in_height >= 2 && ceil_div(s.in_width, 2) >= phases_positions;
}

// The kernel for that, in lines of storage type S.
template <class S>
auto depthwise_phases_kernel(const Conv2dShape& s) -> void (*)(const DepthwiseLine<S>&) {
  const bool odd = s.padding_h % 2 != 0;
  if (s.kernel_height == 3) return odd ? depthwise_phases<S, 3, 1> : depthwise_phases<S, 3, 0>;
  return odd ? depthwise_phases<S, 5, 1> : depthwise_phases<S, 5, 0>;
}

// What the four phases read on an axis: position i's tap t is source i + (padding + 1) / 2 - t.
inline Axis phases_axis(int64_t in, int64_t out, int64_t taps, int64_t padding) {
  return {ceil_div(in, 2), out, 1, (padding + 1) / 2, (taps + 1) / 2, -1, 0, 1};
}

// Phase `index`, or all of them as one.
template <class S>
Phase<S> depthwise_phase(const Correlation<S>& c, int64_t index) {
  Phase<S> phase = make_phase(c, index / c.phases_x(), index % c.phases_x(), false);
  const Conv2dShape& s = c.shape;
  if (joins_phases(c)) {
    phase.patches.y = phases_axis(s.in_height, s.out_height, s.kernel_height, s.padding_h);
    phase.patches.x = phases_axis(s.in_width, s.out_width, s.kernel_width, s.padding_w);
  }
  return phase;
}
template <class S>
int64_t depthwise_phase_count(const Correlation<S>& c) {
  return joins_phases(c) ? 1 : c.phases_y() * c.phases_x();
}

// A piece of work: `band` lines of positions of one sample for `chunk` channels (the last chunk takes what is left), `block`
// of them at a time.
struct DepthwisePlan {
  bool in_place;
  int64_t chunk, chunks, block, band, bands;
  int64_t source_lines, columns;  // of a band and of its tables, at most
};

constexpr int64_t depthwise_band_bytes = 128 << 10;  // of a band's source
constexpr int64_t depthwise_rows_bytes = 160 << 10;  // of the source lines that a line of results reads in place

template <class S>
DepthwisePlan depthwise_plan(const Correlation<S>& c, int64_t threads) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const Conv2dShape& s = c.shape;
  const Patches<S> patches = make_phase(c, 0, 0, false).patches;
  DepthwisePlan p;
  p.in_place = c.source_stride[1] == 1 && c.result_stride[1] == 1 && c.groups >= L && (!c.rounds_last() || epilogue_clamps(c));
  p.columns = patches.x.positions * patches.x.step + s.dilation_w * (s.kernel_width - 1);
  const int64_t span = s.dilation_h * (s.kernel_height - 1) + 1;  // the gradient to the input divides it by the stride
  // A band is transposed, or read in place by several phases in turn.
  const bool phases = depthwise_phase_count(c) > 1;
  const int64_t pixel_bytes = (p.in_place && phases ? c.groups : L) * static_cast<int64_t>(sizeof(T));
  const int64_t most = max<int64_t>(1, (depthwise_band_bytes / (p.columns * pixel_bytes) - span) / patches.y.step);
  const int64_t pieces = threads > 1 ? ceil_div(4 * threads, s.batch) : 1;  // wanted of a sample
  p.band = even_block(patches.y.positions, min(most, max<int64_t>(4, ceil_div(patches.y.positions, pieces))), 1);
  p.bands = ceil_div(patches.y.positions, p.band);
  p.chunks = min(max<int64_t>(1, c.groups / (2 * L)), ceil_div(pieces, p.bands));
  p.chunk = max<int64_t>(L, c.groups / p.chunks / L * L);
  const int64_t rows_bytes = p.columns * s.kernel_height * static_cast<int64_t>(sizeof(S));
  p.block = p.in_place ? max(4 * L, depthwise_rows_bytes / rows_bytes / L * L) : L;
  p.source_lines = min((p.band - 1) * patches.y.step + span, patches.y.inputs);
  return p;
}

// The weights as [tap, channel], all of the kernel in its order for phases together, else those of each phase.
template <class S>
void pack_depthwise_weights(const Correlation<S>& c, int64_t padded, Compute<S>* to) {
  if (joins_phases(c)) {
    const int64_t height = c.shape.kernel_height, width = c.shape.kernel_width;
    return copy_planes(Block<const S>{c.weight, c.weight_group_stride, c.weight_y_stride, c.weight_x_stride},
                       Block<Compute<S>>{to, 1, width * padded, padded}, c.groups, height, width);
  }
  for (int64_t index = 0; index < c.phases_y() * c.phases_x(); ++index) {
    const Patches<S> patches = make_phase(c, index / c.phases_x(), index % c.phases_x()).patches;
    const Axis &y = patches.y, &x = patches.x;
    copy_planes(Block<const S>{c.weight + y.first_tap * c.weight_y_stride + x.first_tap * c.weight_x_stride,
                               c.weight_group_stride, y.tap_step * c.weight_y_stride, x.tap_step * c.weight_x_stride},
                Block<Compute<S>>{to, 1, x.taps * padded, padded}, c.groups, y.taps, x.taps);
    to += y.taps * x.taps * padded;
  }
}

// Lines [position, position + lines) of one phase for the channels, weights and bias that `line` names, into `result`.
// after_line(i) is called after each.
template <class S, class AfterLine>
void depthwise_lines(const PixelTable<S>& table, const Axis& y, const Axis& x, int64_t position, int64_t lines,
                     DepthwiseLine<S> line, const PixelLines<S>& result, AfterLine&& after_line) {
  const DepthwiseLineKernel<S> kernel = depthwise_line_kernel<S>(x);
  const Columns columns(x);
  const int64_t rows_per_line = x.taps / kernel.row_taps, end = position + lines;
  const int64_t first_pixel = columns.direction < 0 ? x.positions - 1 : 0;
  const S* const* rows[2][block_depth];
  line.to_stride = columns.direction * result.pixel_stride;
  if (const auto square = depthwise_square_kernel<S>(y, x)) {
    const bool down = y.tap_offset < 0;
    const int64_t rows_read = (square_lines - 1) * y.step + y.taps, new_rows = square_lines * y.step;
    line.rows = rows[0], line.next_rows = rows[1];
    line.to_line_stride = down ? -result.line_stride : result.line_stride;
    for (; position + square_lines <= end; position += square_lines) {
      const int64_t from = down ? position + square_lines - 1 : position, first = y.source(from, 0);
      for (int64_t row = 0; row < rows_read; ++row) rows[0][row] = table.line(first + row * y.tap_offset);
      for (int64_t row = 0; row < new_rows; ++row)
        rows[1][row] = table.line(first + (down ? row + 1 : row + rows_read));
      line.to = result.at(from, first_pixel);
      square(line);
      for (int64_t i = position; i < position + square_lines; ++i) after_line(i);
    }
  }
  const auto find_rows = [&](int64_t i) {
    for (int64_t row = 0; row < line.row_count; ++row)
      rows[i % 2][row] = table.line(y.source(i, row / rows_per_line)) + row % rows_per_line * columns.tap_step;
  };
  line.row_count = y.taps * rows_per_line;
  find_rows(position);
  for (int64_t i = position; i < end; ++i) {
    find_rows(i + 1);  // beyond the table: a line of zeros
    line.rows = rows[i % 2], line.next_rows = rows[(i + 1) % 2];
    line.to = result.at(i, first_pixel);
    kernel.run(line);
    after_line(i);
  }
}

// The same for all phases together; result: the first phase's.
template <class S, class AfterLine>
void depthwise_phases_lines(const Conv2dShape& s, const PixelTable<S>& table, const Axis& y, int64_t position, int64_t lines,
                            DepthwiseLine<S> line, const PixelLines<S>& result, AfterLine&& after_line) {
  const auto run = depthwise_phases_kernel<S>(s);
  const S* const* rows[block_depth];
  const S* const* next_rows[1];
  line.rows = rows, line.next_rows = next_rows;
  line.to_stride = -result.pixel_stride / 2, line.to_line_stride = result.line_stride / 2;
  line.last_column = s.in_width % 2 == 0;
  for (int64_t i = position; i < position + lines; ++i) {
    for (int64_t row = 0; row < y.taps; ++row) rows[row] = table.line(y.source(i, row));
    next_rows[0] = table.line(y.source(i + 1, 0));
    line.phase_lines = min<int64_t>(2, s.in_height - 2 * i);
    line.to = result.at(i, line.pixels - 1);
    run(line);
    after_line(i);
  }
}

// One phase of a band.
template <class S>
struct DepthwisePhase {
  Phase<S> phase;
  int64_t lines;  // of positions
  Range source;   // lines

  DepthwisePhase(const Correlation<S>& c, int64_t index, int64_t position, int64_t band)
      : phase(depthwise_phase(c, index)),
        lines(max<int64_t>(0, min(band, phase.patches.y.positions - position))),
        source(source_lines(phase.patches.y, position, lines)) {}
};

// A band of one sample, channels [first, last), read and written in place.
template <class S>
void depthwise_in_place(const Correlation<S>& c, const DepthwisePlan& p, int64_t sample, int64_t position, int64_t first,
                        int64_t last, const Compute<S>* weights, int64_t padded, const Compute<S>* bias, const S* zeros) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const bool clamps = epilogue_clamps(c);
  const int64_t* stride = c.source_stride;
  const PixelLines<const S> source = {c.source + sample * stride[0], 0, stride[2], stride[3]};
  const S** pixels = scratch<const S*>(ScratchUse::worker, (p.source_lines + 1) * p.columns);
  const bool joined = joins_phases(c);
  for (int64_t index = 0; index < depthwise_phase_count(c); ++index) {
    const DepthwisePhase<S> d(c, index, position, p.band);
    const Phase<S>& phase = d.phase;
    const Columns columns(phase.patches.x);
    PixelTable<S> table = {pixels, d.source.begin, d.source.end - d.source.begin, columns.count};
    table.fill(columns, source, zeros);
    const PixelLines<S> result = {phase.result + sample * phase.result_batch_stride, 0, phase.result_y_stride,
                                  phase.result_x_stride};
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = last - begin < p.block + L ? last : begin + p.block;
      const DepthwiseLine<S> line = {begin, end, nullptr, 0, phase.patches.x.positions, phase.patches.x.step, nullptr,
                                     weights + phase.taps_before * padded, padded, bias,
                                     clamps ? bounds_of(c) : Bounds<T>{}, image_bytes<S>(c.shape) >= ahead_bytes()};
      const auto finish = [&](int64_t i) {
        if (clamps) return;
        const int64_t lines = joined ? min<int64_t>(2, c.shape.in_height - 2 * i) : 1, step = joined ? 2 : 1;
        const int64_t width = joined ? c.shape.in_width : phase.patches.x.positions;
        finish_with_epilogue(c, Block<S>{result.at(i, 0) + begin, 1, result.line_stride / step, result.pixel_stride / step},
                             end - begin, lines, width);
      };
      if (joined)
        depthwise_phases_lines(c.shape, table, phase.patches.y, position, d.lines, line, result, finish);
      else
        depthwise_lines(table, phase.patches.y, phase.patches.x, position, d.lines, line, result, finish);
    }
  }
}

// The same through copies of `lanes` channels at a time: lines [y][x][channel] in the compute type.
template <class S>
void depthwise_transposed(const Correlation<S>& c, const DepthwisePlan& p, int64_t sample, int64_t position, int64_t first,
                          int64_t last, const Compute<S>* weights, int64_t padded, const Compute<S>* bias,
                          const Compute<S>* zeros) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const bool clamps = epilogue_clamps(c);
  const Conv2dShape& s = c.shape;
  const int64_t width = c.input_grad ? s.out_width : s.in_width, result_width = c.input_grad ? s.in_width : s.out_width;
  const int64_t result_height = c.input_grad ? s.in_height : s.out_height;
  const int64_t step_y = c.input_grad ? s.stride_h : 1, step_x = c.input_grad ? s.stride_w : 1;  // from result to result
  const int64_t first_line = position * step_y, result_lines = min(p.band * step_y, result_height - first_line);
  const int64_t phases = depthwise_phase_count(c), table_size = (p.source_lines + 1) * p.columns;
  const int64_t *stride = c.source_stride, *result_stride = c.result_stride;
  T* source = scratch<T>(ScratchUse::worker, (p.source_lines * width + p.band * step_y * result_width) * L +
                                                 phases * table_size * ceil_div(sizeof(T*), sizeof(T)));
  T* result = source + p.source_lines * width * L;
  const T** pixels = reinterpret_cast<const T**>(result + p.band * step_y * result_width * L);

  Range lines = DepthwisePhase<S>(c, 0, position, p.band).source;
  for (int64_t index = 1; index < phases; ++index) {
    const Range more = DepthwisePhase<S>(c, index, position, p.band).source;
    if (more.begin == more.end) continue;
    lines = lines.begin == lines.end ? more : Range{min(lines.begin, more.begin), max(lines.end, more.end)};
  }
  const PixelLines<const T> copy = {source, lines.begin, width * L, L};
  const auto table = [&](const DepthwisePhase<S>& d, const Columns& columns, int64_t index) {
    return PixelTable<T>{pixels + index * table_size, d.source.begin, d.source.end - d.source.begin, columns.count};
  };
  for (int64_t index = 0; index < phases; ++index) {
    const DepthwisePhase<S> d(c, index, position, p.band);
    const Columns columns(d.phase.patches.x);
    table(d, columns, index).fill(columns, copy, zeros);
  }

  for (int64_t channel = first; channel < last; channel += L) {
    const int64_t channels = min(last - channel, L);
    copy_planes(Block<const S>{c.source + sample * stride[0] + channel * stride[1] + lines.begin * stride[2], stride[1],
                               stride[2], stride[3]},
                Block<T>{source, 1, width * L, L}, channels, lines.end - lines.begin, width);
    for (int64_t index = 0; index < phases; ++index) {
      const DepthwisePhase<S> d(c, index, position, p.band);
      const Axis &y = d.phase.patches.y, &x = d.phase.patches.x;
      T* first_result = result + (index / c.phases_x() * result_width + index % c.phases_x()) * L;
      const DepthwiseLine<T> line = {0, L, nullptr, 0, x.positions, x.step, nullptr,
                                     weights + d.phase.taps_before * padded + channel, padded,
                                     bias ? bias + channel : nullptr, clamps ? bounds_of(c) : Bounds<T>{}, false};
      const PixelLines<T> lines_of_phase = {first_result, position, step_y * result_width * L, step_x * L};
      const auto nothing = [](int64_t) {};
      if (joins_phases(c))
        depthwise_phases_lines(s, table(d, Columns(x), index), y, position, d.lines, line, lines_of_phase, nothing);
      else
        depthwise_lines(table(d, Columns(x), index), y, x, position, d.lines, line, lines_of_phase, nothing);
    }
    const Block<S> to = {c.result + sample * result_stride[0] + channel * result_stride[1] + first_line * result_stride[2],
                         result_stride[1], result_stride[2], result_stride[3]};
    if (clamps)
      copy_planes(Block<const T>{result, 1, result_width * L, L}, to, channels, result_lines, result_width);
    else
      store_results(c, Block<T>{result, 1, result_width * L, L}, to, channels, result_lines, result_width);
  }
}

template <class S, class Problem>
void correlate_depthwise(const Problem& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const Correlation<S> c = correlation<S>(problem);
  if (c.batch * c.groups == 0 || make_phase(c, 0, 0).pixels(c.batch) == 0) return;
  const DepthwisePlan p = depthwise_plan(c, pool.threads);
  const int64_t kernel = c.shape.kernel_height * c.shape.kernel_width, padded = round_up(c.groups, L);
  T* weights = scratch<T>(ScratchUse::caller, (kernel + 2) * padded);
  T* bias = weights + kernel * padded;
  const S* zeros = reinterpret_cast<S*>(bias + padded);  // a pixel of padding
  pack_depthwise_weights(c, padded, weights);
  zero_matrix(Matrix<T>{bias, padded, 1}, 2, padded);
  if (c.bias) copy_contiguous(c.bias, bias, c.groups);

  parallel_for(pool, c.batch * p.bands * p.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i % p.chunks, first = chunk * p.chunk;
      const int64_t last = chunk + 1 == p.chunks ? c.groups : first + p.chunk;
      const int64_t position = i / p.chunks % p.bands * p.band, sample = i / p.chunks / p.bands;
      if (p.in_place)
        depthwise_in_place(c, p, sample, position, first, last, weights, padded, c.bias ? bias : nullptr, zeros);
      else
        depthwise_transposed(c, p, sample, position, first, last, weights, padded, c.bias ? bias : nullptr,
                             reinterpret_cast<const T*>(zeros));
    }
  });
}

}  // namespace
}  // namespace cvfast
