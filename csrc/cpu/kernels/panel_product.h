// Products of few rows with a matrix that is packed once and used many times, whose sums go from the first-level
// cache into whatever follows: C [rows, units] = A [rows, depth] * B, B packed as [panel][depth][Cols][lanes].
//
// A tile is Rows x Cols vectors; a single row takes two panels at once, so that enough chains of multiply-adds run side
// by side. An element is one chain of multiply-adds from 0 in the order of depth, wherever it lies in a tile.
#pragma once
#include "simd.h"

namespace cvfast {
namespace {

// Accumulators: 12 of 16 registers, or 24 of 32.
#if CVFAST_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int panel_accumulators = 24;
#else
constexpr int panel_accumulators = 12;
#endif

template <class T>
struct PackedPanels {
  const T* data;
  int64_t count, depth;
};

// out [Panels][Rows][Cols vectors] = rows of `a` times panels of `b`.
template <class T, int Rows, int Cols, int Panels>
[[gnu::noinline]] void panel_tile(const T* a, int64_t a_stride, const T* b, int64_t depth, T* out) {
  constexpr int L = lanes<T>;
  const int64_t panel_stride = depth * Cols * L;
  Vector<T> sum[Panels][Rows][Cols] = {};
  for (int64_t k = 0; k < depth; ++k, b += Cols * L) {
    Vector<T> x[Rows];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) x[i] = Vector<T>{} + a[i * a_stride + k];
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 4
      for (int j = 0; j < Cols; ++j) {
        const Vector<T> y = load_as<Vector<T>>(b + p * panel_stride + j * L);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) sum[p][i][j] += x[i] * y;
      }
  }
#pragma GCC unroll 2
  for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Cols; ++j) store_as(out + ((p * Rows + i) * Cols + j) * L, sum[p][i][j]);
}

// A tile of `rows` <= Rows rows.
template <class T, int Cols, int Rows = panel_accumulators / Cols>
void panel_tile_rows(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t depth, T* out) {
  if constexpr (Rows > 1)
    if (rows < Rows) return panel_tile_rows<T, Cols, Rows - 1>(rows, a, a_stride, b, depth, out);
  panel_tile<T, Rows, Cols, 1>(a, a_stride, b, depth, out);
}

// Calls finish(row, count, panel, sum) for all rows and panels, a tile at a time: sum [count][Cols vectors], in L1.
template <class T, int Cols, class Finish>
void panel_product(int64_t rows, const T* a, int64_t a_stride, PackedPanels<T> b, Finish&& finish) {
  constexpr int most = panel_accumulators / Cols, width = Cols * lanes<T>;
  alignas(64) T out[max(most, 2) * width];
  const int64_t tiles = ceil_div(rows, most), panels = rows == 1 ? 2 : 1;  // of a tile
  for (int64_t panel = 0; panel < b.count; panel += panels) {
    const T* from = b.data + panel * b.depth * width;
    if (rows == 1 && panel + 2 <= b.count) {
      panel_tile<T, 1, Cols, 2>(a, a_stride, from, b.depth, out);
      for (int p = 0; p < 2; ++p) finish(0, 1, panel + p, out + p * width);
      continue;
    }
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {  // equal tiles, as far as that goes
      const int64_t count = ceil_div(rows - row, tiles - tile);
      panel_tile_rows<T, Cols>(count, a + row * a_stride, a_stride, from, b.depth, out);
      finish(row, count, panel, out);
      row += count;
    }
  }
}

}  // namespace
}  // namespace cvfast
