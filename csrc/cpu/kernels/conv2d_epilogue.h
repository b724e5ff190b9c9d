// What follows a convolution on its results while they are in the cache: activation(result + residual), and pooling.
#pragma once
#include "conv2d_problem.h"
#include "conv2d_winograd_transform.h"
#include "gelu.h"

namespace cvfast {
namespace {

template <Activation activation, class V>
V activate(V x, V slope) {
  using T = __typeof__(x[0] + 0);
  if constexpr (activation == Activation::leaky_relu) return x > V{} ? x : x * slope;
  if constexpr (activation == Activation::silu) return x * (x < -100 ? V{} : sigmoid<T>(x));  // -inf gives NaN, as torch's
  if constexpr (activation == Activation::sigmoid) return sigmoid<T>(x);
  if constexpr (activation == Activation::tanh) return tanh<T>(x);
  if constexpr (activation == Activation::gelu) return gelu(x);
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (activation == Activation::hardswish) return x * clamp<T>(x + 3, 0, 6) / 6;
  if constexpr (activation == Activation::hardsigmoid) return clamp<T>(x + 3, 0, 6) / 6;
}
template <Activation activation, class T>
void activate_runs(T* x, int64_t stride, int64_t runs, int64_t count, T slope) {
  for (int64_t run = 0; run < runs; ++run, x += stride)
    for (int64_t i = 0; i < count; i += lanes<T>)
      store_first(activate<activation>(load_first(x + i, count - i), Vector<T>{} + slope), x + i, count - i);
}

// The activation of `count` neighbours in memory, `runs` times; nullptr where it is no more than bounds.
template <class T>
using ActivateRuns = void (*)(T* x, int64_t stride, int64_t runs, int64_t count, T slope);
template <class T>
ActivateRuns<T> activation_of_runs(Activation activation) {
  switch (activation) {
    case Activation::none:
    case Activation::relu:
    case Activation::relu6: return nullptr;
    case Activation::leaky_relu: return activate_runs<Activation::leaky_relu, T>;
    case Activation::silu: return activate_runs<Activation::silu, T>;
    case Activation::sigmoid: return activate_runs<Activation::sigmoid, T>;
    case Activation::tanh: return activate_runs<Activation::tanh, T>;
    case Activation::gelu: return activate_runs<Activation::gelu, T>;
    case Activation::gelu_tanh: return activate_runs<Activation::gelu_tanh, T>;
    case Activation::hardswish: return activate_runs<Activation::hardswish, T>;
    case Activation::hardsigmoid: return activate_runs<Activation::hardsigmoid, T>;
  }
  return nullptr;
}

template <class T>
struct ActivationOf {
  Bounds<T> bounds;
  ActivateRuns<T> run;  // or nullptr
  T slope;

  explicit ActivationOf(const Epilogue& e)
      : bounds(bounds_of<T>(e.activation)), run(activation_of_runs<T>(e.activation)), slope(static_cast<T>(e.negative_slope)) {}
};

// Elements [0, count) <= lanes that are `step` apart.
template <class S>
Vector<Compute<S>> load_spaced(const S* from, int64_t step, int64_t count) {
  if (step == 1) return count == lanes<Compute<S>> ? load_vector(from) : load_first(from, count);
  Vector<Compute<S>> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = to_compute(from[i * step]);
  return v;
}

// Neighbours in memory; residual, whose neighbours are `step` apart, may be nullptr.
template <class T, class R>
void finish_run(T* to, const R* residual, int64_t step, int64_t count, const ActivationOf<T>& activation) {
  constexpr int64_t L = lanes<T>;
  const Bounds<T> bounds = activation.bounds;
  if (residual || !activation.run)
    for (int64_t i = 0; i < count; i += L) {
      const int64_t some = min(count - i, L);
      Vector<T> x = load_first(to + i, some);
      if (residual) x += load_spaced(residual + i * step, step, some);
      store_first(bounds.clamp(x), to + i, some);
    }
  if (activation.run) activation.run(to, 0, 1, count, activation.slope);
}

// Four neighbouring pixels, as a tile of Winograd's has them, of as many channels as fill a vector at a time.
template <class R>
void finish_quads(Block<float> block, Block<R> residual, int64_t channels, int64_t lines, const ActivationOf<float>& activation) {
  for (int64_t channel = 0; channel < channels; channel += quads)
    for (int64_t line = 0; line < lines; ++line) {
      float* to = block.data + channel * block.channel_stride + line * block.line_stride;
      FloatVector x = load_quads(to, block.channel_stride);
      if (residual.data)
        x += load_quads(residual.data + channel * residual.channel_stride + line * residual.line_stride,
                        residual.channel_stride);
      x = activation.bounds.clamp(x);
      if (activation.run) {
        float elements[lanes<float>];
        store_vector(x, elements);
        activation.run(elements, 0, 1, lanes<float>, activation.slope);
        x = load_vector(elements);
      }
      store_quads(x, to, block.channel_stride);
    }
}

// activation(block + residual) in place; residual.data may be nullptr.
template <class T, class R>
void apply_epilogue(const Epilogue& e, Block<T> block, Block<R> residual, int64_t channels, int64_t lines, int64_t pixels) {
  if (e.activation == Activation::none && !residual.data) return;
  const ActivationOf<T> activation(e);
  if constexpr (sizeof(T) == sizeof(float))
    if (block.pixel_stride == 1 && (!residual.data || residual.pixel_stride == 1) && pixels == 4 && channels % quads == 0)
      return finish_quads(block, residual, channels, lines, activation);
  // Along what is contiguous in memory, as far as that goes; else one by one.
  if (!residual.data || (block.channel_stride == residual.channel_stride && block.line_stride == residual.line_stride &&
                         block.pixel_stride == residual.pixel_stride)) {
    if (block.channel_stride == 1 && block.pixel_stride == channels) channels *= pixels, pixels = 1;
    if (block.channel_stride == 1 && pixels == 1 && block.line_stride == channels) channels *= lines, lines = 1;
    if (block.channel_stride != 1 && block.pixel_stride == 1 && block.line_stride == pixels) pixels *= lines, lines = 1;
  }
  const bool by_channels = block.channel_stride == 1, by_pixels = !by_channels && block.pixel_stride == 1;
  const int64_t channel_runs = by_channels ? 1 : channels, pixel_runs = by_pixels ? 1 : pixels;
  const int64_t count = by_channels ? channels : by_pixels ? pixels : 1;
  for (int64_t channel = 0; channel < channel_runs; ++channel)
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t pixel = 0; pixel < pixel_runs; ++pixel) {
        T* to = block.data + channel * block.channel_stride + line * block.line_stride + pixel * block.pixel_stride;
        R* added = residual.data ? residual.data + channel * residual.channel_stride + line * residual.line_stride +
                                       pixel * residual.pixel_stride
                                 : nullptr;
        finish_run(to, added, by_channels ? residual.channel_stride : residual.pixel_stride, count, activation);
      }
}

// What is added to `block`, a part of c.result.
template <class S>
Block<const S> residual_of(const Correlation<S>& c, Block<S> block) {
  const S* data = c.residual ? c.residual + (block.data - c.result) : nullptr;
  return {data, block.channel_stride, block.line_stride, block.pixel_stride};
}

// `block`: final results, a part of c.result; narrow ones were rounded after the epilogue and are left.
template <class S>
void finish_with_epilogue(const Correlation<S>& c, Block<S> block, int64_t channels, int64_t lines, int64_t pixels) {
  if constexpr (sizeof(S) == sizeof(Compute<S>))
    apply_epilogue(c.epilogue, block, residual_of(c, block), channels, lines, pixels);
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
  const Block<const S> nothing = {};
  if (!late) apply_epilogue(e, from, nothing, channels, lines, pixels);
  lines /= 2, pixels /= 2;
  from = e.pooling == Pooling::max ? pool_in_place<Pooling::max>(from, channels, lines, pixels)
                                   : pool_in_place<Pooling::average>(from, channels, lines, pixels);
  if (late) apply_epilogue(e, from, nothing, channels, lines, pixels);
  copy_planes(Block<const T>{from.data, from.channel_stride, from.line_stride, from.pixel_stride}, to, channels, lines,
              pixels);
}

// Whether the results for `to` had better take the epilogue in a worker's scratch: narrow ones are rounded last, and vectors
// are loaded from there. What is added lies as `to` does, so with a residual that must have no runs to be loaded as vectors.
template <class S>
bool finish_in_scratch(const Correlation<S>& c, Block<S> to, int64_t channels) {
  const bool runs = to.pixel_stride == 1 || (to.channel_stride == 1 && channels >= lanes<Compute<S>>);
  return c.rounds_last() || (c.finishes() && !(c.residual && runs));
}

// The same with pooling or without.
template <class S>
void store_results(const Correlation<S>& c, Block<Compute<S>> from, Block<S> to, int64_t channels, int64_t lines,
                   int64_t pixels) {
  using T = Compute<S>;
  if (c.pools()) return store_pooled(c, from, to, channels, lines, pixels);
  const bool first = finish_in_scratch(c, to, channels);
  if (first) apply_epilogue(c.epilogue, from, residual_of(c, to), channels, lines, pixels);
  copy_planes(Block<const T>{from.data, from.channel_stride, from.line_stride, from.pixel_stride}, to, channels, lines,
              pixels);
  if (!first) finish_with_epilogue(c, to, channels, lines, pixels);
}

}  // namespace
}  // namespace cvfast
