// The matrix products of attention: A [rows, depth] times B [depth, cols], in tiles of up to panel_vectors vectors by as many
// rows as registers take. With 32 registers 6 x 4 vectors are 5 % faster than gemm.h's 12 x 2, which broadcast twice as
// often. B is read where it lies; an element is one chain of multiply-adds from 0 in the order of depth, wherever it lies
// in a tile.
#pragma once
#include "panel_product.h"

namespace cvfast {
namespace {

constexpr int panel_vectors = product_vectors;  // of a tile and, but for the last one, of a panel
// Where that is two, the last panel has three vectors rather than one alone, whose few sums would wait for each other.
constexpr int most_panel_vectors = max(3, panel_vectors);
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

// Rows that will be needed after the present work. Tiles ask memory for them while they multiply, a cache line every fourth
// step: as fast as memory answers. More at once keep the tile's own loads waiting.
class Ahead {
 public:
  // Lines that tiles ask for, from `next` on; at the end the last tile may ask for some more.
  struct Lines {
    const char *next, *end;
    int64_t step() const { return next < end ? line_bytes : 0; }
  };

  // What lies in [begin, begin + bytes).
  void add(const void* begin, int64_t bytes) {
    range_[ranges_++] = {static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes};
  }

  // The share of tiles of `steps` steps together; with nothing left it is `at`, which is there.
  Lines take(int64_t steps, const void* at) {
    while (next_ < ranges_ && range_[next_].next >= range_[next_].end) ++next_;
    if (next_ == ranges_) return {static_cast<const char*>(at), static_cast<const char*>(at)};
    const Lines taken = range_[next_];
    range_[next_].next += steps / 4 * line_bytes;
    return taken;
  }

 private:
  Lines range_[8];
  int ranges_ = 0, next_ = 0;
};

// Hides from the compiler where a pointer comes from: it would keep each address that is used in a loop in a register of its own,
// more than there are, instead of using address modes.
template <class T>
[[gnu::always_inline]] inline void hide_origin(const T*& pointer) { asm("" : "+r"(pointer)); }

// A by rows, each of them contiguous: of a tile, pointers to every third one, since address modes reach the two that follow.
template <class T>
struct RowsOfA {
  const T* data;
  int64_t stride;
  RowsOfA at(int64_t row) const { return {data + row * stride, stride}; }

  template <int Rows>
  class Tile {
   public:
    explicit Tile(RowsOfA a) : stride_(a.stride) {
#pragma GCC unroll 4
      for (int i = 0; i < Rows; i += group) {
        start_[i / group] = a.data + i * stride_;
        hide_origin(start_[i / group]);
      }
    }
    // Elements of column `step` from here.
    [[gnu::always_inline]] T get(int row, int step) const { return start_[row / group][row % group * stride_ + step]; }
    [[gnu::always_inline]] void next() {}
    [[gnu::always_inline]] void move(int steps) {
#pragma GCC unroll 4
      for (const T*& start : start_) {
        start += steps;
        hide_origin(start);
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
    explicit Tile(ColumnsOfA a) : data_(a.data), stride_(a.stride) {}
    // Elements of the column that next() has come to.
    [[gnu::always_inline]] T get(int row, int) const { return data_[row]; }
    [[gnu::always_inline]] void next() {
      data_ += stride_;
      hide_origin(data_);
    }
    [[gnu::always_inline]] void move(int) {}

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

// What becomes of the sums: to (+)= sum. first_chain: the length of the first chain of multiply-adds; the rest of the depth is a
// second one, which is added to it.
template <class T>
struct StoreSums {
  static int64_t first_chain(int64_t depth) { return depth; }
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
  static int64_t first_chain(int64_t depth) { return min(depth, max<int64_t>(32, ceil_div(depth, 2))); }
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
      for (int i = 0; i < Rows; ++i) top = greater_of(sum[i][j], top);  // leaves a NaN to the exponential
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
  static int64_t first_chain(int64_t depth) { return depth; }
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

// sum += x * y. The compiler would let the sum move from register to register, with copies each time around a loop.
template <class T>
[[gnu::always_inline]] inline void multiply_add(Vector<T> x, Vector<T> y, Vector<T>& sum) {
#if defined(__FMA__) && CVFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y));
#else
  sum += x * y;
#endif
}

// What a tile has yet to multiply.
template <class T, class A, int Rows, int Vectors>
struct TileSteps {
  typename A::template Tile<Rows> a;
  const T* b;
  const int64_t b_stride;

  // sum = the next `steps` steps. A chain begins with products: setting all sums to 0 took twenty cycles more.
  [[gnu::always_inline]] void chain(int64_t steps, const char*& ahead, int64_t ahead_step, Vector<T> (&sum)[Rows][Vectors]) {
    if (steps >= 4) {
      multiply<4, false>(sum);
      for (steps -= 4; steps >= 4; steps -= 4) {
        ask(ahead, ahead_step);
        multiply<4, true>(sum);
      }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector<T>{};
    }
    for (; steps > 0; --steps) multiply<1, true>(sum);
  }

 private:
  [[gnu::always_inline]] static void ask(const char*& ahead, int64_t ahead_step) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += ahead_step;
  }

  // sum (+)= the next `Steps` columns of A times as many rows of B.
  template <int Steps, bool add>
  [[gnu::always_inline]] void multiply(Vector<T> (&sum)[Rows][Vectors]) {
#pragma GCC unroll 4
    for (int step = 0; step < Steps; ++step) {
      Vector<T> y[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) y[j] = load_as<Vector<T>>(b + j * lanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vector<T> x = a.get(i, step) - Vector<T>{};  // in all lanes
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j)
          if (add || step > 0)
            multiply_add<T>(x, y[j], sum[i][j]);
          else
            sum[i][j] = x * y[j];
      }
      a.next();
      b += b_stride;
      hide_origin(b);
    }
    a.move(Steps);
  }
};

// Tiles of a product: `count` columns of them from `col` on, each of `tiles` tiles from `row` on.
struct Tiles {
  int64_t row, tiles, col, count;
};

// The operands come by reference and are not copied: a copy would wait until the stores that made the original are done, and
// those wait for the tile before.
template <class T, class A, int Rows, int Vectors, class Store>
[[gnu::noinline]] void attention_tiles(const TileOperands<T, A>& m, const Store& store, Tiles part, Ahead::Lines ahead) {
  const int64_t depth = m.depth, first = Store::first_chain(depth);
  for (int64_t column = 0; column < part.count; ++column)
    for (int64_t tile = 0; tile < part.tiles; ++tile) {
      const int64_t row = part.row + tile * Rows, col = part.col + column * Vectors * lanes<T>;
      const int64_t ahead_step = ahead.step();
      TileSteps<T, A, Rows, Vectors> rest = {typename A::template Tile<Rows>(m.a.at(row)), m.b + col, m.b_stride};
      Vector<T> sum[Rows][Vectors];
      rest.chain(first, ahead.next, ahead_step, sum);
      if (first < depth) {
        alignas(64) T parked[Rows][Vectors * lanes<T>];
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < Vectors; ++j) store_as(parked[i] + j * lanes<T>, sum[i][j]);
        asm("" : : "r"(parked) : "memory");  // or the compiler would drive the second chain out of its registers
        rest.chain(depth - first, ahead.next, ahead_step, sum);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < Vectors; ++j) sum[i][j] += load_as<Vector<T>>(parked[i] + j * lanes<T>);
      }
      store.at(row, col)(sum);
    }
}

// The same of `rows` <= Rows rows each.
template <class T, int Vectors, class A, class Store, int Rows = rows_of_tile<Vectors>>
void attention_tiles_of(int64_t rows, const TileOperands<T, A>& m, const Store& store, Tiles part, Ahead& ahead) {
  if constexpr (Rows > 1)
    if (rows < Rows) return attention_tiles_of<T, Vectors, A, Store, Rows - 1>(rows, m, store, part, ahead);
  attention_tiles<T, A, Rows, Vectors>(m, store, part, ahead.take(part.count * part.tiles * m.depth, m.b));
}

// `count` columns of `Vectors` vectors from `col` on. Rows are cut evenly: the first tiles may have one more than the others.
template <class T, int Vectors, class A, class Store>
void tile_columns(int64_t rows, int64_t col, int64_t count, const TileOperands<T, A>& m, const Store& store, Ahead& ahead) {
  if (rows <= 0 || count <= 0) return;
  const int64_t tiles = ceil_div(rows, rows_of_tile<Vectors>), least = rows / tiles, larger = rows - tiles * least;
  if (larger > 0) attention_tiles_of<T, Vectors>(least + 1, m, store, {0, larger, col, count}, ahead);
  attention_tiles_of<T, Vectors>(least, m, store, {larger * (least + 1), tiles - larger, col, count}, ahead);
}

// The whole product; the columns, in whole vectors, are cut evenly, too.
template <class T, class A, class Store>
void tile_product(int64_t rows, int64_t cols, const TileOperands<T, A>& m, const Store& store, Ahead& ahead) {
  const int64_t vectors = ceil_div(cols, lanes<T>), count = ceil_div(vectors, panel_vectors);
  if (count == 0) return;
  const int64_t least = vectors / count;
  const int64_t larger = vectors - count * least, rest = larger * (least + 1) * lanes<T>;
  auto columns = [&](int64_t width, int64_t col, int64_t number) {
    with_vectors<T>(width * lanes<T>, [&](auto n) { tile_columns<T, n.value>(rows, col, number, m, store, ahead); });
  };
  if (larger > 0) columns(least + 1, 0, larger);
  columns(least, rest, count - larger);
}

}  // namespace
}  // namespace cvfast
