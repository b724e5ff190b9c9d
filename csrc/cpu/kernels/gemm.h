// The matrix product that every operator shares: C [rows, cols] (+)= A [rows, depth] * B [depth, cols], in float or double.
//
// One tile of C, a few rows x 1 to 4 vectors, stays in registers while the whole depth of a block passes by; A is broadcast
// element by element, B is read a vector at a time. An element of C is one chain of multiply-adds from 0, in the order
// of depth, added to C at the end: its bits depend on neither its place in the matrix nor the instruction set's width.
#pragma once
#include "simd.h"

namespace cvfast {
namespace {

// Registers of a tile of two vectors: accumulators 2 * tile_rows, B 2, A 1. 16 registers with SSE and AVX2, 32 with AVX-512
// and NEON.
#if CVFAST_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int tile_rows = 12;
#else
constexpr int tile_rows = 6;
#endif
template <class T>
constexpr int tile_cols = 2 * lanes<T>;

// A block's tiles are as wide as 6 rows leave registers for: a broadcast serves more multiply-adds than in a taller tile,
// and rows of A whole pages apart do not evict each other from the L1 cache, where they share a few lines.
constexpr int most_vectors = 2 * tile_rows / 6;
template <class T>
constexpr int panel_cols = most_vectors * lanes<T>;
// Rows of a tile of so many vectors.
constexpr int rows_beside(int vectors) { return min(tile_rows, 2 * tile_rows / vectors); }

template <class T>
constexpr int64_t line_elements = 64 / sizeof(T);  // of a cache line

// Cache blocks. With AVX2 and either type: A 96 x 256 and B 256 x 15 tiles at most 240 KiB each, C 90 KiB, all in L2,
// and one 16 KiB panel of B (256 x panel_cols) in L1; with AVX-512 a panel's 64 KiB come from L2. 15 tiles: an odd number of
// cache lines between the rows of B spreads a panel over all sets of the L1 cache.
constexpr int64_t block_rows = 96;
constexpr int64_t block_depth = 256;
template <class T>
constexpr int64_t block_cols = 15 * tile_cols<T>;

// B in panels of `cols` <= panel_cols columns, whole vectors of them; those of the last vector beyond the matrix are readable
// and ignored.
template <class T>
struct Panels {
  const T* data;
  int64_t cols, panel_stride, row_stride;
};

// The least and the largest value of an element; NaN stays NaN.
template <class T>
struct Bounds {
  T low = -static_cast<T>(__builtin_inf()), high = static_cast<T>(__builtin_inf());

  template <class V>
  V clamp(V x) const {
    const V least = V{} + low, most = V{} + high;
    x = least > x ? least : x;
    return most < x ? most : x;
  }
};

// What becomes of an element of C before it is stored: nothing. Others change a vector of columns, from `column` on.
struct AsItIs {
  template <class V>
  V operator()(V x, int64_t) const { return x; }
  AsItIs from(int64_t) const { return {}; }  // the same for a matrix that begins with this column
};

// One tile of `Vectors` vectors of columns; C has as many writable columns with stride 1. The strides are scalars: a
// Matrix would go through memory, where it costs more than a shallow tile's share of anything else. `Ahead`: as many rows of A as
// come behind these, which the next tile will read, are brought near meanwhile, and of each row of B the line `b_ahead` elements
// further on.
template <class T, int Rows, int Vectors, bool Ahead, class Finish>
void tile_product(const T* a, int64_t a_row_stride, int64_t a_col_stride, const T* b, int64_t b_stride, int64_t b_ahead,
                  int64_t depth, T* c, int64_t c_stride, bool add, Finish finish) {
  constexpr int L = lanes<T>;
  Vector<T> sum[Rows][Vectors] = {};
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; j += 2) __builtin_prefetch(c + i * c_stride + j * L, 1);  // cache lines come in pairs
  const int64_t step = Ahead ? line_elements<T> : depth;
  for (int64_t first = 0; first < depth; first += step) {
    if constexpr (Ahead)
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) __builtin_prefetch(a + (Rows + i) * a_row_stride);
    for (int64_t k = min(step, depth - first); k > 0; --k) {
      if constexpr (Ahead) __builtin_prefetch(b + b_ahead, 0, 2);
      Vector<T> row[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) row[j] = load_as<Vector<T>>(b + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const T x = a[i * a_row_stride];
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[i][j] += x * row[j];
      }
      a += a_col_stride;
      b += b_stride;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      T* to = c + i * c_stride + j * L;
      store_as(to, finish(add ? load_as<Vector<T>>(to) + sum[i][j] : sum[i][j], j * L));
    }
}

// A tile of `rows` <= Rows rows.
template <class T, int Vectors = 2, int Rows = tile_rows, bool Ahead = false, class Finish = AsItIs>
[[gnu::always_inline]] inline void tile_product_rows(int64_t rows, Matrix<const T> a, const T* b, int64_t b_stride,
                                                     int64_t depth, T* c, int64_t c_stride, bool add, Finish finish = {},
                                                     int64_t b_ahead = 0) {
  if constexpr (Rows > 1)
    if (rows < Rows)
      return tile_product_rows<T, Vectors, Rows - 1, Ahead>(rows, a, b, b_stride, depth, c, c_stride, add, finish, b_ahead);
  tile_product<T, Rows, Vectors, Ahead>(a.data, a.row_stride, a.col_stride, b, b_stride, b_ahead, depth, c, c_stride, add,
                                        finish);
}

// For what may be called after a tile.
struct Nothing {
  void operator()() const {}
};

// A column of tiles. The rows are cut evenly. The first tiles bring the panel near that is `to_next` elements further on, one
// line of each row apiece: with few rows of A, memory gives B no faster than it is needed.
template <class T, int Vectors, class Finish = AsItIs>
void column_product(int64_t rows, int64_t depth, Matrix<const T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                    bool add, Finish finish = {}, int64_t to_next = 0) {
  constexpr int most = rows_beside(Vectors);
  constexpr int64_t width = Vectors * lanes<T>;
  int64_t line = 0;
  for (int64_t row = 0, count; row < rows; row += count, line += line_elements<T>) {
    count = ceil_div(rows - row, ceil_div(rows - row, most));
    const Matrix<const T> a_rows = {a.data + row * a.row_stride, a.row_stride, a.col_stride};
    tile_product_rows<T, Vectors, most, true>(count, a_rows, b, b_stride, depth, c + row * c_stride, c_stride, add, finish,
                                              line < width ? to_next + line : 0);
  }
}

// The same for a panel's first `vectors` <= Vectors vectors.
template <class T, int Vectors = most_vectors, class Finish>
void panel_column(int64_t vectors, int64_t rows, int64_t depth, Matrix<const T> a, Panels<T> b, T* c, int64_t c_stride,
                  bool add, Finish finish) {
  if constexpr (Vectors > 1)
    if (vectors < Vectors) return panel_column<T, Vectors - 1>(vectors, rows, depth, a, b, c, c_stride, add, finish);
  column_product<T, Vectors>(rows, depth, a, b.data, b.row_stride, c, c_stride, add, finish, b.panel_stride);
}

// A block: rows <= block_rows, cols <= block_cols, depth <= block_depth for the caches' sake. `c` has row stride
// c_stride and room for the columns rounded up to whole vectors.
template <class T, class Finish = AsItIs>
void block_product(int64_t rows, int64_t cols, int64_t depth, Matrix<const T> a, Panels<T> b, T* c, int64_t c_stride,
                   bool add, Finish finish = {}) {
  for (int64_t col = 0; col < cols; col += b.cols, b.data += b.panel_stride)
    panel_column(ceil_div(min(cols - col, b.cols), lanes<T>), rows, depth, a, b, c + col, c_stride, add, finish.from(col));
}

}  // namespace
}  // namespace cvfast
