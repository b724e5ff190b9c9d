// What follows a convolution on its results while they are in the cache: activation(result + residual).
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
void finish_quads(const Correlation<S>& c, Block<S> block, int64_t channels, int64_t lines) {
  const FloatVector slopes = FloatVector{} + static_cast<float>(c.epilogue.negative_slope);
  for (int64_t channel = 0; channel < channels; channel += quads)
    for (int64_t line = 0; line < lines; ++line) {
      S* to = block.data + channel * block.channel_stride + line * block.line_stride;
      FloatVector x = load_quads(to, block.channel_stride);
      if (c.residual) x += load_quads(c.residual + (to - c.result), block.channel_stride);
      store_quads(activate<activation>(x, slopes), to, block.channel_stride);
    }
}

template <Activation activation, class S>
void finish_block(const Correlation<S>& c, Block<S> block, int64_t channels, int64_t lines, int64_t pixels) {
  const auto run = [&](S* to, int64_t count) {
    finish_run<activation>(to, c.residual ? c.residual + (to - c.result) : nullptr, count,
                           static_cast<Compute<S>>(c.epilogue.negative_slope));
  };
  if constexpr (sizeof(Compute<S>) == sizeof(float))
    if (block.pixel_stride == 1 && pixels == 4 && channels % quads == 0)
      return finish_quads<activation>(c, block, channels, lines);
  // Along what is contiguous in memory, as far as that goes; else one by one.
  if (block.channel_stride == 1 && block.pixel_stride == channels) channels *= pixels, pixels = 1;
  if (block.channel_stride == 1 && pixels == 1 && block.line_stride == channels) channels *= lines, lines = 1;
  if (block.channel_stride != 1 && block.pixel_stride == 1 && block.line_stride == pixels) pixels *= lines, lines = 1;
  const bool by_channels = block.channel_stride == 1, by_pixels = !by_channels && block.pixel_stride == 1;
  const int64_t channel_runs = by_channels ? 1 : channels, pixel_runs = by_pixels ? 1 : pixels;
  const int64_t count = by_channels ? channels : by_pixels ? pixels : 1;
  for (int64_t channel = 0; channel < channel_runs; ++channel)
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t pixel = 0; pixel < pixel_runs; ++pixel)
        run(block.data + channel * block.channel_stride + line * block.line_stride + pixel * block.pixel_stride, count);
}

// `block`: final results, a part of c.result.
template <class S>
void finish_with_epilogue(const Correlation<S>& c, Block<S> block, int64_t channels, int64_t lines, int64_t pixels) {
  switch (c.epilogue.activation) {
    case Activation::none:
      if (c.residual) finish_block<Activation::none>(c, block, channels, lines, pixels);
      return;
    case Activation::relu: return finish_block<Activation::relu>(c, block, channels, lines, pixels);
    case Activation::relu6: return finish_block<Activation::relu6>(c, block, channels, lines, pixels);
    case Activation::leaky_relu: return finish_block<Activation::leaky_relu>(c, block, channels, lines, pixels);
    case Activation::silu: return finish_block<Activation::silu>(c, block, channels, lines, pixels);
    case Activation::sigmoid: return finish_block<Activation::sigmoid>(c, block, channels, lines, pixels);
    case Activation::tanh: return finish_block<Activation::tanh>(c, block, channels, lines, pixels);
  }
}

}  // namespace
}  // namespace cvfast
