// Convolution with few channels per group: the patches are read in place from a copy of the image in the compute type, with
// zeros for padding. A tap is an offset into the copy; no patch is gathered.
//
// Where pixels fill the vectors, the copy has a plane for each remainder of a coordinate modulo the stride, so that the pixels
// that one tap sees for consecutive results are neighbours, from one line to the next too. Where output channels fill
// them, the copy is laid out as the image is.
// An element's chain of operations is that of the implicit GEMM, so its bits are, too.
#pragma once
#include "conv2d_implicit_gemm.h"
#include "conv2d_plane.h"
#include "gemm_indirect.h"
#include "transpose.h"

namespace cvfast {
namespace {

// A kernel of one column over images of one column moves along lines instead: the order of the taps and of the pixels is the
// same, and what lies in the padding is left out for short runs of pixels. Not if a line would fill the cache.
constexpr int64_t column_limit = 32 << 10;  // elements of a sample
inline bool is_column(const Conv2dShape& s) {
  const int64_t padded = s.in_height + 2 * s.dilation_h * (s.kernel_height - 1);
  return s.kernel_width == 1 && s.in_width == 1 && s.out_width == 1 && s.kernel_height > 1 &&
         max(s.in_channels, s.out_channels) / s.groups * padded <= column_limit;
}
inline void exchange(int64_t& a, int64_t& b) {
  const int64_t other = a;
  a = b, b = other;
}
inline Conv2dShape along_lines(Conv2dShape s) {
  if (!is_column(s)) return s;
  exchange(s.in_height, s.in_width), exchange(s.out_height, s.out_width), exchange(s.kernel_height, s.kernel_width);
  exchange(s.stride_h, s.stride_w), exchange(s.padding_h, s.padding_w), exchange(s.dilation_h, s.dilation_w);
  return s;
}
template <class... Tensor>
void exchange_axes(Tensor&... t) { (exchange(t.stride[2], t.stride[3]), ...); }
inline Conv2dForward along_lines(Conv2dForward p) {
  if (is_column(p.shape)) exchange_axes(p.input, p.weight, p.output);
  p.shape = along_lines(p.shape);
  return p;
}
inline Conv2dInputGrad along_lines(Conv2dInputGrad p) {
  if (is_column(p.shape)) exchange_axes(p.grad_output, p.weight, p.grad_input);
  p.shape = along_lines(p.shape);
  return p;
}
inline Conv2dWeightGrad along_lines(Conv2dWeightGrad p) {
  if (is_column(p.shape)) exchange_axes(p.grad_output, p.input, p.grad_weight);
  p.shape = along_lines(p.shape);
  return p;
}

// What positions 0 .. positions - 1 of one axis read of the source, over all phases: i * step + [first, last]. The copy
// has `planes()` planes, each with every plane_step-th element: plane_step is 1 or `step`.
struct Window {
  int64_t positions, inputs, step, plane_step, first, last;

  int64_t planes() const { return min(plane_step, last - first + 1); }
  int64_t stride() const { return step / plane_step; }  // of neighbouring positions, within a plane
  int64_t reach() const { return (last - first) / plane_step; }
  int64_t length(int64_t count) const { return (count - 1) * stride() + 1 + reach(); }  // of a plane, for `count` positions
  // The most positions whose planes are no longer than `length`; at least 1.
  int64_t most_positions(int64_t length) const { return max<int64_t>(0, length - 1 - reach()) / stride() + 1; }

  // Elements of `plane` before the source's first one, and the number of those inside it.
  Range inside(int64_t plane, int64_t from, int64_t length) const {
    const int64_t start = from * step + first + plane;
    const int64_t begin = start >= 0 ? 0 : ceil_div(-start, plane_step);
    const int64_t end = start >= inputs ? 0 : ceil_div(inputs - start, plane_step);
    return {min(begin, length), min(max(begin, end), length)};
  }
};

inline void extend(Window& window, const Axis& axis) {
  if (axis.taps == 0) return;
  const int64_t other = axis.offset + (axis.taps - 1) * axis.tap_offset;
  window.positions = max(window.positions, axis.positions);
  window.first = min(window.first, min(axis.offset, other));
  window.last = max(window.last, max(axis.offset, other));
}

constexpr int64_t no_offset = int64_t{1} << 40;

// A piece of work: `band` lines of positions of one sample, for `group_block` groups.
struct DirectPlan {
  Window y, x;
  int64_t group_block, group_blocks, band, bands;
  // The copy, in elements: from a pixel, line, plane or channel to the next one; all. The pixel is 1, or the channel is.
  int64_t pixel_size, pitch, plane_size, channel_size, image_elements;
  int64_t shared;                           // zeros at the end of a line that are those at the start of the next one
  bool channels_are_cols;                   // of a product; else its rows, and the pixels its columns
  int64_t packed_channels;                  // of a group, rounded up to whole vectors if they are the columns
  int64_t result_stride, result_elements;   // of a band: pixels of a channel as rows, all

  // From one position to the next, in the copy.
  int64_t line_step() const { return y.stride() * pitch; }
  int64_t pixel_step() const { return x.stride() * pixel_size; }
};

constexpr int64_t direct_image_bytes = 96 << 10;  // of a piece's copy: well inside the L2 cache
constexpr int64_t direct_image_limit = 64 << 10;  // elements of a copy for one line of results, where it is larger

template <class S>
DirectPlan direct_plan(const Correlation<S>& c, int64_t threads) {
  using T = Compute<S>;
  DirectPlan p;
  const Conv2dShape& s = c.shape;
  const Phase<S> phase = make_phase(c, 0, 0, false);
  const Axis &y = phase.patches.y, &x = phase.patches.x;
  p.y = {y.positions, y.inputs, y.step, y.step, no_offset, -no_offset};
  p.x = {x.positions, x.inputs, x.step, x.step, no_offset, -no_offset};
  for (int64_t i = 0; i < c.phases_y(); ++i) extend(p.y, make_phase(c, i, 0, false).patches.y);
  for (int64_t i = 0; i < c.phases_x(); ++i) extend(p.x, make_phase(c, 0, i, false).patches.x);

  int64_t length = p.x.length(p.x.positions);
  p.shared = length - p.x.positions;  // at most: the results of two lines stay apart, too
  for (int64_t plane = 0; plane < p.x.planes(); ++plane) {
    const Range inside = p.x.inside(plane, 0, length);
    p.shared = min(p.shared, min(inside.begin, length - inside.end));
  }
  // Whichever wastes fewer lanes. A single vector of channels must save a fifth: each pixel is then loaded for one product.
  const int64_t padded_channels = round_up(c.out_channels, lanes<T>), least_saving = padded_channels == lanes<T> ? 5 : 4;
  p.channels_are_cols = c.out_channels >= lanes<T> && least_saving * p.x.positions * padded_channels <=
                                                          4 * (length - p.shared) * c.out_channels;
  p.packed_channels = p.channels_are_cols ? padded_channels : c.out_channels;
  if (p.channels_are_cols) {
    p.y.plane_step = p.x.plane_step = 1;
    length = p.x.length(p.x.positions);
    p.shared = 0;
  }

  // Whole cache lines of channels where channels are neighbours.
  const bool channels_neighbour = c.source_stride[1] == 1 || c.result_stride[1] == 1;
  p.group_block = channels_neighbour ? min(c.groups, ceil_div(16, c.in_channels)) : 1;
  p.group_blocks = ceil_div(c.groups, p.group_block);
  const int64_t channels = p.group_block * c.in_channels;
  p.pixel_size = p.channels_are_cols && c.source_stride[1] == 1 ? channels : 1;
  p.pitch = (length - p.shared) * p.pixel_size;
  const int64_t line_elements = p.y.planes() * p.x.planes() * p.pitch * (channels / p.pixel_size);
  const int64_t most = p.y.most_positions(direct_image_bytes / (line_elements * static_cast<int64_t>(sizeof(T))));
  const int64_t wanted = ceil_div(2 * threads, max<int64_t>(1, s.batch * p.group_blocks));
  p.band = even_block(p.y.positions, threads > 1 ? min(most, ceil_div(p.y.positions, wanted)) : most, c.pools() ? 2 : 1);
  p.bands = ceil_div(p.y.positions, p.band);
  p.image_elements = p.y.length(p.band) * line_elements;
  p.plane_size = p.y.length(p.band) * p.pitch;
  p.channel_size = p.pixel_size > 1 ? 1 : p.y.planes() * p.x.planes() * p.plane_size;
  p.result_stride = round_up(p.band * p.pitch, lanes<T>) + lanes<T>;  // a line's last vector may reach beyond it
  p.result_elements = p.group_block * p.packed_channels *
                      (p.channels_are_cols ? p.band * p.x.positions : p.result_stride);
  return p;
}

// Copies lines for positions [position, position + count) of `channels` channels, whose first one is at `source`, into
// `image`, which is zero where the source has no column.
template <class S>
void copy_image(const DirectPlan& p, const Correlation<S>& c, const S* source, int64_t channels, int64_t position,
                int64_t count, Compute<S>* image) {
  using T = Compute<S>;
  const int64_t lines = p.y.length(count), *stride = c.source_stride;
  for (int64_t plane_y = 0; plane_y < p.y.planes(); ++plane_y) {
    const Range y = p.y.inside(plane_y, position, lines);
    for (int64_t plane_x = 0; plane_x < p.x.planes(); ++plane_x) {
      const Range x = p.x.inside(plane_x, 0, p.pitch / p.pixel_size);
      if (x.begin == x.end) continue;
      T* plane = image + (plane_y * p.x.planes() + plane_x) * p.plane_size + x.begin * p.pixel_size;
      const S* from = source + (position * p.y.step + y.begin * p.y.plane_step + p.y.first + plane_y) * stride[2] +
                      (x.begin * p.x.plane_step + p.x.first + plane_x) * stride[3];
      copy_planes(Block<const S>{from, stride[1], p.y.plane_step * stride[2], p.x.plane_step * stride[3]},
                  Block<T>{plane + y.begin * p.pitch, p.channel_size, p.pitch, p.pixel_size}, channels, y.end - y.begin,
                  x.end - x.begin);
      const int64_t width = (x.end - x.begin) * p.pixel_size;
      for (int64_t channel = 0; channel < channels; channel += p.pixel_size) {
        T* to = plane + channel * p.channel_size;
        zero_matrix(Matrix<T>{to, p.pitch, 1}, y.begin, width);
        zero_matrix(Matrix<T>{to + y.end * p.pitch, p.pitch, 1}, lines - y.end, width);
      }
    }
  }
}

// Where tap (y, x), channel c of a phase lies in the copy, relative to the position: offset[(tap y, tap x, c)].
template <class S>
void tap_offsets(const DirectPlan& p, const Patches<S>& patches, int64_t* offset) {
  for (int64_t tap_y = 0; tap_y < patches.y.taps; ++tap_y)
    for (int64_t tap_x = 0; tap_x < patches.x.taps; ++tap_x) {
      const int64_t y = patches.y.source(0, tap_y) - p.y.first, x = patches.x.source(0, tap_x) - p.x.first;
      const int64_t plane = y % p.y.plane_step * p.x.planes() + x % p.x.plane_step;
      const int64_t first = plane * p.plane_size + y / p.y.plane_step * p.pitch + x / p.x.plane_step * p.pixel_size;
      for (int64_t channel = 0; channel < patches.channels; ++channel) *offset++ = first + channel * p.channel_size;
    }
}

// Channels of the product's tile that begins with channel `out`; as rows they are cut evenly.
template <class T>
int64_t direct_tile_channels(const DirectPlan& p, int64_t out) {
  const int64_t left = p.packed_channels - out;
  return p.channels_are_cols ? min<int64_t>(tile_cols<T>, left) : ceil_div(left, ceil_div(left, tile_rows));
}

// to[tap, in, i] = from[i][in * taps + tap] for i < channels; rows of `from` are from_stride apart.
template <class S>
void transpose_weights(const S* from, int64_t from_stride, int64_t channels, int64_t inputs, int64_t taps, Compute<S>* to) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  for (int64_t i = 0; i < channels; i += L)
    for (int64_t col = 0; col < inputs * taps; col += L) {
      const int64_t first = min(i, channels - L), j = min(col, inputs * taps - L);
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) square[k] = load_vector(from + (first + k) * from_stride + j);
      transpose_square<T>(square);
      int64_t in = j / taps, tap = j - in * taps;
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) {
        store_as(to + (tap * inputs + in) * channels + first, square[k]);
        if (++tap == taps) tap = 0, ++in;
      }
    }
}

// The weights of one phase and group: tiles of output channels, each [depth, channels].
template <class S>
void pack_direct_weights(const DirectPlan& p, const Correlation<S>& c, const Patches<S>& patches, int64_t group,
                         Compute<S>* to) {
  using T = Compute<S>;
  constexpr int64_t L = lanes<T>;
  const int64_t inputs = c.in_channels, taps = patches.y.taps * patches.x.taps, depth = taps * inputs;
  const bool contiguous = taps == c.shape.kernel_height * c.shape.kernel_width && c.weight_x_stride == 1 &&
                          c.weight_y_stride == c.shape.kernel_width && c.weight_in_stride == taps;
  for (int64_t out = 0, width; out < p.packed_channels; out += width, to += depth * width) {
    width = direct_tile_channels<T>(p, out);
    const int64_t channels = min(width, c.out_channels - out);
    const bool squares = channels == width && width >= L;
    const S* weights = c.weight + group * c.weight_group_stride + out * c.weight_out_stride;
    if (channels < width) zero_matrix(Matrix<T>{to + channels, width, 1}, depth, width - channels);
    if (squares && contiguous && depth >= L) {
      transpose_weights(weights, c.weight_out_stride, width, inputs, taps, to);
      continue;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const S* source = weights + (patches.y.first_tap + tap / patches.x.taps * patches.y.tap_step) * c.weight_y_stride +
                        (patches.x.first_tap + tap % patches.x.taps * patches.x.tap_step) * c.weight_x_stride;
      T* target = to + tap * inputs * width;
      if (squares && c.weight_in_stride == 1 && inputs >= L)
        transpose_weights(source, c.weight_out_stride, width, inputs, 1, target);
      else
        copy_matrix(Matrix<const S>{source, c.weight_in_stride, c.weight_out_stride}, Matrix<T>{target, width, 1}, inputs,
                    channels);
    }
  }
}

// Of the gradient to the input: the taps of an axis that meet the source for one of the positions [position, position + count).
inline Range meeting_taps(const Axis& a, int64_t position, int64_t count) {
  const int64_t last = position + count - 1 + a.offset, beyond = position + a.offset - (a.inputs - 1);
  const int64_t begin = beyond <= 0 ? 0 : min(ceil_div(beyond, -a.tap_offset), a.taps);
  return {begin, last < 0 ? begin : max(begin, min(last / -a.tap_offset + 1, a.taps))};
}

// More than an eighth of the taps lie in the padding, and can be left out by lines that fill vectors or by runs of pixels.
inline bool misses_much(const Axis& y, const Axis& x) {
  const auto misses = [](const Axis& a) {
    int64_t inside = 0;
    for (int64_t tap = 0; tap < a.taps; ++tap) inside += a.inside(tap).end - a.inside(tap).begin;
    return 8 * inside < 7 * a.positions * a.taps;
  };
  return (x.positions >= 8 && misses(y)) || (y.taps == 1 && misses(x));
}

// One phase of one group in a band: lines x pixels results of each output channel.
template <class T>
struct DirectProduct {
  int64_t depth, lines, pixels;
  const T *weights, *image;
  const int64_t* offset;
  const T* bias;  // [packed_channels] or nullptr
  Bounds<T> bounds;  // of the results, where channels are columns
  Block<T> result;
  bool in_place;  // the result is the caller's: just its elements may be written

  // One line's pixels [first, first + count).
  DirectProduct part(const DirectPlan& p, int64_t line, int64_t first, int64_t count) const {
    DirectProduct d = *this;
    d.lines = 1, d.pixels = count;
    d.image += line * p.line_step() + first * p.pixel_step();
    d.result.data += line * result.line_stride + first * result.pixel_stride;
    return d;
  }
};

// Output channels [out, out + channels) over the depth [start, end).
template <class T>
void direct_tiles(const DirectPlan& p, const DirectProduct<T>& d, int64_t out, int64_t channels, int64_t start, int64_t end,
                  Chain chain, const T* bias, Bounds<T> bounds) {
  const T* weights = d.weights + out * d.depth + start * channels;
  const int64_t depth = end - start;
  const Block<T>& result = d.result;
  T* to = result.data + out * result.channel_stride;
  const auto pixels_at = [&](int64_t y) { return IndirectRows<T>{d.image + y * p.line_step(), d.offset + start}; };
  if (p.channels_are_cols && d.pixels == 1) {  // a column
    indirect_a_product(d.lines, channels, depth, pixels_at(0), p.line_step(), weights, to, result.line_stride, chain, bias,
                       bounds);
  } else if (p.channels_are_cols) {
    for (int64_t y = 0; y < d.lines; ++y)
      indirect_a_product(d.pixels, channels, depth, pixels_at(y), p.pixel_step(), weights, to + y * result.line_stride,
                         result.pixel_stride, chain, bias, bounds);
  } else if (d.in_place) {
    for (int64_t y = 0; y < d.lines; ++y)
      indirect_product(channels, d.pixels, depth, weights, pixels_at(y), to + y * result.line_stride,
                       result.channel_stride, chain, bias, true);
  } else {
    indirect_product(channels, (d.lines - 1) * p.pitch + d.pixels, depth, weights, pixels_at(0), to,
                     result.channel_stride, chain, bias);
  }
}

// Over the depth `used`; the chains begin at multiples of block_depth.
template <class T>
void direct_product(const DirectPlan& p, const DirectProduct<T>& d, Range used) {
  for (int64_t out = 0, channels; out < p.packed_channels; out += channels) {
    channels = direct_tile_channels<T>(p, out);
    Chain chain = Chain::start;
    for (int64_t start = used.begin, end; chain == Chain::start || start < used.end; start = end, chain = Chain::add) {
      end = min(used.end, (start / block_depth + 1) * block_depth);
      const bool last = end == used.end;
      direct_tiles(p, d, out, channels, start, end, chain, last && d.bias ? d.bias + out : nullptr,
                   last ? d.bounds : Bounds<T>{});
    }
  }
}

// A line of results at a time, all channels of it: they lie side by side, and the weights stay in the L1 cache.
template <class T>
void direct_product_by_lines(const DirectPlan& p, const DirectProduct<T>& d) {
  for (int64_t line = 0; line < d.lines; ++line) direct_product(p, d.part(p, line, 0, d.pixels), Range{0, d.depth});
}

// The gradient to the input, without the taps that meet nothing but padding for a whole line or, where the kernel has one
// line, for a run of its pixels. `position`: of the band's first line.
template <class T>
void direct_product_inside(const DirectPlan& p, const DirectProduct<T>& d, const Axis& y, const Axis& x, int64_t position) {
  constexpr int64_t run = 64, shortest = 16;  // pixels
  const int64_t line_depth = d.depth / y.taps;
  for (int64_t line = 0; line < d.lines; ++line) {
    const Range taps_y = meeting_taps(y, position + line, 1);
    for (int64_t first = 0, count; first < d.pixels; first += count) {
      count = y.taps > 1 || d.pixels - first < run + shortest ? d.pixels - first : run;
      Range used = {taps_y.begin * line_depth, taps_y.end * line_depth};
      if (y.taps == 1 && taps_y.begin < taps_y.end) {
        const Range taps_x = meeting_taps(x, first, count);
        used = {taps_x.begin * (line_depth / x.taps), taps_x.end * (line_depth / x.taps)};
      }
      direct_product(p, d.part(p, line, first, count), used);
    }
  }
}

// Computes one channel in and one out with a square kernel, without stride and dilation; false if this is something else.
template <class T>
bool try_plane_product(const DirectPlan& p, const DirectProduct<T>& d, const Axis& y, const Axis& x) {
  const auto product = plane_product_for<T>(y.taps);
  const bool plain = d.depth == y.taps * x.taps && p.packed_channels == 1 && x.taps == y.taps && p.y.step == 1 &&
                     p.x.step == 1 && y.tap_offset == x.tap_offset && (x.tap_offset == 1 || x.tap_offset == -1);
  if (!product || !plain || d.lines < plane_lines || d.pixels < plane_vectors * lanes<T> || d.result.pixel_stride != 1)
    return false;
  product(PlaneProduct<T>{d.image + d.offset[0], p.pitch, y.tap_offset * p.pitch, x.tap_offset, d.weights, d.bias,
                          d.result.data, d.result.line_stride},
          d.lines, d.pixels);
  return true;
}

// Where the products put a band's results: in `to` if it takes them as they are, in the compute type and with fitting strides,
// else in `scratch`.
template <class S, class T>
Block<T> direct_results(const DirectPlan& p, const Phase<S>& phase, Block<S> to, int64_t out_channels, bool pools,
                        T* scratch) {
  const int64_t pixels = phase.patches.x.positions;
  if constexpr (__is_same(S, T)) {
    // A tile of one line's pixels needs enough chains side by side to hide the latency of a multiply-add.
    const bool full = min<int64_t>(out_channels, tile_rows) * ceil_div(pixels, lanes<T>) >= 6 && pixels >= lanes<T>;
    const bool fits = p.channels_are_cols ? to.channel_stride == 1 && p.packed_channels == out_channels
                                          : to.pixel_stride == 1 && full && phase.patches.columns() <= block_depth;
    if (fits && !pools) return to;
  }
  if (p.channels_are_cols) {
    const int64_t pixel_stride = p.group_block * p.packed_channels;
    return {scratch, 1, pixels * pixel_stride, pixel_stride};
  }
  return {scratch, p.result_stride, p.pitch, 1};
}

// With many channels on both sides the implicit GEMM packs patches once for many products. The copy of one line, of
// `channels` channels and `width` pixels, must fit the cache.
inline bool direct_fits(const Conv2dShape& s, int64_t channels, int64_t width) {
  const int64_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  const int64_t lines = s.dilation_h * (s.kernel_height - 1) + s.stride_h;
  const int64_t line = width + 2 * s.dilation_w * (s.kernel_width - 1);
  return s.kernel_height * s.kernel_width > 1 && s.out_height * s.out_width > 0 && min(in, out) > 0 &&
         min(in, out) <= 64 && max(in, out) <= 128 && channels * lines * line <= direct_image_limit;
}
inline bool direct_applies(const Conv2dForward& p) {
  const Conv2dShape s = along_lines(p.shape);
  return direct_fits(s, s.in_channels / s.groups, s.in_width);
}
inline bool direct_applies(const Conv2dInputGrad& p) {
  const Conv2dShape s = along_lines(p.shape);
  return direct_fits(s, s.out_channels / s.groups, s.out_width);
}

template <class S, class Problem>
void correlate_direct(const Problem& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  const Correlation<S> c = correlation<S>(along_lines(problem));
  if (c.batch == 0 || c.groups * c.out_channels == 0 || make_phase(c, 0, 0).pixels(c.batch) == 0) return;
  const DirectPlan p = direct_plan(c, pool.threads);
  const int64_t phases_x = c.phases_x(), phases = c.phases_y() * phases_x;
  const int64_t kernel_depth = c.shape.kernel_height * c.shape.kernel_width * c.in_channels;
  const int64_t all_channels = c.groups * p.packed_channels;

  int64_t* offsets = static_cast<int64_t*>(thread_scratch(
      ScratchUse::caller, kernel_depth * 8 + (kernel_depth + 1) * all_channels * static_cast<int64_t>(sizeof(T))));
  T* bias = reinterpret_cast<T*>(offsets + kernel_depth);
  T* packed = bias + all_channels;
  if (c.bias) {
    zero_matrix(Matrix<T>{bias, 0, 1}, 1, all_channels);
    copy_matrix(Matrix<const S>{c.bias, c.out_channels, 1}, Matrix<T>{bias, p.packed_channels, 1}, c.groups, c.out_channels);
  }
  for (int64_t index = 0; index < phases; ++index) {
    const Phase<S> phase = make_phase(c, index / phases_x, index % phases_x, false);
    tap_offsets(p, phase.patches, offsets + phase.taps_before * c.in_channels);
    T* weights = packed + phase.taps_before * c.in_channels * all_channels;
    for (int64_t group = 0; group < c.groups; ++group)
      pack_direct_weights(p, c, phase.patches, group, weights + group * phase.patches.columns() * p.packed_channels);
  }

  const int64_t image_elements = p.image_elements + p.shared + lanes<T>, beyond = c.pools() ? 2 * lanes<T> : 0;
  parallel_for(pool, c.batch * p.bands * p.group_blocks, [&](int64_t begin, int64_t end) {
    T* image = scratch<T>(ScratchUse::worker, image_elements + p.result_elements + beyond);
    T* result = image + image_elements;
    zero_matrix(Matrix<T>{image, 0, 1}, 1, image_elements);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_group = i % p.group_blocks * p.group_block;
      const int64_t groups = min(p.group_block, c.groups - first_group);
      const int64_t position = i / p.group_blocks % p.bands * p.band, sample = i / p.group_blocks / p.bands;
      copy_image(p, c, c.source + sample * c.source_stride[0] + first_group * c.in_channels * c.source_stride[1],
                 groups * c.in_channels, position, min(p.band, p.y.positions - position), image);
      for (int64_t index = 0; index < phases; ++index) {
        const Phase<S> phase = make_phase(c, index / phases_x, index % phases_x, false);
        const Axis &y = phase.patches.y, &x = phase.patches.x;
        const int64_t lines = min(p.band, y.positions - position), pixels = x.positions;
        if (lines <= 0) continue;
        const int64_t depth = phase.patches.columns();
        const T* weights = packed + phase.taps_before * c.in_channels * all_channels;
        const int64_t line = c.pools() ? position / 2 : position;  // of the result
        const Block<S> to = {phase.result + sample * phase.result_batch_stride + line * phase.result_y_stride +
                                 first_group * c.out_channels * phase.result_channel_stride,
                             phase.result_channel_stride, phase.result_y_stride, phase.result_x_stride};
        const Block<T> from = direct_results(p, phase, to, c.out_channels, c.pools(), result);
        const bool in_place = static_cast<void*>(from.data) == to.data;
        const bool bounded = in_place && p.channels_are_cols && epilogue_clamps(c);
        for (int64_t group = 0; group < groups; ++group) {
          Block<T> group_result = from;
          group_result.data += group * p.packed_channels * from.channel_stride;
          const DirectProduct<T> product = {depth, lines, pixels,
                                            weights + (first_group + group) * depth * p.packed_channels,
                                            image + group * c.in_channels * p.channel_size,
                                            offsets + phase.taps_before * c.in_channels,
                                            c.bias ? bias + (first_group + group) * p.packed_channels : nullptr,
                                            bounded ? bounds_of(c) : Bounds<T>{}, group_result, in_place};
          if (c.input_grad && depth > 0 && misses_much(y, x))
            direct_product_inside(p, product, y, x, position);
          else if (p.channels_are_cols && pixels > 1 && depth <= block_depth)
            direct_product_by_lines(p, product);
          else if (!try_plane_product(p, product, y, x))
            direct_product(p, product, Range{0, depth});
        }
        if (in_place) {
          if (!bounded) finish_with_epilogue(c, to, groups * c.out_channels, lines, pixels);
          continue;
        }
        const bool together = p.packed_channels == c.out_channels;  // the groups' channels are neighbours
        for (int64_t group = 0; group < (together ? 1 : groups); ++group)
          store_results(c,
                        Block<T>{from.data + group * p.packed_channels * from.channel_stride, from.channel_stride,
                                 from.line_stride, from.pixel_stride},
                        Block<S>{to.data + group * c.out_channels * to.channel_stride, to.channel_stride, to.line_stride,
                                 to.pixel_stride},
                        (together ? groups : 1) * c.out_channels, lines, pixels);
      }
    }
  });
}

}  // namespace
}  // namespace cvfast
