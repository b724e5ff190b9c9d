// Depthwise convolution (one channel in and one out per group) of channels_last tensors: vectors of channels, taps read
// in place. The chain of operations per element is that of the implicit GEMM, zeros for padding included, so the bits are too.
#pragma once
#include "conv2d_implicit_gemm.h"

namespace cvfast {
namespace {

inline bool is_depthwise(const Conv2dShape& s) {
  return s.in_channels == s.groups && s.out_channels == s.groups && s.kernel_height * s.kernel_width <= block_depth;
}
// Small images and strides, for which a copy of the image does not pay; the others are the direct algorithm's.
inline bool depthwise_in_place_pays(const Conv2dShape& s) { return s.out_width < 20 || s.stride_w > 1; }

inline bool depthwise_applies(const Conv2dForward& p) {
  return is_depthwise(p.shape) && depthwise_in_place_pays(p.shape) && p.input.stride[1] == 1 && p.output.stride[1] == 1;
}
inline bool depthwise_applies(const Conv2dInputGrad& p) {
  return is_depthwise(p.shape) && depthwise_in_place_pays(p.shape) && p.grad_output.stride[1] == 1 && p.grad_input.stride[1] == 1;
}
inline bool depthwise_applies(const Conv2dWeightGrad& p) {
  return is_depthwise(p.shape) && p.input.stride[1] == 1 && p.grad_output.stride[1] == 1;
}

// For each tap of pixel (n, y, x), where its channels begin: in the source, or in `zeros` if it lies in the padding.
template <class S>
void tap_sources(const Patches<S>& patches, int64_t n, int64_t y, int64_t x, const S* zeros, const S** sources) {
  for (int64_t tap_y = 0; tap_y < patches.y.taps; ++tap_y) {
    const int64_t source_y = patches.y.source(y, tap_y);
    const bool y_inside = source_y >= 0 && source_y < patches.y.inputs;
    for (int64_t tap_x = 0; tap_x < patches.x.taps; ++tap_x) {
      const int64_t source_x = patches.x.source(x, tap_x);
      const bool inside = y_inside && source_x >= 0 && source_x < patches.x.inputs;
      *sources++ = inside ? patches.data + n * patches.batch_stride + source_y * patches.y_stride +
                                source_x * patches.x_stride
                          : zeros;
    }
  }
}

// One pixel: to[c] = sum over taps of sources[tap][c] * weights[tap, c] + bias[c].
template <class S>
void depthwise_pixel(const S* const* sources, int64_t taps, const Compute<S>* weights, int64_t weight_stride, const S* bias,
                     S* to, int64_t channels) {
  using V = Vector<Compute<S>>;
  for (int64_t c = 0; c < channels; c += lanes<Compute<S>>) {
    V sum = {};
    for (int64_t tap = 0; tap < taps; ++tap)
      sum += load_first(sources[tap] + c, channels - c) * load_as<V>(weights + tap * weight_stride + c);
    if (bias) sum += load_first(bias + c, channels - c);
    store_first<S>(sum, to + c, channels - c);
  }
}

template <class S, class Problem>
void correlate_depthwise(const Problem& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  const Correlation<S> c = correlation<S>(problem);
  const int64_t channels = c.groups, padded = round_up(channels, lanes<T>), phases_x = c.phases_x();
  const int64_t lines = c.batch * (c.input_grad ? ceil_div(c.shape.in_height, c.shape.stride_h) : c.shape.out_height);

  // Weights as [tap of all phases, channel], and a pixel of padding.
  const int64_t kernel = c.shape.kernel_height * c.shape.kernel_width;
  T* weights = scratch<T>(ScratchUse::caller, kernel * padded + padded);
  S* zeros = reinterpret_cast<S*>(weights + kernel * padded);
  zero_matrix(Matrix<T>{weights, padded, 1}, kernel + 1, padded);
  for (int64_t phase_y = 0; phase_y < c.phases_y(); ++phase_y)
    for (int64_t phase_x = 0; phase_x < phases_x; ++phase_x) {
      const Phase<S> phase = make_phase(c, phase_y, phase_x);
      const Axis &y = phase.patches.y, &x = phase.patches.x;
      for (int64_t tap = 0; tap < y.taps * x.taps; ++tap)
        copy_strided(c.weight + (y.first_tap + tap / x.taps * y.tap_step) * c.weight_y_stride +
                         (x.first_tap + tap % x.taps * x.tap_step) * c.weight_x_stride,
                     c.weight_group_stride, weights + (phase.taps_before + tap) * padded, 1, channels);
    }

  parallel_for(pool, c.phases_y() * phases_x * lines, [&](int64_t begin, int64_t end) {
    const S* sources[block_depth];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = i / lines, line = i % lines;
      const Phase<S> phase = make_phase(c, index / phases_x, index % phases_x);
      const Patches<S>& patches = phase.patches;
      const int64_t first = line * patches.x.positions;
      if (first >= phase.pixels(c.batch)) continue;
      const int64_t taps = patches.y.taps * patches.x.taps;
      for_each_line(patches.y, patches.x, first, patches.x.positions,
                    [&](int64_t n, int64_t y, int64_t first_x, int64_t count, int64_t) {
        for (int64_t x = first_x; x < first_x + count; ++x) {
          tap_sources(patches, n, y, x, zeros, sources);
          depthwise_pixel(sources, taps, weights + phase.taps_before * padded, padded, c.bias,
                          phase.result + n * phase.result_batch_stride + y * phase.result_y_stride +
                              x * phase.result_x_stride,
                          channels);
        }
      });
    }
  });
}

// Channels of one piece of work of the weight gradient.
constexpr int64_t depthwise_channel_block = 64;

// sum[tap, c] += sum over pixels [pixel, end) of input[tap, c] * grad_output[c], chained over block_depth pixels at a time.
// `chain` and `sum` are [taps, depthwise_channel_block].
template <class S>
void depthwise_weight_grad_block(const WeightGrad<S>& w, int64_t channel, int64_t channels, int64_t pixel, int64_t end,
                                 const S* zeros, Compute<S>* chain, Compute<S>* sum) {
  using T = Compute<S>;
  using V = Vector<T>;
  constexpr int64_t width = depthwise_channel_block;
  const S* sources[block_depth];
  const Patches<S>& grads = w.grad_output;
  Patches<S> input = w.input;
  input.data += channel;
  for (int64_t start = pixel; start < end; start += block_depth) {
    zero_matrix(Matrix<T>{chain, width, 1}, w.rows, width);
    for_each_line(input.y, input.x, start, min(end - start, block_depth),
                  [&](int64_t n, int64_t y, int64_t first_x, int64_t count, int64_t) {
      for (int64_t x = first_x; x < first_x + count; ++x) {
        tap_sources(input, n, y, x, zeros, sources);
        const S* grad = grads.data + n * grads.batch_stride + y * grads.y_stride + x * grads.x_stride + channel;
        for (int64_t c = 0; c < channels; c += lanes<T>) {
          const V g = load_first(grad + c, channels - c);
          for (int64_t tap = 0; tap < w.rows; ++tap) {
            T* to = chain + tap * width + c;
            store_as(to, load_as<V>(to) + load_first(sources[tap] + c, channels - c) * g);
          }
        }
      }
    });
    for (int64_t i = 0; i < w.rows * width; ++i) sum[i] += chain[i];
  }
}

template <class S>
void weight_grad_depthwise(const Conv2dWeightGrad& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  constexpr int64_t width = depthwise_channel_block;
  const WeightGrad<S> w = weight_grad<S>(problem);
  if (w.groups * w.rows == 0) return;
  const Slices<S> slices(w);
  const int64_t blocks = ceil_div(w.groups, width);
  parallel_for(pool, slices.count * blocks, [&](int64_t begin, int64_t end) {
    T* chain = scratch<T>(ScratchUse::worker, 2 * w.rows * width + width);
    T* sum = chain + w.rows * width;
    S* zeros = reinterpret_cast<S*>(sum + w.rows * width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % blocks * width, channels = min(w.groups - channel, width), slice = i / blocks;
      const int64_t pixel = slice * slices.pixels;
      zero_matrix(Matrix<T>{sum, width, 1}, w.rows + 1, width);
      depthwise_weight_grad_block(w, channel, channels, pixel, min(pixel + slices.pixels, w.pixels), zeros, chain, sum);
      for (int64_t c = 0; c < channels; ++c)
        store_slice(w, slices, slice, channel + c, 0, w.rows, 0, 1, Matrix<const T>{sum + c, width, 1});
    }
  });
  sum_slices(w, slices, pool);
}

}  // namespace
}  // namespace cvfast
