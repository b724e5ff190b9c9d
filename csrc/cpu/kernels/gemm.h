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
// and ignored. far: a panel may not be in the second-level cache; it comes near while the one before it is multiplied with.
template <class T>
struct Panels {
  const T* data;
  int64_t cols, panel_stride, row_stride;
  bool far = false;
};

// The least and the largest value of an element; NaN stays NaN.
template <class T>
struct Bounds {
  static constexpr T infinity = static_cast<T>(__builtin_inf());
  T low = -infinity, high = infinity;

  bool some() const { return low > -infinity || high < infinity; }

  template <class V>
  V clamp(V x) const {
    const V least = V{} + low, most = V{} + high;
    return lesser_of(most, greater_of(least, x));
  }
};

// What becomes of the elements of C before they are stored, if anything: activate(x + bias + residual), within bounds.
template <class T>
struct Finish {
  const T* bias = nullptr;      // of the columns, whole vectors; or nullptr
  const T* residual = nullptr;  // laid out in memory as C is; or nullptr
  bool bounded = false;
  Bounds<T> bounds = {};
  void (*activate)(T* x, int64_t stride, int64_t rows, int64_t count, T slope) = nullptr;  // a column of tiles at a time
  T slope = {};

  Finish from(int64_t column) const {
    Finish f = *this;
    if (bias) f.bias += column;
    if (residual) f.residual += column;
    return f;
  }
};

// One tile of `Vectors` vectors of columns; C has as many writable columns with stride 1. The strides are scalars: a
// Matrix would go through memory, where it costs more than a shallow tile's share of anything else. `A_ahead`: as many rows of A as
// come behind these, which the next tile will read, are brought near meanwhile, and so are `later_lines` cache lines from `later`
// on for each line of a row of A.
template <class T, int Rows, int Vectors, bool A_ahead>
void tile_product(const T* a, int64_t a_row_stride, int64_t a_col_stride, const T* b, int64_t b_stride, int64_t depth, T* c,
                  int64_t c_stride, bool add, const Finish<T>& finish, const T* residual, const T* later, int64_t later_lines) {
  constexpr int L = lanes<T>;
  Vector<T> sum[Rows][Vectors] = {};
  const auto fetch = [c_stride](const T* from) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; j += 2) __builtin_prefetch(from + i * c_stride + j * L);  // cache lines come in pairs
  };
  fetch(c);
  if (residual) fetch(residual);
  const int64_t step = A_ahead ? line_elements<T> : depth;
  for (int64_t first = 0; first < depth; first += step) {
    if constexpr (A_ahead) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) __builtin_prefetch(a + (Rows + i) * a_row_stride);
      for (int64_t i = 0; i < later_lines; ++i, later += line_elements<T>) __builtin_prefetch(later, 0, 2);
    }
    for (int64_t k = min(step, depth - first); k > 0; --k) {
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
  using V = Vector<T>;
  const auto each = [&](auto&& body) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) body(sum[i][j], i * c_stride + j * L, j * L);
  };
  if (add) each([&](V& x, int64_t at, int64_t) { x = load_as<V>(c + at) + x; });
  const T* bias = finish.bias;
  const auto plus_bias = [&](V x, int64_t column) { return x + load_as<V>(bias + column); };
  if (residual) {
    if (bias) each([&](V& x, int64_t, int64_t column) { x = plus_bias(x, column); });
    each([&](V& x, int64_t at, int64_t) { x += load_as<V>(residual + at); });
    bias = nullptr;
  }
  // What is left in one pass: with a shallow tile it takes as long as the products.
  const auto store = [&](auto&& finished) {
    each([&](V x, int64_t at, int64_t column) { store_as(c + at, finished(x, column)); });
  };
  const auto store_within_bounds = [&, bounds = finish.bounds](auto&& finished) {
    finish.bounded ? store([&](V x, int64_t column) { return bounds.clamp(finished(x, column)); }) : store(finished);
  };
  bias ? store_within_bounds(plus_bias) : store_within_bounds([](V x, int64_t) { return x; });
}

// A tile of `rows` <= Rows rows.
template <class T, int Vectors = 2, int Rows = tile_rows>
[[gnu::always_inline]] inline void tile_product_rows(int64_t rows, Matrix<const T> a, const T* b, int64_t b_stride,
                                                     int64_t depth, T* c, int64_t c_stride, bool add) {
  if constexpr (Rows > 1)
    if (rows < Rows) return tile_product_rows<T, Vectors, Rows - 1>(rows, a, b, b_stride, depth, c, c_stride, add);
  tile_product<T, Rows, Vectors, false>(a.data, a.row_stride, a.col_stride, b, b_stride, depth, c, c_stride, add, {}, nullptr,
                                        nullptr, 0);
}

// Operands of tiles one below the other.
template <class T>
struct TileColumn {
  Matrix<const T> a;
  const T* b;
  int64_t b_stride, depth;
  T* c;
  int64_t c_stride;
  bool add;
  const T *residual, *next;  // as Finish has it; what is brought near meanwhile, or nullptr
  int64_t next_lines;        // of `next`, beside each line of a row of A

  void skip(int64_t tiles, int64_t rows) {
    a.data += tiles * rows * a.row_stride, c += tiles * rows * c_stride;
    if (residual) residual += tiles * rows * c_stride;
    if (next) next += tiles * next_lines * round_up(depth, line_elements<T>);
  }
};

template <class T, int Vectors, int Rows>
[[gnu::noinline, gnu::flatten]] void equal_tiles(int64_t tiles, TileColumn<T> t, const Finish<T>& finish) {
  for (; tiles > 0; --tiles, t.skip(1, Rows))
    tile_product<T, Rows, Vectors, true>(t.a.data, t.a.row_stride, t.a.col_stride, t.b, t.b_stride, t.depth, t.c, t.c_stride,
                                         t.add, finish, t.residual, t.next, t.next_lines);
}

// Of `rows` <= Rows rows each.
template <class T, int Vectors, int Rows = rows_beside(Vectors)>
[[gnu::always_inline]] inline void equal_tiles_of(int64_t rows, int64_t tiles, const TileColumn<T>& t, const Finish<T>& finish) {
  if constexpr (Rows > 1)
    if (rows < Rows) return equal_tiles_of<T, Vectors, Rows - 1>(rows, tiles, t, finish);
  equal_tiles<T, Vectors, Rows>(tiles, t, finish);
}

// A column of tiles. The rows are cut evenly. next: as many rows of as many elements as there are from `b` on, which are needed
// next and brought near meanwhile, an equal share beside each tile; or nullptr.
template <class T, int Vectors>
void column_product(int64_t rows, int64_t depth, Matrix<const T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                    bool add, const Finish<T>& finish = {}, const T* next = nullptr) {
  if (rows == 0) return;
  const int64_t tiles = ceil_div(rows, rows_beside(Vectors)), large = ceil_div(rows, tiles);
  const int64_t small_tiles = large * tiles - rows, large_tiles = tiles - small_tiles;  // smaller by one row
  const int64_t lines = ceil_div(b_stride, tiles);  // line_elements rows of b are b_stride lines
  TileColumn<T> t = {a, b, b_stride, depth, c, c_stride, add, finish.residual, next, next ? lines : 0};
  equal_tiles_of<T, Vectors>(large, large_tiles, t, finish);
  t.skip(large_tiles, large);
  if (small_tiles > 0) equal_tiles_of<T, Vectors>(large - 1, small_tiles, t, finish);
  if (finish.activate) finish.activate(c, c_stride, rows, Vectors * lanes<T>, finish.slope);
}

// The same for a panel's first `vectors` <= Vectors vectors.
template <class T, int Vectors = most_vectors>
void panel_column(int64_t vectors, int64_t rows, int64_t depth, Matrix<const T> a, Panels<T> b, T* c, int64_t c_stride,
                  bool add, const Finish<T>& finish) {
  if constexpr (Vectors > 1)
    if (vectors < Vectors) return panel_column<T, Vectors - 1>(vectors, rows, depth, a, b, c, c_stride, add, finish);
  column_product<T, Vectors>(rows, depth, a, b.data, b.row_stride, c, c_stride, add, finish,
                             b.far ? b.data + b.panel_stride : nullptr);
}

// A block: rows <= block_rows, cols <= block_cols, depth <= block_depth for the caches' sake. `c` has row stride
// c_stride and room for the columns rounded up to whole vectors.
template <class T>
void block_product(int64_t rows, int64_t cols, int64_t depth, Matrix<const T> a, Panels<T> b, T* c, int64_t c_stride,
                   bool add, const Finish<T>& finish = {}) {
  for (int64_t col = 0; col < cols; col += b.cols, b.data += b.panel_stride)
    panel_column(ceil_div(min(cols - col, b.cols), lanes<T>), rows, depth, a, b, c + col, c_stride, add, finish.from(col));
}

}  // namespace
}  // namespace cvfast
