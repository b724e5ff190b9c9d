// Products whose second operand is packed once and used many times, B as [panel][piece][depth][vectors][lanes]. A tile of
// Rows x Cols vectors stays in registers; an element is a sum of chains of multiply-adds from 0 in the order of depth, of
// product_depth each, wherever it lies in a tile.
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
// A panel of Cols vectors is packed in pieces, one after the other, if it is made of such that a tile of product_rows rows takes.
template <int Cols>
constexpr int piece_vectors = Cols % product_vectors == 0 ? product_vectors : Cols;

// Cache blocks of panel_block: A and B of this depth from the second-level cache.
constexpr int64_t product_block_rows = 32 * product_rows;
template <class T>
constexpr int64_t product_depth = sizeof(T) == 8 ? 128 : 256;  // of a chain of multiply-adds: shorter ones err less
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
#if defined(__AVX512F__) || (defined(__x86_64__) && CVFAST_VECTOR_BYTES < 64)  // emulated vectors have no register
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// sum [Rows][Pieces * Cols] += rows of `a` times pieces of B, Cols vectors each and piece_stride elements apart. fetch(k) brings
// near what will be needed later.
template <class T, int Cols, int Rows, int All, class Fetch>
[[gnu::always_inline]] inline void multiply_pieces(Matrix<const T> a, const T* b, int64_t depth, int64_t piece_stride,
                                                   Vector<T> (&sum)[Rows][All], Fetch fetch) {
  constexpr int L = lanes<T>;
  // Which operand stays in registers, if one does, while the other one's vectors come one by one.
  constexpr bool holds_b = Rows > 1 && fits_registers(Rows, All), holds_a = !holds_b && fits_registers(All, Rows);
  for (int64_t k = 0; k < depth; ++k, b += Cols * L) {
    fetch(k);
    Vector<T> x[Rows], y[All];
#pragma GCC unroll 16
    for (int i = 0; holds_a && i < Rows; ++i) {
      x[i] = Vector<T>{} + a.data[i * a.row_stride + k * a.col_stride];
      keep_in_register(x[i]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < All; ++j) {
      y[j] = load_as<Vector<T>>(b + j / Cols * piece_stride + j % Cols * L);
      if constexpr (holds_b) keep_in_register(y[j]);
      if constexpr (holds_a)
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) sum[i][j] += x[i] * y[j];
    }
    if constexpr (holds_a) continue;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T element = a.data[i * a.row_stride + k * a.col_stride];
#pragma GCC unroll 16
      for (int j = 0; j < All; ++j) sum[i][j] += element * y[j];
    }
  }
}

constexpr int64_t line_bytes = 64;

// A tile of panel_product: rows of `out` [Rows][Pieces][Cols vectors]. With `Ahead` a line of memory from `ahead` on comes near
// for each row of b.
template <class T, int Rows, int Pieces, int Cols, bool Ahead>
[[gnu::noinline]] void panel_tile(const T* a, int64_t a_stride, const T* b, int64_t depth, T* out, int64_t out_stride,
                                  const char* ahead) {
  for (int64_t first = 0; first == 0 || first < depth; first += product_depth<T>) {
    Vector<T> sum[Rows][Pieces * Cols] = {};
    multiply_pieces<T, Cols>(Matrix<const T>{a + first, a_stride, 1}, b + first * Cols * lanes<T>, min(product_depth<T>, depth - first),
                             depth * Cols * lanes<T>, sum, [&](int64_t k) {
                               if constexpr (Ahead) __builtin_prefetch(ahead + (first + k) * line_bytes, 0, 2);
                             });
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < Pieces * Cols; ++j) {
        T* to = out + i * out_stride + j * lanes<T>;
        store_as(to, first > 0 ? load_as<Vector<T>>(to) + sum[i][j] : sum[i][j]);
      }
  }
}

// A tile of `rows` <= Rows rows and one piece. `ahead`: what will be needed soon, or nullptr. One or two rows wait for the
// second-level cache, which that would delay.
template <class T, int Cols, int Rows = panel_accumulators / Cols>
void panel_tile_rows(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t depth, T* out, int64_t out_stride,
                     const char* ahead) {
  if constexpr (Rows > 1)
    if (rows < Rows) return panel_tile_rows<T, Cols, Rows - 1>(rows, a, a_stride, b, depth, out, out_stride, ahead);
  if constexpr (Rows > 2)
    if (ahead) return panel_tile<T, Rows, 1, Cols, true>(a, a_stride, b, depth, out, out_stride, ahead);
  panel_tile<T, Rows, 1, Cols, false>(a, a_stride, b, depth, out, out_stride, nullptr);
}

// Few rows: with narrow vectors one piece makes too few chains of multiply-adds to hide their latency; with wide ones they wait
// for the second-level cache anyway, which prefers to be read in one stream.
constexpr int enough_chains = 8;
constexpr bool narrow = CVFAST_VECTOR_BYTES < 64;
constexpr int few_rows = narrow ? 3 : 2;
constexpr int pieces_together(int rows, int cols) { return narrow ? (enough_chains + rows * cols - 1) / (rows * cols) : 1; }

// `rows` <= Rows rows and `pieces` pieces, in descending order with `last_first`: rows of `out` [pieces][Cols vectors].
template <class T, int Cols, int Rows = few_rows>
void few_row_tiles(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t pieces, int64_t depth, bool last_first,
                   T* out, int64_t out_stride) {
  if constexpr (Rows > 1)
    if (rows < Rows) return few_row_tiles<T, Cols, Rows - 1>(rows, a, a_stride, b, pieces, depth, last_first, out, out_stride);
  constexpr int together = pieces_together(Rows, Cols), width = Cols * lanes<T>;
  const int64_t groups = ceil_div(pieces, together);
  for (int64_t group = 0; group < groups; ++group) {
    int64_t p = (last_first ? groups - 1 - group : group) * together;
    const T* from = b + p * depth * width;
    if (p + together <= pieces)
      panel_tile<T, Rows, together, Cols, false>(a, a_stride, from, depth, out + p * width, out_stride, nullptr);
    else if constexpr (together > 1)
      for (; p < pieces; ++p, from += depth * width)
        panel_tile<T, Rows, 1, Cols, false>(a, a_stride, from, depth, out + p * width, out_stride, nullptr);
  }
}

// Some sums of panel_product: of `rows` rows from `row` on and `panels` panels from `panel` on, [rows][panels][columns], in
// L1.
template <class T>
struct PanelSums {
  int64_t row, rows, panel, panels;
  const T* sum;
};

constexpr int64_t near_bytes = int64_t{1} << 20;  // of a B that stays in the second-level cache

// Calls finish(PanelSums) for all rows and panels, some tiles at a time, or, of so few rows that `finish` would have little to do
// side by side, several panels. With `last_first` the panels come in descending order: who multiplies with the same panels
// again and again changes the direction each time, so that those used last, which the cache still holds, are used first.
// `fetch` is called ahead of the product, likewise, to have brought near what `finish` will read. Where B is too large to stay in
// the second-level cache, the next piece comes near while a piece's tiles are multiplied with, a line of each row per tile.
template <class T, int Cols, class Fetch, class Finish>
void panel_product(int64_t rows, const T* a, int64_t a_stride, PackedPanels<T> b, bool last_first, Fetch&& fetch,
                   Finish&& finish) {
  constexpr int piece = piece_vectors<Cols>, pieces = Cols / piece, most = panel_accumulators / piece;
  constexpr int width = Cols * lanes<T>, piece_width = piece * lanes<T>;
  if (rows <= few_rows) {
    constexpr int together = 8;
    alignas(64) T out[few_rows * together * width];
    for (int64_t i = 0; rows > 0 && i < b.count; i += together) {
      const int64_t panels = min<int64_t>(together, b.count - i), panel = last_first ? b.count - i - panels : i;
      const PanelSums<T> sums = {0, rows, panel, panels, out};
      fetch(sums);
      few_row_tiles<T, piece>(rows, a, a_stride, b.data + panel * b.depth * width, panels * pieces, b.depth, last_first, out,
                              panels * width);
      finish(sums);
    }
    return;
  }
  constexpr int tiles_together = pieces > 1 ? 8 : 1;
  alignas(64) T out[tiles_together * most * width];
  const int64_t tiles = ceil_div(rows, most);
  constexpr int64_t row_bytes = piece_width * sizeof(T);
  const bool far = b.count * b.depth * width * static_cast<int64_t>(sizeof(T)) > near_bytes;
  const int64_t lines = far ? ceil_div(row_bytes, line_bytes) : 0;  // of a row, to be brought near
  for (int64_t i = 0; i < b.count; ++i) {
    const int64_t panel = last_first ? b.count - 1 - i : i;
    for (int64_t first = 0, first_row = 0, row; first < tiles; first += tiles_together, first_row = row) {
      for (int p = 0; p < pieces; ++p) {
        const int at = last_first ? pieces - 1 - p : p;
        const T* from = b.data + (panel * pieces + at) * b.depth * piece_width;
        const char* next = reinterpret_cast<const char*>(from + (last_first ? -1 : 1) * b.depth * piece_width);
        row = first_row;
        for (int64_t tile = first; tile < min(tiles, first + tiles_together); ++tile) {  // equal tiles, as far as that goes
          const int64_t count = ceil_div(rows - row, tiles - tile);
          if (p == 0) fetch(PanelSums<T>{row, count, panel, 1, out});
          panel_tile_rows<T, piece>(count, a + row * a_stride, a_stride, from, b.depth,
                                    out + (row - first_row) * width + at * piece_width, width,
                                    tile < lines ? next + tile * b.depth * line_bytes : nullptr);
          row += count;
        }
      }
      finish(PanelSums<T>{first_row, row - first_row, panel, 1, out});
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
  multiply_pieces<T, product_vectors>(a, b, depth, 0, sum, [&](int64_t k) {
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
