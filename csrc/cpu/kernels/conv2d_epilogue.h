// What follows a convolution on its results while they are in the cache: activation(result + residual), and pooling.
#pragma once
#include "conv2d_problem.h"
#include "conv2d_winograd_transform.h"
#include "sigmoid_tanh.h"

namespace cvfast {
namespace {

template <Activation activation, class V>
V activate(V x, V slope) {
  using T = __typeof__(x[0] + 0);
  if constexpr (activation == Activation::relu) return x < V{} ? V{} : x;  // NaN stays NaN
  if constexpr (activation == Activation::relu6) return x < V{} ? V{} : x > V{} + 6 ? V{} + 6 : x;
  if constexpr (activation == Activation::leaky_relu) return x > V{} ? x : x * slope;
  if constexpr (activation == Activation::silu) return x * (x < -100 ? V{} : sigmoid<T>(x));  // -inf gives NaN, as torch's
  if constexpr (activation == Activation::sigmoid) return sigmoid<T>(x);
  if constexpr (activation == Activation::tanh) return tanh<T>(x);
  return x;
}

// Neighbours in memory; residual may be nullptr.
template <Activation activation, class S>
void finish_run(S* to, const S* residual, int64_t count, Compute<S> slope) {
  using V = Vector<Compute<S>>;
  constexpr int64_t L = lanes<Compute<S>>;
  const V slopes = V{} + slope;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t some = min(count - i, L);
    V x = some == L ? load_vector(to + i) : load_first(to + i, some);
    if (residual) x += some == L ? load_vector(residual + i) : load_first(residual + i, some);
    x = activate<activation>(x, slopes);
    if (some == L)
      store_vector(x, to + i);
    else
      store_first(x, to + i, some);
  }
}

// Four neighbouring pixels, as a tile of Winograd's has them, of as many channels as fill a vector at a time.
template <Activation activation, class S>
void finish_quads(Block<S> block, const S* residual, int64_t channels, int64_t lines, float slope) {
  const FloatVector slopes = FloatVector{} + slope;
  for (int64_t channel = 0; channel < channels; channel += quads)
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t at = channel * block.channel_stride + line * block.line_stride;
      FloatVector x = load_quads(block.data + at, block.channel_stride);
      if (residual) x += load_quads(residual + at, block.channel_stride);
      store_quads(activate<activation>(x, slopes), block.data + at, block.channel_stride);
    }
}

template <Activation activation, class S>
void finish_block(Block<S> block, const S* residual, int64_t channels, int64_t lines, int64_t pixels, Compute<S> slope) {
  if constexpr (sizeof(Compute<S>) == sizeof(float))
    if (block.pixel_stride == 1 && pixels == 4 && channels % quads == 0)
      return finish_quads<activation>(block, residual, channels, lines, slope);
  // Along what is contiguous in memory, as far as that goes; else one by one.
  if (block.channel_stride == 1 && block.pixel_stride == channels) channels *= pixels, pixels = 1;
  if (block.channel_stride == 1 && pixels == 1 && block.line_stride == channels) channels *= lines, lines = 1;
  if (block.channel_stride != 1 && block.pixel_stride == 1 && block.line_stride == pixels) pixels *= lines, lines = 1;
  const bool by_channels = block.channel_stride == 1, by_pixels = !by_channels && block.pixel_stride == 1;
  const int64_t channel_runs = by_channels ? 1 : channels, pixel_runs = by_pixels ? 1 : pixels;
  const int64_t count = by_channels ? channels : by_pixels ? pixels : 1;
  for (int64_t channel = 0; channel < channel_runs; ++channel)
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t pixel = 0; pixel < pixel_runs; ++pixel) {
        const int64_t at = channel * block.channel_stride + line * block.line_stride + pixel * block.pixel_stride;
        finish_run<activation>(block.data + at, residual ? residual + at : nullptr, count, slope);
      }
}

// activation(block + residual) in place; `residual` is laid out as the block is, or nullptr.
template <class S>
void apply_epilogue(const Epilogue& e, Block<S> block, const S* residual, int64_t channels, int64_t lines, int64_t pixels) {
  const auto finish = [&]<Activation activation> {
    finish_block<activation>(block, residual, channels, lines, pixels, static_cast<Compute<S>>(e.negative_slope));
  };
  switch (e.activation) {
    case Activation::none: return residual ? finish.template operator()<Activation::none>() : void();
    case Activation::relu: return finish.template operator()<Activation::relu>();
    case Activation::relu6: return finish.template operator()<Activation::relu6>();
    case Activation::leaky_relu: return finish.template operator()<Activation::leaky_relu>();
    case Activation::silu: return finish.template operator()<Activation::silu>();
    case Activation::sigmoid: return finish.template operator()<Activation::sigmoid>();
    case Activation::tanh: return finish.template operator()<Activation::tanh>();
  }
}

// `block`: final results, a part of c.result.
template <class S>
void finish_with_epilogue(const Correlation<S>& c, Block<S> block, int64_t channels, int64_t lines, int64_t pixels) {
  apply_epilogue(c.epilogue, block, c.residual ? c.residual + (block.data - c.result) : nullptr, channels, lines, pixels);
}

// ---- Pooling of 2x2 results in a worker's scratch ----

template <Pooling pooling, class V>
V pooled(V a, V b) {
  return pooling == Pooling::average ? a + b : (a > b) | (a != a) ? a : b;  // NaN wins
}

// Puts the pooled lines x pixels (of the result) densely at the block's beginning, where they are written after what they are made of
// was read: vectors may reach beyond them. One of the strides of channels and pixels is 1.
template <Pooling pooling, class T>
Block<T> pool_in_place(Block<T> block, int64_t channels, int64_t lines, int64_t pixels) {
  using V = Vector<T>;
  constexpr int L = lanes<T>;
  decltype(V{} < V{}) even;
  for (int j = 0; j < L; ++j) even[j] = 2 * j;
  const V factor = V{} + (pooling == Pooling::average ? T(0.25) : T(1));
  const bool by_channels = block.channel_stride == 1;
  Block<T> to = block;
  to.line_stride = pixels * block.pixel_stride;
  for (int64_t channel = 0; channel < (by_channels ? 1 : channels); ++channel)
    for (int64_t line = 0; line < lines; ++line) {
      const T* from = block.data + channel * block.channel_stride + 2 * line * block.line_stride;
      T* target = to.data + channel * to.channel_stride + line * to.line_stride;
      const auto column = [&](const T* at) { return pooled<pooling>(load_as<V>(at), load_as<V>(at + block.line_stride)); };
      if (by_channels)
        for (int64_t pixel = 0; pixel < pixels; ++pixel)
          for (int64_t i = 0; i < channels; i += L) {
            const T* at = from + 2 * pixel * block.pixel_stride + i;
            const V x = pooled<pooling>(column(at), column(at + block.pixel_stride)) * factor;
            store_first(x, target + pixel * to.pixel_stride + i, channels - i);
          }
      else
        for (int64_t pixel = 0; pixel < pixels; pixel += L) {
          const V a = column(from + 2 * pixel), b = 2 * (pixels - pixel) > L ? column(from + 2 * pixel + L) : a;
          const V x = pooled<pooling>(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1)) * factor;
          store_first(x, target + pixel, pixels - pixel);
        }
    }
  return to;
}

// The epilogue with pooling of results in a worker's scratch, which is overwritten: lines x pixels of them, brought to `to`.
// One of the strides of channels and pixels is 1; vectors of them can be read beyond the end.
template <class S>
void store_pooled(const Correlation<S>& c, Block<Compute<S>> from, Block<S> to, int64_t channels, int64_t lines,
                  int64_t pixels) {
  using T = Compute<S>;
  const Epilogue& e = c.epilogue;
  // Activations that keep the order are left for the largest; not where rounding might disturb it.
  const bool late = e.pooling == Pooling::max && (e.activation == Activation::relu || e.activation == Activation::relu6);
  if (!late) apply_epilogue<T>(e, from, nullptr, channels, lines, pixels);
  lines /= 2, pixels /= 2;
  from = e.pooling == Pooling::max ? pool_in_place<Pooling::max>(from, channels, lines, pixels)
                                   : pool_in_place<Pooling::average>(from, channels, lines, pixels);
  if (late) apply_epilogue<T>(e, from, nullptr, channels, lines, pixels);
  copy_planes(Block<const T>{from.data, from.channel_stride, from.line_stride, from.pixel_stride}, to, channels, lines,
              pixels);
}

// The same with pooling or without.
template <class S>
void store_results(const Correlation<S>& c, Block<Compute<S>> from, Block<S> to, int64_t channels, int64_t lines,
                   int64_t pixels) {
  using T = Compute<S>;
  if (c.pools()) return store_pooled(c, from, to, channels, lines, pixels);
  copy_planes(Block<const T>{from.data, from.channel_stride, from.line_stride, from.pixel_stride}, to, channels, lines,
              pixels);
  finish_with_epilogue(c, to, channels, lines, pixels);
}

}  // namespace
}  // namespace cvfast
