// One channel's plane with a square kernel: a tile of several lines, so that a vector of the source that is loaded serves the
// taps of all kernel lines. The order of the taps is (kernel row, kernel column), as everywhere.
#pragma once
#include "simd.h"

namespace cvfast {
namespace {

constexpr int plane_lines = 4, plane_vectors = 2;  // of a tile

// Tap (r, s) of result (y, x) reads source[y * source_stride + x + r * row_step + s * col_step]; row_step is +- source_stride,
// col_step +- 1. `result` has its own line stride.
template <class T>
struct PlaneProduct {
  const T* source;
  int64_t source_stride, row_step, col_step;
  const T* weights;  // [taps, taps]
  const T* bias;     // one, or nullptr
  T* result;
  int64_t result_stride;
};

// The sums go through the source's lines in the order of their taps: upwards, or downwards if row_step is negative.
template <class T, int Taps>
void plane_tile(const PlaneProduct<T>& p, int64_t y, int64_t x) {
  using V = Vector<T>;
  constexpr int L = lanes<T>;
  const bool down = p.row_step < 0;
  const int64_t first = down ? y + plane_lines - 1 : y;  // the line of sum[0]
  const T* line = p.source + first * p.source_stride + x;
  V sum[plane_lines][plane_vectors] = {};
#pragma GCC unroll 16
  for (int i = 0; i < plane_lines + Taps - 1; ++i, line += p.row_step)
#pragma GCC unroll 8
    for (int s = 0; s < Taps; ++s) {
      const V a = load_as<V>(line + s * p.col_step), b = load_as<V>(line + s * p.col_step + L);
#pragma GCC unroll 8
      for (int r = 0; r < plane_lines; ++r)
        if (i >= r && i - r < Taps) {
          const T w = p.weights[(i - r) * Taps + s];
          sum[r][0] += w * a;
          sum[r][1] += w * b;
        }
    }
  T* to = p.result + first * p.result_stride + x;
#pragma GCC unroll 8
  for (int r = 0; r < plane_lines; ++r, to += down ? -p.result_stride : p.result_stride)
#pragma GCC unroll 2
    for (int v = 0; v < plane_vectors; ++v) store_as(to + v * L, p.bias ? sum[r][v] + *p.bias : sum[r][v]);
}

// Tiles at the far ends overlap their neighbours: lines >= plane_lines, pixels >= plane_vectors * lanes.
template <class T, int Taps>
void plane_product(const PlaneProduct<T>& p, int64_t lines, int64_t pixels) {
  constexpr int64_t width = plane_vectors * lanes<T>;
  for (int64_t y = 0; y < lines; y += plane_lines)
    for (int64_t x = 0; x < pixels; x += width)
      plane_tile<T, Taps>(p, min<int64_t>(y, lines - plane_lines), min(x, pixels - width));
}

// The product for a kernel of `taps` x `taps`, or nullptr.
template <class T>
auto plane_product_for(int64_t taps) -> void (*)(const PlaneProduct<T>&, int64_t lines, int64_t pixels) {
  switch (taps) {
    case 3: return plane_product<T, 3>;
    case 5: return plane_product<T, 5>;
    case 7: return plane_product<T, 7>;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace cvfast
