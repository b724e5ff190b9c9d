// Products whose second operand is packed once and used many times, B as [panel][depth][Cols][lanes]. A tile of Rows x Cols
// vectors stays in registers; an element is one chain of multiply-adds from 0 in the order of depth, wherever it lies in a
// tile.
//
// panel_product: few rows, and the sums go from the first-level cache into whatever follows.
// panel_block: C [rows, cols] (+)= A B, a block that fits the caches, as gemm.h has it. Its tiles are 6 rows of as many
// vectors as registers take: with 32 registers 5 % faster than gemm.h's 12 x 2, which broadcasts twice as often.
#pragma once
#include "gemm.h"
#include "simd.h"

namespace cvfast {
namespace {

// Accumulators: 12 of 16 registers, or 24 of 32.
#if CVFAST_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int panel_accumulators = 24;
#else
constexpr int panel_accumulators = 12;
#endif
constexpr int product_rows = 6, product_vectors = panel_accumulators / product_rows;
template <class T>
constexpr int product_cols = product_vectors * lanes<T>;

// Cache blocks of panel_block: A and B of this depth from the second-level cache, twice gemm.h's, so that C is read and
// written half as often.
constexpr int64_t product_block_rows = 32 * product_rows;
template <class T>
constexpr int64_t product_depth = sizeof(T) == 8 ? 128 : 512;  // of a chain of multiply-adds; float64's shorter ones err less
template <class T>
constexpr int64_t product_block_cols = 7 * product_cols<T>;

template <class T>
struct PackedPanels {
  const T* data;
  int64_t count, depth;
};

// Whether a tile's sums, a row of the panel and an element of `a` fit into the registers.
constexpr int registers = panel_accumulators == 24 ? 32 : 16;
constexpr bool fits_registers(int rows, int cols) { return rows * cols + cols + 1 <= registers; }

// Keeps v in a register: of two or three rows the compiler would rather load it again for each of them, at the cost of 15 to
// 20 % where the loads compete with what comes from the second-level cache.
template <class V>
[[gnu::always_inline]] inline void keep_in_register([[maybe_unused]] V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// sum [Rows][Cols vectors] = rows of `a` times a panel. fetch(k) brings near what will be needed later.
template <class T, int Rows, int Cols, class Fetch>
[[gnu::always_inline]] inline void multiply_panel(Matrix<const T> a, const T* b, int64_t depth,
                                                  Vector<T> (&sum)[Rows][Cols], Fetch fetch) {
  constexpr int L = lanes<T>;
  for (int64_t k = 0; k < depth; ++k, b += Cols * L) {
    fetch(k);
    Vector<T> y[Cols];
#pragma GCC unroll 4
    for (int j = 0; j < Cols; ++j) {
      y[j] = load_as<Vector<T>>(b + j * L);
      if constexpr (Rows > 1 && fits_registers(Rows, Cols)) keep_in_register(y[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T x = a.data[i * a.row_stride + k * a.col_stride];
#pragma GCC unroll 4
      for (int j = 0; j < Cols; ++j) sum[i][j] += x * y[j];
    }
  }
}

constexpr int64_t line_bytes = 64;

// A tile of panel_product: out [Rows][Cols vectors]. With `Ahead` a line of memory from `ahead` on comes near for each row of b.
template <class T, int Rows, int Cols, bool Ahead>
[[gnu::noinline]] void panel_tile(const T* a, int64_t a_stride, const T* b, int64_t depth, T* out, const char* ahead) {
  Vector<T> sum[Rows][Cols] = {};
  multiply_panel<T>(Matrix<const T>{a, a_stride, 1}, b, depth, sum, [&](int64_t k) {
    if constexpr (Ahead) __builtin_prefetch(ahead + k * line_bytes, 0, 2);
  });
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Cols; ++j) store_as(out + (i * Cols + j) * lanes<T>, sum[i][j]);
}

// One row and two panels: out [2][Cols vectors]. With narrow vectors a panel by itself makes too few chains of multiply-adds
// to hide their latency; with wide ones they wait for the second-level cache anyway, which prefers to be read in one stream.
constexpr bool pairs_of_panels = CVFAST_VECTOR_BYTES < 64;
template <class T, int Cols>
[[gnu::noinline]] void panel_pair(const T* a, const T* b, int64_t depth, T* out) {
  constexpr int L = lanes<T>;
  Vector<T> sum[2][Cols] = {};
  for (int64_t k = 0; k < depth; ++k, b += Cols * L) {
    const T x = a[k];
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p)
#pragma GCC unroll 4
      for (int j = 0; j < Cols; ++j) sum[p][j] += x * load_as<Vector<T>>(b + (p * depth * Cols + j) * L);
  }
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p)
#pragma GCC unroll 4
    for (int j = 0; j < Cols; ++j) store_as(out + (p * Cols + j) * L, sum[p][j]);
}

// A tile of `rows` <= Rows rows. `ahead`: what will be needed soon, or nullptr. One or two rows wait for the second-level cache,
// which that would delay.
template <class T, int Cols, int Rows = panel_accumulators / Cols>
void panel_tile_rows(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t depth, T* out, const char* ahead) {
  if constexpr (Rows > 1)
    if (rows < Rows) return panel_tile_rows<T, Cols, Rows - 1>(rows, a, a_stride, b, depth, out, ahead);
  if constexpr (Rows > 2)
    if (ahead) return panel_tile<T, Rows, Cols, true>(a, a_stride, b, depth, out, ahead);
  panel_tile<T, Rows, Cols, false>(a, a_stride, b, depth, out, nullptr);
}

// Some sums of panel_product: of `rows` rows from `row` on and `panels` panels from `panel` on, [panels][rows][columns], in
// L1.
template <class T>
struct PanelSums {
  int64_t row, rows, panel, panels;
  const T* sum;
};

constexpr int64_t near_bytes = int64_t{1} << 20;  // of a B that stays in the second-level cache

// Calls finish(PanelSums) for all rows and panels, a tile at a time, or, of so few rows that `finish` would have little to do
// side by side, several panels. With `last_first` the panels come in descending order: who multiplies with the same panels
// again and again changes the direction each time, so that those used last, which the cache still holds, are used first.
// `fetch` is called ahead of the product, likewise, to have brought near what `finish` will read. Where B is too large to stay in
// the second-level cache, the next panel comes near while a panel's tiles are multiplied with, a line of each row per tile.
template <class T, int Cols, class Fetch, class Finish>
void panel_product(int64_t rows, const T* a, int64_t a_stride, PackedPanels<T> b, bool last_first, Fetch&& fetch,
                   Finish&& finish) {
  constexpr int most = panel_accumulators / Cols, width = Cols * lanes<T>, few = 2, together = 8;
  alignas(64) T out[max(most, few * together) * width];
  const int64_t tiles = ceil_div(rows, most), step = rows <= few ? together : 1;
  constexpr int64_t row_bytes = width * sizeof(T);  // of a panel
  const int64_t lines = b.count * b.depth * row_bytes > near_bytes ? ceil_div(row_bytes, line_bytes) : 0;  // to be brought near
  for (int64_t i = 0; i < b.count; i += step) {
    const int64_t panels = min(step, b.count - i), panel = last_first ? b.count - i - panels : i;
    const T* from = b.data + panel * b.depth * width;
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {  // equal tiles, as far as that goes
      const int64_t count = ceil_div(rows - row, tiles - tile);
      const PanelSums<T> sums = {row, count, panel, panels, out};
      fetch(sums);
      int64_t k = 0;
      if constexpr (pairs_of_panels)
        for (; rows == 1 && k + 2 <= panels; k += 2) {
          const int64_t p = last_first ? panels - 2 - k : k;
          panel_pair<T, Cols>(a, from + p * b.depth * width, b.depth, out + p * width);
        }
      for (; k < panels; ++k) {
        const int64_t p = last_first ? panels - 1 - k : k;
        const char* next = reinterpret_cast<const char*>(from + (last_first ? -1 : 1) * b.depth * width);
        panel_tile_rows<T, Cols>(count, a + row * a_stride, a_stride, from + p * b.depth * width, b.depth,
                                 out + p * count * width, tile < lines ? next + tile * b.depth * line_bytes : nullptr);
      }
      finish(sums);
      row += count;
    }
  }
}

// A tile of panel_block. C has product_cols<T> writable columns with stride 1. `Lines` of memory from `ahead` on, which will be
// needed soon, come near for each row of B.
template <class T, int Rows, int Lines>
[[gnu::noinline]] void product_tile(Matrix<const T> a, const T* b, int64_t depth, T* c, int64_t c_stride, bool add,
                                    const char* ahead) {
  constexpr int L = lanes<T>;
  Vector<T> sum[Rows][product_vectors] = {};
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < product_vectors; ++j) __builtin_prefetch(c + i * c_stride + j * L, 1);
  multiply_panel<T>(a, b, depth, sum, [&](int64_t k) {
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(ahead + (k * Lines + i) * line_bytes, 0, 2);
  });
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < product_vectors; ++j) {
      T* to = c + i * c_stride + j * L;
      store_as(to, add ? load_as<Vector<T>>(to) + sum[i][j] : sum[i][j]);
    }
}

template <class T, int Rows = product_rows>
void product_tile_rows(int64_t rows, Matrix<const T> a, const T* b, int64_t depth, T* c, int64_t c_stride, bool add,
                       const char* ahead, int64_t lines) {
  if constexpr (Rows > 1)
    if (rows < Rows) return product_tile_rows<T, Rows - 1>(rows, a, b, depth, c, c_stride, add, ahead, lines);
  lines > 1 ? product_tile<T, Rows, 2>(a, b, depth, c, c_stride, add, ahead)
            : product_tile<T, Rows, 1>(a, b, depth, c, c_stride, add, ahead);
}

constexpr int64_t few_tiles = 4;

// Panels that are needed after those of a panel_block, as many.
template <class T>
struct LaterPanels {
  const T* data = nullptr;
  int64_t stride = 0;
};

// rows <= product_block_rows, depth <= product_depth<T> for the caches' sake. `c` has room for the columns
// rounded up to whole panels; B's are panel_stride elements apart. While it multiplies with a panel, the next one and then
// that of `later` come near, as far as there are tiles: memory is slower than a product with few rows, and otherwise idle.
template <class T>
[[gnu::noinline]] void panel_block(int64_t rows, int64_t cols, int64_t depth, Matrix<const T> a, const T* b,
                                   int64_t panel_stride, T* c, int64_t c_stride, bool add, LaterPanels<T> later = {}) {
  const int64_t next_bytes = depth * product_cols<T> * sizeof(T), later_bytes = later.stride * sizeof(T);
  const int64_t lines = rows > few_tiles * product_rows ? 1 : 2;  // more than necessary delay the products
  for (int64_t col = 0; col < cols; col += product_cols<T>, b += panel_stride, later.data += later.stride) {
    int64_t fetched = 0;
    for (int64_t row = 0, count; row < rows; row += count) {
      count = ceil_div(rows - row, ceil_div(rows - row, product_rows));
      const char* ahead = reinterpret_cast<const char*>(b);  // which is there
      if (fetched < next_bytes) ahead = reinterpret_cast<const char*>(b + panel_stride) + fetched;
      else if (fetched - next_bytes < later_bytes) ahead = reinterpret_cast<const char*>(later.data) + fetched - next_bytes;
      fetched += depth * lines * line_bytes;
      product_tile_rows<T>(count, {a.data + row * a.row_stride, a.row_stride, a.col_stride}, b, depth,
                           c + row * c_stride + col, c_stride, add, ahead, lines);
    }
  }
}

}  // namespace
}  // namespace cvfast
