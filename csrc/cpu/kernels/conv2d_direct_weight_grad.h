// The gradient to the weights for few channels per group: the input is read in place, from a padded copy with neighbouring
// channels in the compute type. There, what the taps of one kernel line see, all (tap x, channel), lies side by side:
// that is one operand of the matrix product, the output's gradient is the other, and no patch is gathered. The chain of
// operations per element is that of the implicit GEMM.
#pragma once
#include "conv2d_direct.h"

namespace cvfast {
namespace {

// Lines of the output's gradient whose input, padded, is copied at a time, and sizes in elements.
struct WeightGradBand {
  int64_t lines, input_lines;
  int64_t pixel_stride, line_stride;  // of the copy
  int64_t window;                     // what the taps of a kernel line see: (tap x, channel)
  bool channels_are_cols;             // output channels are the columns of a product and the window its rows, or vice versa
  int64_t packed_channels;            // of the output, rounded up to whole vectors if they are the columns
  int64_t channel_stride, line_sums, window_stride;  // of the sums [out channel, kernel line, window]
};

constexpr int64_t weight_grad_image_bytes = 64 << 10;
// Elements of a group's sums: they are passed over for each chain, and pay longer where few products share a gathered patch.
constexpr int64_t weight_grad_sums_limit = 64 << 10, line_kernel_sums_limit = 256 << 10;

template <class S>
WeightGradBand weight_grad_band(const WeightGrad<S>& w) {
  using T = Compute<S>;
  const Axis &y = w.input.y, &x = w.input.x;
  WeightGradBand b;
  b.pixel_stride = w.input.channels;
  b.window = x.taps * w.input.channels;
  const int64_t padded_window = round_up(b.window, lanes<T>), padded_channels = round_up(w.cols, lanes<T>);
  // Whichever wastes fewer lanes.
  b.channels_are_cols = w.cols > lanes<T> && padded_channels * b.window < w.cols * padded_window;
  b.packed_channels = b.channels_are_cols ? padded_channels : w.cols;
  b.window_stride = b.channels_are_cols ? padded_channels : 1;
  b.line_sums = b.channels_are_cols ? b.window * padded_channels : padded_window;
  b.channel_stride = b.channels_are_cols ? 1 : y.taps * padded_window;
  b.line_stride = ((x.positions - 1) * x.step + x.taps) * b.pixel_stride;
  const int64_t span = (y.taps - 1) * y.tap_offset + 1;
  const int64_t most = weight_grad_image_bytes / (b.line_stride * static_cast<int64_t>(sizeof(T)));
  b.lines = even_block(y.positions, max<int64_t>(1, (most - span) / y.step + 1), 1);
  b.input_lines = (b.lines - 1) * y.step + span;
  return b;
}

// Copies the input of lines [line, line + lines) of sample n and one group's channels to [input line, x, channel], which
// is zero where the source has no column.
template <class S>
void copy_input(const WeightGrad<S>& w, const WeightGradBand& b, int64_t group, int64_t n, int64_t line, int64_t lines,
                Compute<S>* image) {
  using T = Compute<S>;
  const Patches<S>& in = w.input;
  const int64_t first_y = line * in.y.step + in.y.offset, first_x = in.x.offset;
  const int64_t count_y = (lines - 1) * in.y.step + (in.y.taps - 1) * in.y.tap_offset + 1;
  const int64_t count_x = b.line_stride / b.pixel_stride;
  const int64_t begin_y = min(max<int64_t>(-first_y, 0), count_y), end_y = max(min(in.y.inputs - first_y, count_y), begin_y);
  const int64_t begin_x = min(max<int64_t>(-first_x, 0), count_x), end_x = max(min(in.x.inputs - first_x, count_x), begin_x);
  const int64_t columns = (end_x - begin_x) * b.pixel_stride;
  T* to = image + begin_x * b.pixel_stride;
  zero_matrix(Matrix<T>{to, b.line_stride, 1}, begin_y, columns);
  zero_matrix(Matrix<T>{to + end_y * b.line_stride, b.line_stride, 1}, count_y - end_y, columns);
  if (begin_y == end_y || begin_x == end_x) return;
  const S* from = in.data + n * in.batch_stride + group * in.channels * in.channel_stride + (first_y + begin_y) * in.y_stride +
                  (first_x + begin_x) * in.x_stride;
  copy_planes(Block<const S>{from, in.channel_stride, in.y_stride, in.x_stride},
              Block<T>{to + begin_y * b.line_stride, 1, b.line_stride, b.pixel_stride}, in.channels, end_y - begin_y,
              end_x - begin_x);
}

// Output channels of the product's tile that begins with channel k.
template <class T>
int64_t weight_grad_tile_channels(const WeightGradBand& b, int64_t k) {
  return min<int64_t>(b.channels_are_cols ? tile_cols<T> : tile_rows, b.packed_channels - k);
}

// Copies a band of one group of the output's gradient: tiles of channels, each [pixel, channels].
template <class S>
void copy_grad_output(const WeightGrad<S>& w, const WeightGradBand& b, int64_t group, int64_t n, int64_t line, int64_t lines,
                      Compute<S>* to) {
  using T = Compute<S>;
  const Patches<S>& g = w.grad_output;
  const int64_t line_pixels = g.x.positions;
  for (int64_t k = 0, width; k < b.packed_channels; k += width, to += width * lines * line_pixels) {
    width = weight_grad_tile_channels<T>(b, k);
    const int64_t channels = min(width, w.cols - k);
    const S* from = g.data + n * g.batch_stride + (group * w.cols + k) * g.channel_stride + line * g.y_stride;
    copy_planes(Block<const S>{from, g.channel_stride, g.y_stride, g.x_stride},
                Block<T>{to, 1, line_pixels * width, width}, channels, lines, line_pixels);
    if (channels < width) zero_matrix(Matrix<T>{to + channels, width, 1}, lines * line_pixels, width - channels);
  }
}

// Sums of one piece of work, strides in WeightGradBand: the chain over at most block_depth pixels that is under
// way, and the chains before it.
template <class T>
struct ChainedSums {
  T *chain, *sum;
  int64_t elements;
  int64_t length = 0;  // pixels in the chain

  void close() {
    for (int64_t i = 0; i < elements; ++i) sum[i] += chain[i];
    length = 0;
  }
};

// Adds `pixels` pixels of a band of `band_pixels`, beginning with `first`, to the chains.
template <class S>
void add_pixels(const WeightGrad<S>& w, const WeightGradBand& b, const Compute<S>* image, const Compute<S>* grads,
                int64_t band_pixels, const int64_t* offset, int64_t first, int64_t pixels, ChainedSums<Compute<S>>& sums) {
  using T = Compute<S>;
  const Chain chain = sums.length == 0 ? Chain::start : Chain::resume;
  for (int64_t k = 0, width; k < b.packed_channels; k += width) {
    width = weight_grad_tile_channels<T>(b, k);
    const T* grad = grads + k * band_pixels + first * width;
    for (int64_t r = 0; r < w.input.y.taps; ++r) {
      const IndirectRows<T> windows = {image + r * w.input.y.tap_offset * b.line_stride, offset + first};
      T* to = sums.chain + k * b.channel_stride + r * b.line_sums;
      if (b.channels_are_cols)
        indirect_a_product(b.window, width, pixels, windows, 1, grad, to, b.window_stride, chain);
      else
        indirect_product(width, b.window, pixels, grad, windows, to, b.channel_stride, chain);
    }
  }
  sums.length += pixels;
  if (sums.length == block_depth) sums.close();
}

inline bool direct_applies(const Conv2dWeightGrad& p) {
  const Conv2dShape s = along_lines(p.shape);
  const int64_t sums = s.in_channels / s.groups * s.out_channels / s.groups * s.kernel_height * s.kernel_width;
  const bool line_kernel = s.kernel_height == 1 || s.kernel_width == 1;
  return direct_fits(s, s.in_channels / s.groups, s.in_width) && s.dilation_w == 1 &&
         sums <= (line_kernel ? line_kernel_sums_limit : weight_grad_sums_limit);
}

template <class S>
void weight_grad_direct(const Conv2dWeightGrad& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  const WeightGrad<S> w = weight_grad<S>(along_lines(problem));
  if (w.groups * w.rows * w.cols == 0) return;
  const Slices<S> slices(w);
  const WeightGradBand b = weight_grad_band(w);
  const int64_t line_pixels = w.grad_output.x.positions, sample_lines = w.grad_output.y.positions;
  const int64_t band_pixels = b.lines * line_pixels;
  const int64_t image_elements = b.input_lines * b.line_stride + lanes<T>;
  const int64_t sums_elements = w.input.y.taps * b.line_sums * (b.channels_are_cols ? 1 : w.cols);
  const int64_t grad_elements = b.packed_channels * band_pixels;
  parallel_for(pool, slices.count * w.groups, [&](int64_t begin, int64_t end) {
    T* image = scratch<T>(ScratchUse::worker, image_elements + grad_elements + 2 * sums_elements +
                                                  band_pixels * ceil_div(8, sizeof(T)) + 16);
    int64_t* offset = reinterpret_cast<int64_t*>(image);
    image += band_pixels * ceil_div(8, sizeof(T));
    T* grads = image + image_elements;
    ChainedSums<T> sums = {grads + grad_elements, grads + grad_elements + sums_elements, sums_elements};
    zero_matrix(Matrix<T>{image, 0, 1}, 1, image_elements);
    for (int64_t i = 0; i < band_pixels; ++i)
      offset[i] = i / line_pixels * w.input.y.step * b.line_stride + i % line_pixels * w.input.x.step * b.pixel_stride;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i % w.groups, slice = i / w.groups;
      const int64_t last = min((slice + 1) * slices.pixels, w.pixels);
      zero_matrix(Matrix<T>{sums.sum, 0, 1}, 1, sums.elements);
      for (int64_t pixel = slice * slices.pixels; pixel < last;) {
        // The rest of the band that the pixel lies in.
        const int64_t n = pixel / (sample_lines * line_pixels), in_sample = pixel % (sample_lines * line_pixels);
        const int64_t line = in_sample / line_pixels / b.lines * b.lines, lines = min(b.lines, sample_lines - line);
        copy_input(w, b, group, n, line, lines, image);
        copy_grad_output(w, b, group, n, line, lines, grads);
        int64_t first = in_sample - line * line_pixels;
        const int64_t stop = min(lines * line_pixels, first + last - pixel);
        pixel += stop - first;
        while (first < stop) {
          const int64_t pixels = min(stop - first, block_depth - sums.length);
          add_pixels(w, b, image, grads, lines * line_pixels, offset, first, pixels, sums);
          first += pixels;
        }
      }
      if (sums.length > 0) sums.close();
      for (int64_t r = 0; r < w.input.y.taps; ++r)
        store_slice(w, slices, slice, group, r * b.window, b.window, 0, w.cols,
                    Matrix<const T>{sums.sum + r * b.line_sums, b.window_stride, b.channel_stride});
    }
  });
  sum_slices(w, slices, pool);
}

}  // namespace
}  // namespace cvfast
