// The matrix products of attention: A [rows, depth] times B [depth, cols], in tiles of up to panel_vectors vectors by as many
// rows as registers take. With 32 registers 6 x 4 vectors are 5 % faster than gemm.h's 12 x 2, which broadcast twice as
// often. B is read where it lies; an element is one chain of multiply-adds from 0 in the order of depth, wherever it lies
// in a tile.
#pragma once
#include "panel_product.h"

namespace cvfast {
namespace {

constexpr int panel_vectors = product_vectors;
template <int Vectors>
constexpr int rows_of_tile = min(tile_rows, panel_accumulators / Vectors);

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(Count<n>{}) with the number n of vectors, at most panel_vectors, that hold `elements` > 0.
template <class T, int N = panel_vectors, class Body>
[[gnu::always_inline]] inline void with_vectors(int64_t elements, Body&& body) {
  if constexpr (N > 1)
    if (elements <= (N - 1) * lanes<T>) return with_vectors<T, N - 1>(elements, body);
  body(Count<N>{});
}

// The next of evenly cut pieces of at most `most`.
inline int64_t even_piece(int64_t rest, int64_t most) { return ceil_div(rest, ceil_div(rest, most)); }

// Rows that will be needed after the present work. Tiles ask memory for them while they multiply, a cache line every second
// step: as fast as memory answers. More at once would keep the tile's own loads waiting.
class Ahead {
 public:
  // Lines that a tile asks for: `line(k)` at steps k and k + 1.
  struct Lines {
    const char* first;
    int64_t last;
    [[gnu::always_inline]] const char* line(int64_t k) const { return first + min(k / 2, last) * line_bytes; }
  };

  // What lies in [begin, begin + bytes).
  void add(const void* begin, int64_t bytes) {
    range_[ranges_++] = {static_cast<const char*>(begin), ceil_div(bytes, line_bytes)};
  }

  // The share of a tile of `steps` steps; with nothing left it is `at`, which is there.
  Lines take(int64_t steps, const void* at) {
    while (next_ < ranges_ && range_[next_].lines == 0) ++next_;
    if (next_ == ranges_) return {static_cast<const char*>(at), 0};
    Range& range = range_[next_];
    const int64_t count = min(ceil_div(steps, 2), range.lines);
    const Lines taken = {range.begin, max<int64_t>(0, count - 1)};
    range.begin += count * line_bytes, range.lines -= count;
    return taken;
  }

 private:
  struct Range {
    const char* begin;
    int64_t lines;
  };
  Range range_[8];
  int ranges_ = 0, next_ = 0;
};

// A by rows, each of them contiguous: of a tile, pointers to every third one, since address modes reach the two that follow, and
// the compiler would keep a register for each row, more than there are.
template <class T>
struct RowsOfA {
  const T* data;
  int64_t stride;
  RowsOfA at(int64_t row) const { return {data + row * stride, stride}; }

  template <int Rows>
  class Tile {
   public:
    Tile(RowsOfA a, int64_t k) : stride_(a.stride) {
#pragma GCC unroll 4
      for (int i = 0; i < Rows; i += group) {
        start_[i / group] = a.data + i * stride_ + k;
        asm("" : "+r"(start_[i / group]));
      }
    }
    // Elements of column `step` from here.
    [[gnu::always_inline]] T get(int row, int step) const { return start_[row / group][row % group * stride_ + step]; }
    [[gnu::always_inline]] void move(int steps) {
#pragma GCC unroll 4
      for (const T*& start : start_) {
        start += steps;
        asm("" : "+r"(start));
      }
    }

   private:
    static constexpr int group = 3;
    const T* start_[(Rows + group - 1) / group];
    int64_t stride_;
  };
};

// A by columns, each of them contiguous.
template <class T>
struct ColumnsOfA {
  const T* data;
  int64_t stride;
  ColumnsOfA at(int64_t row) const { return {data + row, stride}; }

  template <int Rows>
  class Tile {
   public:
    Tile(ColumnsOfA a, int64_t k) : data_(a.data + k * a.stride), stride_(a.stride) {}
    [[gnu::always_inline]] T get(int row, int step) const { return data_[step * stride_ + row]; }
    [[gnu::always_inline]] void move(int steps) { data_ += steps * stride_; }

   private:
    const T* data_;
    int64_t stride_;
  };
};

// A: RowsOfA or ColumnsOfA. B has row stride b_stride.
template <class T, class A>
struct TileOperands {
  A a;
  const T* b;
  int64_t b_stride, depth;
  TileOperands at(int64_t row, int64_t col) const { return {a.at(row), b + col, b_stride, depth}; }
};

// What becomes of the sums: to (+)= sum. second_chain: where in the depth a second chain of multiply-adds begins, which is
// added to the first.
template <class T>
struct StoreSums {
  static int64_t second_chain(int64_t depth) { return depth; }
  T* to;
  int64_t stride;
  bool add;
  StoreSums at(int64_t row, int64_t col) const { return {to + row * stride + col, stride, add}; }
  // What stands there before sums are added, and what is done in the end.
  void begin(int64_t rows, int64_t cols) const {
    if (!add) zero_matrix(Matrix<T>{to, stride, 1}, rows, cols);
  }
  void end(int64_t, int64_t) const {}
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void operator()(const Vector<T> (&sum)[Rows][Vectors]) const {
    const StoreSums<T> s = *this;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        T* const place = s.to + i * s.stride + j * lanes<T>;
        store_as(place, s.add ? load_as<Vector<T>>(place) + sum[i][j] : sum[i][j]);
      }
  }
};

// to = sum. An error of a score is its weight's relative error, and a chain's last steps err most: two chains of half the
// size halve the largest error of attention. maximum [columns]: brought up to date, where it isn't nullptr.
template <class T>
struct StoreScores {
  static int64_t second_chain(int64_t depth) { return min(depth, max<int64_t>(32, ceil_div(depth, 2))); }
  T* to;
  int64_t stride;
  T* maximum;
  StoreScores at(int64_t row, int64_t col) const {
    return {to + row * stride + col, stride, maximum ? maximum + col : nullptr};
  }
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void operator()(const Vector<T> (&sum)[Rows][Vectors]) const {
    StoreSums<T>{to, stride, false}(sum);
    if (!maximum) return;
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      Vector<T> top = load_as<Vector<T>>(maximum + j * lanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) top = sum[i][j] > top ? sum[i][j] : top;  // leaves a NaN to the exponential
      store_as(maximum + j * lanes<T>, top);
    }
  }
};

template <class T>
void scale_rows(T* rows, int64_t stride, int64_t count, int64_t size, const T* factor) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < size; ++d) rows[i * stride + d] *= factor[i];
}

// to = (before * rescale + sum) * factor, row by row. rescale nullptr: nothing before; factor nullptr: 1.
template <class T>
struct MergeSums {
  static int64_t second_chain(int64_t depth) { return depth; }
  const T* before;
  int64_t before_stride;
  const T* rescale;
  T* to;
  int64_t stride;
  const T* factor;
  MergeSums at(int64_t row, int64_t col) const {
    return {before + row * before_stride + col, before_stride, rescale ? rescale + row : nullptr,
            to + row * stride + col, stride, factor ? factor + row : nullptr};
  }
  void begin(int64_t rows, int64_t cols) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < cols; ++d) to[i * stride + d] = rescale ? before[i * before_stride + d] * rescale[i] : T{};
  }
  void end(int64_t rows, int64_t cols) const {
    if (factor) scale_rows(to, stride, rows, cols, factor);
  }
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void operator()(const Vector<T> (&sum)[Rows][Vectors]) const {
    const MergeSums<T> s = *this;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T earlier = s.rescale ? s.rescale[i] : T{}, scale = s.factor ? s.factor[i] : T{1};
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        const T* const place = s.before + i * s.before_stride + j * lanes<T>;
        const Vector<T> merged = s.rescale ? load_as<Vector<T>>(place) * earlier + sum[i][j] : sum[i][j];
        store_as(s.to + i * s.stride + j * lanes<T>, merged * scale);
      }
    }
  }
};

// sum += column `step` of A times row `step` of B.
template <class T, class A, int Rows, int Vectors>
[[gnu::always_inline]] inline void add_product(const A& a, const T* b, int step, Vector<T> (&sum)[Rows][Vectors]) {
  Vector<T> y[Vectors];
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) y[j] = load_as<Vector<T>>(b + j * lanes<T>);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const T x = a.get(i, step);
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[i][j] += x * y[j];
  }
}

template <class T, class A, int Rows, int Vectors>
[[gnu::always_inline]] inline void add_products(const TileOperands<T, A>& m, int64_t first, int64_t last,
                                                const Ahead::Lines& ahead, Vector<T> (&sum)[Rows][Vectors]) {
  typename A::template Tile<Rows> a(m.a, first);
  const T* b = m.b + first * m.b_stride;
  const int64_t b_stride = m.b_stride;
  int64_t k = first;
  for (; k + 2 <= last; k += 2, a.move(2), b += 2 * b_stride) {
    __builtin_prefetch(ahead.line(k), 0, 2);
    add_product<T>(a, b, 0, sum);
    add_product<T>(a, b + b_stride, 1, sum);
  }
  if (k < last) add_product<T>(a, b, 0, sum);
}

template <class T, class A, int Rows, int Vectors, class Store>
[[gnu::noinline]] void attention_tile(const TileOperands<T, A>& m, const Store& store, const Ahead::Lines ahead) {
  Vector<T> sum[Rows][Vectors] = {};
  const int64_t second = Store::second_chain(m.depth);
  add_products<T>(m, 0, second, ahead, sum);
  if (second < m.depth) {
    alignas(64) T parked[Rows][Vectors * lanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) store_as(parked[i] + j * lanes<T>, sum[i][j]), sum[i][j] = Vector<T>{};
    asm("" : : "r"(parked) : "memory");  // or the compiler would drive the second chain out of its registers
    add_products<T>(m, second, m.depth, ahead, sum);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] += load_as<Vector<T>>(parked[i] + j * lanes<T>);
  }
  store(sum);
}

// A tile of `rows` <= Rows rows.
template <class T, class A, int Vectors, class Store, int Rows = rows_of_tile<Vectors>>
void attention_tile_rows(int64_t rows, const TileOperands<T, A>& m, const Store& store, const Ahead::Lines& ahead) {
  if constexpr (Rows > 1)
    if (rows < Rows) return attention_tile_rows<T, A, Vectors, Store, Rows - 1>(rows, m, store, ahead);
  attention_tile<T, A, Rows, Vectors>(m, store, ahead);
}

// A column of tiles, whose rows are cut evenly.
template <class T, int Vectors, class A, class Store>
void tile_column(int64_t rows, const TileOperands<T, A>& m, const Store& store, Ahead& ahead) {
  for (int64_t row = 0, count; row < rows; row += count) {
    count = even_piece(rows - row, rows_of_tile<Vectors>);
    attention_tile_rows<T, A, Vectors>(count, m.at(row, 0), store.at(row, 0), ahead.take(m.depth, m.b));
  }
}

// The whole product; the columns, in whole vectors, are cut evenly, too.
template <class T, class A, class Store>
void tile_product(int64_t rows, int64_t cols, const TileOperands<T, A>& m, const Store& store, Ahead& ahead) {
  for (int64_t col = 0, count; col < cols; col += count) {
    count = even_piece(ceil_div(cols - col, lanes<T>), panel_vectors) * lanes<T>;
    with_vectors<T>(count, [&](auto n) { tile_column<T, n.value>(rows, m.at(0, col), store.at(0, col), ahead); });
  }
}

}  // namespace
}  // namespace cvfast
