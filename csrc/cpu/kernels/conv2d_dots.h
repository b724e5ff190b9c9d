// Convolution with a few results per sample and group, each a sum of very many products: dot products of a gathered patch
// with the weights of a channel. A sum is 64 chains of multiply-adds in double, product k in chain k mod 64, which are added
// pairwise: more accurate than the long chains of the implicit GEMM, and without a tile that would be computed in vain.
#pragma once
#include "conv2d_implicit_gemm.h"

namespace cvfast {
namespace {

constexpr int64_t dot_chains = 64, most_dots = 4, least_dot_depth = 1024;

// Whatever the batch: a sample alone has the bits that it has among others.
inline bool dots_apply(const Conv2dForward& p) {
  const Conv2dShape& s = p.shape;
  const int64_t depth = s.kernel_height * s.kernel_width * (s.in_channels / s.groups);
  return s.out_channels / s.groups * s.out_height * s.out_width <= most_dots && depth >= least_dot_depth;
}

inline Vector<double> load_wide(const double* from) { return load_as<Vector<double>>(from); }
inline Vector<double> load_wide(const float* from) {
  typedef float Narrow __attribute__((vector_size(CVFAST_VECTOR_BYTES / 2)));
  return __builtin_convertvector(load_as<Narrow>(from), Vector<double>);
}

// a and b have `depth` elements, zeros up to a multiple of dot_chains.
template <class T>
T dot(const T* a, const T* b, int64_t depth) {
  constexpr int L = lanes<double>, vectors = dot_chains / L;
  Vector<double> chain[vectors] = {};
  for (int64_t k = 0; k < depth; k += dot_chains)
#pragma GCC unroll 32
    for (int v = 0; v < vectors; ++v) chain[v] += load_wide(a + k + v * L) * load_wide(b + k + v * L);
  double sum[dot_chains];
  for (int v = 0; v < vectors; ++v) store_as(sum + v * L, chain[v]);
  for (int64_t half = dot_chains / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  return static_cast<T>(sum[0]);
}

template <class S>
void correlate_by_dots(const Conv2dForward& problem, const ThreadPool& pool) {
  using T = Compute<S>;
  const Correlation<S> c = correlation<S>(problem);
  const Phase<S> phase = make_phase(c, 0, 0, false);
  const Axis &y = phase.patches.y, &x = phase.patches.x;
  const int64_t pixels = phase.pixels(1), depth = phase.patches.columns(), padded = round_up(depth, dot_chains);
  if (c.batch * c.groups * c.out_channels * pixels == 0) return;
  const Matrix<T> weights = {scratch<T>(ScratchUse::caller, c.groups * c.out_channels * padded), padded, 1};
  zero_matrix(Matrix<T>{weights.data + depth, padded, 1}, c.groups * c.out_channels, padded - depth);
  for (int64_t group = 0; group < c.groups; ++group)
    for (int64_t tap = 0; tap < y.taps * x.taps; ++tap)
      copy_block(Matrix<const S>{c.weight + group * c.weight_group_stride + tap / x.taps * c.weight_y_stride +
                                     tap % x.taps * c.weight_x_stride,
                                 c.weight_out_stride, c.weight_in_stride},
                 Matrix<T>{weights.data + group * c.out_channels * padded + tap * c.in_channels, padded, 1}, c.out_channels,
                 c.in_channels);
  parallel_for(pool, c.batch * c.groups, [&](int64_t begin, int64_t end) {
    const Matrix<T> rows = {scratch<T>(ScratchUse::worker, pixels * padded), padded, 1};
    zero_matrix(Matrix<T>{rows.data + depth, padded, 1}, pixels, padded - depth);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / c.groups, first = i % c.groups * c.out_channels;
      Patches<S> patches = phase.patches;
      patches.data += i % c.groups * c.in_channels * patches.channel_stride;
      gather_patches(patches, sample * pixels, pixels, 0, depth, rows);
      const Block<S> to = {phase.result + sample * phase.result_batch_stride + first * phase.result_channel_stride,
                           phase.result_channel_stride, phase.result_y_stride, phase.result_x_stride};
      T results[most_dots];  // [pixel][channel]
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        for (int64_t channel = 0; channel < c.out_channels; ++channel) {
          const T sum = dot(rows.data + pixel * padded, weights.data + (first + channel) * padded, depth);
          results[pixel * c.out_channels + channel] = c.bias ? sum + to_compute(c.bias[first + channel]) : sum;
        }
      store_results(c, Block<T>{results, 1, x.positions * c.out_channels, c.out_channels}, to, c.out_channels, y.positions,
                    x.positions);
    }
  });
}

}  // namespace
}  // namespace cvfast
