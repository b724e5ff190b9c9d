// The matrix product of gemm.h for a few rows of A and rows of B that are read in place: row k of B begins at
// data + offset[k]. The chain of operations per element is the same.
#pragma once
#include "gemm.h"

namespace cvfast {
namespace {

template <class T>
struct IndirectRows {
  const T* data;
  const int64_t* offset;
};

// What becomes of C: the chain from 0, the chain that goes on from C, or C plus the chain from 0.
enum class Chain { start, resume, add };

// Vectors side by side in a tile of `rows` rows: as many sums as gemm.h's tile has, at most 8.
constexpr int indirect_vectors(int rows) { return min(8, 2 * tile_rows / rows); }

// One tile of C: Rows x (Cols vectors), of which the last one begins at column `last`: at (Cols - 1) * lanes, or before, to
// end with the matrix. `a` is [depth, Rows]. bias [Rows] is added at the end, or nullptr.
template <class T, int Rows, int Cols>
void indirect_tile(int64_t depth, const T* a, IndirectRows<T> b, int64_t last, T* c, int64_t c_stride, Chain chain,
                   const T* bias) {
  constexpr int L = lanes<T>;
  using V = Vector<T>;
  const auto column = [&](int j) { return j < Cols - 1 ? j * L : last; };
  const T* b_last = b.data + last;
  V sum[Rows][Cols] = {};
  if (chain == Chain::resume)
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < Cols; ++j) sum[i][j] = load_as<V>(c + i * c_stride + column(j));
  for (int64_t k = 0; k < depth; ++k) {
    const auto row = [&, at = b.offset[k]](int j) { return load_as<V>(j < Cols - 1 ? b.data + at + j * L : b_last + at); };
    if constexpr (Rows < Cols) {
#pragma GCC unroll 16
      for (int j = 0; j < Cols; ++j) {
        const V x = row(j);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) sum[i][j] += a[i] * x;
      }
    } else {
      V x[Cols];
#pragma GCC unroll 16
      for (int j = 0; j < Cols; ++j) x[j] = row(j);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Cols; ++j) sum[i][j] += a[i] * x[j];
    }
    a += Rows;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < Cols; ++j) {
      T* to = c + i * c_stride + column(j);
      V value = chain == Chain::add ? load_as<V>(to) + sum[i][j] : sum[i][j];
      if (bias) value += bias[i];
      store_as(to, value);
    }
}

// The last, narrower tile of a row of tiles.
template <class T, int Rows, int Cols>
void last_indirect_tile(int64_t vectors, int64_t depth, const T* a, IndirectRows<T> b, int64_t last, T* c, int64_t c_stride,
                        Chain chain, const T* bias) {
  if constexpr (Cols > 0) {
    if (vectors < Cols) return last_indirect_tile<T, Rows, Cols - 1>(vectors, depth, a, b, last, c, c_stride, chain, bias);
    indirect_tile<T, Rows, Cols>(depth, a, b, last, c, c_stride, chain, bias);
  }
}

// C [rows, cols] for rows <= tile_rows. exact: just these columns are read and written (cols >= lanes, not Chain::add);
// else B may be read, and C written, up to the end of a column's vector.
template <class T, int Rows = tile_rows>
void indirect_product(int64_t rows, int64_t cols, int64_t depth, const T* a, IndirectRows<T> b, T* c, int64_t c_stride,
                      Chain chain, const T* bias = nullptr, bool exact = false) {
  if constexpr (Rows > 1)
    if (rows < Rows) return indirect_product<T, Rows - 1>(rows, cols, depth, a, b, c, c_stride, chain, bias, exact);
  constexpr int64_t L = lanes<T>, vectors = indirect_vectors(Rows);
  for (; cols >= vectors * L; cols -= vectors * L, b.data += vectors * L, c += vectors * L)
    indirect_tile<T, Rows, vectors>(depth, a, b, (vectors - 1) * L, c, c_stride, chain, bias);
  const int64_t last = exact ? cols - L : round_up(cols, L) - L;
  last_indirect_tile<T, Rows, vectors>(ceil_div(cols, L), depth, a, b, last, c, c_stride, chain, bias);
}

// A stride whose multiples the compiler makes where they are used: made before a loop they drive sums out of their registers.
inline int64_t made_here(int64_t stride) {
  asm volatile("" : "+r"(stride));
  return stride;
}

// The same with the roles exchanged, for `tiles` tiles one below the other: A is read in place, element (i, k) at
// a.data[a.offset[k] + i * a_step], and B is [depth, Cols vectors]. bias [Cols vectors] or nullptr.
template <class T, int Rows, int Cols>
void indirect_a_tiles(int64_t tiles, int64_t depth, IndirectRows<T> a, int64_t a_step, const T* b, T* c, int64_t c_stride,
                      Chain chain, const T* bias, Bounds<T> bounds) {
  constexpr int L = lanes<T>;
  using V = Vector<T>;
  for (; tiles > 0; --tiles, a.data += Rows * a_step, c += Rows * c_stride) {
    V sum[Rows][Cols] = {};
    // What the next tile writes: memory takes longer than one tile.
    const T* next = c + Rows * c_stride;
#pragma GCC unroll 1
    for (int i = 0; i < Rows; ++i, next += c_stride) __builtin_prefetch(next, 1);
    if (const int64_t stride = made_here(c_stride); chain == Chain::resume)
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Cols; ++j) sum[i][j] = load_as<V>(c + i * stride + j * L);
    const T* row = b;
    for (int64_t k = 0; k < depth; ++k, row += Cols * L) {
      const T* x = a.data + a.offset[k];
      V w[Cols];
#pragma GCC unroll 16
      for (int j = 0; j < Cols; ++j) w[j] = load_as<V>(row + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Cols; ++j) sum[i][j] += x[i * a_step] * w[j];
    }
    const int64_t stride = made_here(c_stride);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < Cols; ++j) {
        T* to = c + i * stride + j * L;
        V value = chain == Chain::add ? load_as<V>(to) + sum[i][j] : sum[i][j];
        if (bias) value += load_as<V>(bias + j * L);
        store_as(to, bounds.clamp(value));
      }
  }
}

template <class T, int Rows = tile_rows>
void indirect_a_tiles_of(int64_t rows, int64_t tiles, int64_t cols, int64_t depth, IndirectRows<T> a, int64_t a_step,
                         const T* b, T* c, int64_t c_stride, Chain chain, const T* bias, Bounds<T> bounds) {
  if constexpr (Rows > 1)
    if (rows < Rows)
      return indirect_a_tiles_of<T, Rows - 1>(rows, tiles, cols, depth, a, a_step, b, c, c_stride, chain, bias, bounds);
  if (cols == tile_cols<T>)
    indirect_a_tiles<T, Rows, 2>(tiles, depth, a, a_step, b, c, c_stride, chain, bias, bounds);
  else
    indirect_a_tiles<T, Rows, 1>(tiles, depth, a, a_step, b, c, c_stride, chain, bias, bounds);
}

// C [rows, cols] for one or two vectors of columns. What is stored lies within `bounds`.
template <class T>
void indirect_a_product(int64_t rows, int64_t cols, int64_t depth, IndirectRows<T> a, int64_t a_step, const T* b, T* c,
                        int64_t c_stride, Chain chain, const T* bias = nullptr, Bounds<T> bounds = {}) {
  const int64_t step = ceil_div(rows, ceil_div(rows, tile_rows));  // tiles of nearly equal size
  const int64_t whole = rows / step, rest = rows % step, row = whole * step;
  indirect_a_tiles_of<T>(step, whole, cols, depth, a, a_step, b, c, c_stride, chain, bias, bounds);
  if (rest > 0)
    indirect_a_tiles_of<T>(rest, 1, cols, depth, IndirectRows<T>{a.data + row * a_step, a.offset}, a_step, b,
                           c + row * c_stride, c_stride, chain, bias, bounds);
}

}  // namespace
}  // namespace cvfast
