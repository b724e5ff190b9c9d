// What the passes of attention share: blocks of visible keys, and the scores of one panel of queries with one block.
//
// A panel is up to panel_queries queries, in whole vectors, one lane each. Scores lie transposed, [key][query of the panel],
// so that softmax works lane by lane, and both the keys (for the scores) and the weights (for the output) are the broadcast operand of
// the matrix product. Scores are kept in units of log 2: the query takes scale * log2(e).
#pragma once
#include "../cache_size.h"
#include "../scratch.h"
#include "attention_dropout.h"
#include "attention_few_queries.h"
#include "cvfast/attention.h"
#include "exp.h"
#include "parallel.h"
#include "transpose.h"

namespace cvfast {
namespace {

template <class T>
constexpr T infinity = static_cast<T>(__builtin_inf());

// Row stride of a block whose columns are read a vector at a time: an odd number of cache lines, which spreads a column
// of tiles over all sets of the L1 cache.
template <class T>
int64_t padded_row(int64_t size) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(max<int64_t>(size, 1), line) | 1) * line;
}

// Cuts a worker's scratch into arrays, each aligned to 64 bytes. Without memory it only adds up how much is needed.
class Arena {
 public:
  explicit Arena(char* memory = nullptr) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    char* taken = memory_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return memory_ ? reinterpret_cast<T*>(taken) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Working memory of a worker: `Arrays` is constructed from an Arena, which it asks for everything it needs.
template <class Arrays, class... Args>
Arrays worker_arrays(const Args&... args) {
  Arena measure;
  Arrays(measure, args...);
  Arena arena(static_cast<char*>(thread_scratch(ScratchUse::worker, measure.used())));
  return Arrays(arena, args...);
}

template <class S>
Matrix<const S> head_of(const ConstTensor4& t, int64_t b, int64_t h) {
  return {static_cast<const S*>(t.data) + b * t.stride[0] + h * t.stride[1], t.stride[2], t.stride[3]};
}
template <class S>
Matrix<S> head_of(const Tensor4& t, int64_t b, int64_t h) {
  return {static_cast<S*>(t.data) + b * t.stride[0] + h * t.stride[1], t.stride[2], t.stride[3]};
}

// Calls run(S{}) for the storage type S of `dtype`, one of those that are computed in T.
template <class T, class Run>
void with_storage(DType dtype, Run&& run) {
  if constexpr (sizeof(T) == sizeof(double)) {
    run(double{});
  } else {
    switch (dtype) {
      case DType::bf16: return run(Bf16{});
      case DType::f16: return run(F16{});
      default: return run(float{});
    }
  }
}

// Rows [first, first + count) of a head, `size` columns each. Between these two everything is of the compute type T.
template <class T>
void read_rows(const ConstTensor4& from, DType dtype, int64_t b, int64_t h, int64_t first, int64_t count, int64_t size,
               T* to, int64_t to_stride) {
  with_storage<T>(dtype, [&](auto type) {
    Matrix<const decltype(type)> rows = head_of<decltype(type)>(from, b, h);
    rows.data += first * rows.row_stride;
    copy_matrix(rows, Matrix<T>{to, to_stride, 1}, count, size);
  });
}

template <class T>
void write_rows(const T* from, int64_t from_stride, const Tensor4& to, DType dtype, int64_t b, int64_t h, int64_t first,
                int64_t count, int64_t size) {
  with_storage<T>(dtype, [&](auto type) {
    Matrix<decltype(type)> rows = head_of<decltype(type)>(to, b, h);
    rows.data += first * rows.row_stride;
    copy_matrix(Matrix<const T>{from, from_stride, 1}, rows, count, size);
  });
}

// Whether operands and results are fetched ahead: not if they, and what comes with them, are likely to lie in the second-level cache.
inline bool fetches_ahead(const AttentionShape& shape) {
  const int64_t rows = shape.batch * (shape.heads * shape.queries + shape.key_heads * shape.keys);
  return rows * (shape.size + shape.value_size) * static_cast<int64_t>(sizeof(float)) >= l2_cache_bytes() / 4;
}

// Adds rows [first, first + count) of a head, if it lies densely: also those behind its last one, `rows` in all, if the next
// head lies there.
inline void add_rows(Ahead& ahead, const ConstTensor4& from, DType dtype, int64_t b, int64_t h, int64_t first, int64_t count,
                     int64_t rows, int64_t size) {
  const int64_t bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  const bool dense = from.stride[3] == 1 && from.stride[2] == size && from.stride[1] == rows * size;
  const int64_t offset = b * from.stride[0] + h * from.stride[1] + first * size;
  if (dense) ahead.add(static_cast<const char*>(from.data) + offset * bytes, count * size * bytes);
}
inline void add_rows(Ahead& ahead, const Tensor4& to, DType dtype, int64_t b, int64_t h, int64_t first, int64_t count,
                     int64_t rows, int64_t size) {
  const ConstTensor4 from = {to.data, {to.stride[0], to.stride[1], to.stride[2], to.stride[3]}};
  add_rows(ahead, from, dtype, b, h, first, count, rows, size);
}

// ---- queries ----

struct Queries {
  int64_t first, count;
};

// The lanes of a panel: its queries in whole vectors.
template <class T>
int64_t panel_width(Queries panel) { return round_up(panel.count, lanes<T>); }

// Calls body(panel) for the panels of a block: as few as possible, cut evenly where tiles are as wide as a panel.
template <class T, class Body>
void for_panels(Queries block, Body&& body) {
  for (int64_t i = 0, count; i < block.count; i += count) {
    const int64_t vectors = ceil_div(block.count - i, lanes<T>);
    count = min(block.count - i, (vectors <= most_panel_vectors ? vectors : even_piece(vectors, panel_vectors)) * lanes<T>);
    body(Queries{block.first + i, count});
  }
}

// ---- blocks of keys ----

// Ascending indices of the keys that some query of a block of queries sees.
struct KeyBlock {
  int64_t* index;
  int64_t count;
  bool contiguous() const { return count == 0 || index[count - 1] - index[0] == count - 1; }
  // The first position whose key is >= `key`.
  int64_t position(int64_t key) const {
    if (contiguous()) return count == 0 ? 0 : max<int64_t>(0, min(count, key - index[0]));
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (index[middle] < key)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// Positions of a block's keys that a panel sees: some query sees those from first to last, all queries those from
// all_first to all_last, the queries of its vector j none from last_of[j] on, as far as the window goes.
struct Seen {
  int64_t first, all_first, all_last, last, last_of[most_panel_vectors];
  bool partly() const { return first < all_first || all_last < last; }
};

template <class T>
Seen seen(const AttentionVisibility& visible, const KeyBlock& keys, Queries queries) {
  const int64_t first = queries.first, last = queries.first + queries.count - 1;
  Seen s = {keys.position(first - visible.left), keys.position(last - visible.left),
            keys.position(first + visible.right + 1), keys.position(last + visible.right + 1), {}};
  s.all_first = min(s.all_first, s.last);
  s.all_last = max(s.all_last, s.all_first);
  for (int j = 0; j < most_panel_vectors; ++j)
    s.last_of[j] = max(s.first, min(s.last, keys.position(first + (j + 1) * lanes<T> + visible.right)));
  return s;
}

// Walks over the keys that the queries of a block see, a KeyBlock at a time.
class KeyWalk {
 public:
  KeyWalk(const AttentionProblem& p, int64_t b, int64_t h, Queries queries) : queries_(queries), keys_(p.shape.keys) {
    const AttentionVisibility& v = p.visible;
    length_ = v.key_lengths ? min(keys_, v.key_lengths[b]) : keys_;
    next_ = max<int64_t>(0, queries.first - v.left);
    end_ = min(length_, queries.first + queries.count + v.right);
    if (v.mask.data) mask_ = head_of<const unsigned char>(v.mask, b, h);
  }

  // Fills `block` with at most `most` keys; false when there are none left.
  bool fill(KeyBlock& block, int64_t most) {
    block.count = 0;
    // A mask leaves some of each chunk: chunks shrink with the room that is left, and little room is left unused.
    while (next_ < end_ && most - block.count > most / 8) {
      const int64_t chunk = min(end_ - next_, most - block.count);
      mask_.data ? add_visible(block, chunk) : add_all(block, chunk);
      next_ += chunk;
    }
    return block.count > 0;
  }

  bool finished() const { return next_ >= end_; }

  // The key that comes next, here or for later queries; that of the next head counts on behind the last one.
  int64_t following() const { return next_ < length_ ? next_ : keys_; }

 private:
  void add_all(KeyBlock& block, int64_t chunk) {
    for (int64_t j = 0; j < chunk; ++j) block.index[block.count++] = next_ + j;
  }

  void add_visible(KeyBlock& block, int64_t chunk) {
    constexpr int64_t step = 64;
    const int64_t rows = mask_.row_stride == 0 ? 1 : queries_.count;
    for (int64_t begin = 0; begin < chunk; begin += step) {
      const int64_t count = min(step, chunk - begin);
      unsigned char any[step] = {};
      for (int64_t i = 0; i < rows; ++i) {
        const unsigned char* row =
            mask_.data + (queries_.first + i) * mask_.row_stride + (next_ + begin) * mask_.col_stride;
        if (mask_.col_stride == 1)
          for (int64_t j = 0; j < count; ++j) any[j] |= row[j];
        else
          for (int64_t j = 0; j < count; ++j) any[j] |= row[j * mask_.col_stride];
      }
      for (int64_t j = 0; j < count; ++j)
        if (any[j]) block.index[block.count++] = next_ + begin + j;
    }
  }

  Queries queries_;
  int64_t keys_, length_, next_, end_;
  Matrix<const unsigned char> mask_ = {nullptr, 0, 0};
};

// Whether memory holds elements of T itself.
template <class T>
bool is_of(DType dtype) { return dtype == (sizeof(T) == sizeof(double) ? DType::f64 : DType::f32); }

// The rows of a head from `first` on where they are, if they lie there densely, in whole vectors of T; else data is nullptr.
template <class T>
Matrix<const T> rows_in_place(const ConstTensor4& from, DType dtype, int64_t b, int64_t h, int64_t first, int64_t size) {
  const bool dense = from.stride[3] == 1 && from.stride[2] == size && size % lanes<T> == 0;
  if (!dense || !is_of<T>(dtype)) return {};
  return {head_of<T>(from, b, h).data + first * size, size, 1};
}

// The rows of a block of keys, `size` columns each: where they are, else copied to `copy`, rows `copy_stride` apart.
template <class T>
Matrix<const T> read_keys(const ConstTensor4& from, DType dtype, int64_t b, int64_t h, const KeyBlock& keys, int64_t size,
                          T* copy, int64_t copy_stride) {
  if (keys.contiguous()) {
    const Matrix<const T> rows = rows_in_place<T>(from, dtype, b, h, keys.index[0], size);
    if (rows.data) return rows;
    read_rows(from, dtype, b, h, keys.index[0], keys.count, size, copy, copy_stride);
  } else {
    for (int64_t k = 0; k < keys.count; ++k)
      read_rows(from, dtype, b, h, keys.index[k], 1, size, copy + k * copy_stride, copy_stride);
  }
  return {copy, copy_stride, 1};
}

// 0 times every element of a row, added up: not 0 where one is not finite.
template <class T>
Vector<T> zeros_of_row(const T* row, int64_t size) {
  Vector<T> zeros = {};
  int64_t d = 0;
  for (; d + lanes<T> <= size; d += lanes<T>) zeros += load_vector(row + d) * T{};
  return d < size ? zeros + load_first(row + d, size - d) * T{} : zeros;
}

template <class T>
bool all_zero(Vector<T> v) {
  bool zero = true;
  for (int i = 0; i < lanes<T>; ++i) zero = zero && v[i] == 0;
  return zero;
}

// Positions of rows with a NaN or an infinity.
template <class T>
int64_t find_nonfinite(Matrix<const T> rows, int64_t count, int64_t size, int64_t* positions) {
  Vector<T> zeros = {};
  for (int64_t k = 0; k < count; ++k) zeros += zeros_of_row(rows.data + k * rows.row_stride, size);
  if (all_zero<T>(zeros)) return 0;
  int64_t found = 0;
  for (int64_t k = 0; k < count; ++k)
    if (!all_zero<T>(zeros_of_row(rows.data + k * rows.row_stride, size))) positions[found++] = k;
  return found;
}

// ---- one panel ----

// The rows of a panel of queries, times `factor`, as the columns of to [size][panel_width]; the columns that are left over
// are 0.
template <class T>
void pack_panel(const T* rows, int64_t row_stride, Queries panel, int64_t size, T factor, T* to) {
  const int64_t width = panel_width<T>(panel), count = panel.count;
  if (count < width) zero_matrix(Matrix<T>{to + width - lanes<T>, width, 1}, size, lanes<T>);
  if (min(count, size) >= lanes<T>) {
    for (int64_t i = 0, first; i < count; i += lanes<T>) {  // whole rows: they come in the order of memory
      first = min(i, count - lanes<T>);
      copy_transposed(rows + first * row_stride, row_stride, to + first, width, size, lanes<T>, factor);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < size; ++d) to[d * width + i] = factor * rows[i * row_stride + d];
}

// `store` [k, i] = rows[k] . panel[:, i] over the keys that a panel of `Vectors` vectors sees, from `first` on. Vectors whose
// queries see nothing more are left out, one by one; what stands there is hidden later.
template <int Vectors, class T, class Store>
void panel_products(Matrix<const T> rows, const T* panel, int64_t width, int64_t size, const int64_t* last_of, int64_t first,
                    const Store& store, Ahead& ahead) {
  const TileOperands<T, RowsOfA<T>> operands = {{rows.data, rows.row_stride}, panel, width, size};
  tile_columns<T, Vectors>(*last_of - first, 0, 1, operands.at(first, 0), store.at(first, 0), ahead);
  if constexpr (Vectors > 1)
    panel_products<Vectors - 1>(rows, panel + lanes<T>, width, size, last_of + 1, *last_of, store.at(0, lanes<T>), ahead);
}

// Brings the maximum of columns up to date with scores [k, i] for k in [first, last).
template <int Vectors, class T>
void add_maximum(const T* scores, int64_t stride, int64_t first, int64_t last, T* maximum) {
  using V = Vector<T>;
  V top[Vectors];
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) top[j] = load_as<V>(maximum + j * lanes<T>);
  for (int64_t k = first; k < last; ++k)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const V score = load_as<V>(scores + k * stride + j * lanes<T>);
      top[j] = greater_of(score, top[j]);  // leaves a NaN to the exponential
    }
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) store_as(maximum + j * lanes<T>, top[j]);
}

// The scores to[k, i] of a panel of `queries`, and their maximum where it isn't nullptr.
template <int Vectors, class T>
void panel_scores(Matrix<const T> keys, const T* panel, int64_t queries, int64_t size, const Seen& s, T* to,
                  int64_t to_stride, T* maximum, Ahead& ahead) {
  constexpr int64_t full = (Vectors - 1) * lanes<T>, width = Vectors * lanes<T>;
  const StoreScores<T> store = {to, to_stride, maximum};
  if (queries - full <= few_queries<T> && size % lanes<T> == 0 && size <= most_features) {
    few_queries_scores<T>(keys, panel + full, width, queries - full, size, s.first, s.last, to + full, to_stride);
    if (maximum) add_maximum<1>(to + full, to_stride, s.first, s.last, maximum + full);
    if constexpr (Vectors > 1)
      panel_products<Vectors - 1>(keys, panel, width, size, s.last_of, s.first, store, ahead);
  } else {
    panel_products<Vectors>(keys, panel, width, size, s.last_of, s.first, store, ahead);
  }
}

// Ascending positions of rows that hold a NaN or an infinity.
struct Nonfinite {
  const int64_t* position;
  int64_t count;
};

// sum over positions k in [first, last) of weights[k, i] * rows[k], for `queries` rows that `store` takes. Rows that are not
// finite count only where their weight isn't 0: a hidden key's NaN must not pass.
template <class T, class Store>
void add_weighted_rows(const T* weights, int64_t weights_stride, Matrix<const T> rows, int64_t first, int64_t last,
                       Nonfinite nonfinite, int64_t queries, int64_t size, const Store& store, Ahead& ahead) {
  auto between = [&](int64_t begin, int64_t end) {
    return TileOperands<T, ColumnsOfA<T>>{{weights + begin * weights_stride, weights_stride},
                                          rows.data + begin * rows.row_stride, rows.row_stride, end - begin};
  };
  if (nonfinite.count == 0) return tile_product<T>(queries, size, between(first, last), store, ahead);
  store.begin(queries, size);
  for (int64_t n = 0; n <= nonfinite.count; ++n) {
    const int64_t stop = n < nonfinite.count ? max(first, min(last, nonfinite.position[n])) : last;
    if (first < stop) tile_product<T>(queries, size, between(first, stop), StoreSums<T>{store.to, store.stride, true}, ahead);
    if (stop == last) break;
    for (int64_t i = 0; i < queries; ++i) {
      const T weight = weights[stop * weights_stride + i];
      if (weight != 0)
        for (int64_t d = 0; d < size; ++d) store.to[i * store.stride + d] += weight * rows.data[stop * rows.row_stride + d];
    }
    first = stop + 1;
  }
  store.end(queries, size);
}

// add_weighted_rows for the queries of a panel over the keys that it sees; where not all queries see the last ones, a row of tiles at
// a time, as far as that one sees.
template <class T, class Store>
void add_seen_rows(const AttentionVisibility& visible, const KeyBlock& keys, const Seen& s, Queries panel, const T* weights,
                   int64_t weights_stride, Matrix<const T> rows, Nonfinite nonfinite, int64_t size, const Store& store,
                   Ahead& ahead) {
  const int64_t most = s.all_last < s.last ? rows_of_tile<panel_vectors> : panel.count;
  for (int64_t i = 0, count; i < panel.count; i += count) {
    count = even_piece(panel.count - i, most);
    const int64_t last = keys.position(panel.first + i + count + visible.right);
    add_weighted_rows(weights + i, weights_stride, rows, s.first, max(s.first, last), nonfinite, count, size,
                      store.at(i, 0), ahead);
  }
}

// Gives -inf to the scores of keys that the window hides from some queries of a panel.
template <class T>
void hide_by_window(const AttentionVisibility& visible, const KeyBlock& keys, const Seen& s, Queries queries, T* scores,
                    int64_t stride) {
  auto hide = [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      // Query `i` of the panel sees the key if first <= i <= last.
      const int64_t distance = keys.index[k] - queries.first, width = panel_width<T>(queries);
      const int first = static_cast<int>(max<int64_t>(0, min(width, distance - visible.right)));
      const int last = static_cast<int>(max<int64_t>(-1, min(width, distance + visible.left)));
      for (int i = 0; i < width; ++i)
        scores[k * stride + i] = i < first || i > last ? -infinity<T> : scores[k * stride + i];
    }
  };
  hide(s.first, s.all_first);
  hide(s.all_last, s.last);
}

// from[i * stride] for the queries of a panel, as neighbours; 0 beyond them.
template <class V>
struct PanelColumn {
  V values[panel_queries<float>] = {};
  PanelColumn(const V* from, int64_t stride, int64_t queries) {
    for (int64_t i = 0; i < queries; ++i) values[i] = from[i * stride];
  }
};

// Gives -inf to the scores that the mask hides.
template <class T>
void hide_by_mask(Matrix<const unsigned char> mask, const KeyBlock& keys, const Seen& s, Queries queries, T* scores,
                  int64_t stride) {
  for (int64_t k = s.first; k < s.last; ++k) {
    const PanelColumn<unsigned char> seen(
        mask.data + queries.first * mask.row_stride + keys.index[k] * mask.col_stride, mask.row_stride, queries.count);
    T* const row = scores + k * stride;
    for (int64_t i = 0; i < panel_width<T>(queries); ++i) row[i] = seen.values[i] ? row[i] : -infinity<T>;
  }
}

template <class B, class T>
void add_bias(Matrix<const B> bias, const KeyBlock& keys, const Seen& s, Queries queries, T* scores, int64_t stride) {
  for (int64_t k = s.first; k < s.last; ++k) {
    const PanelColumn<B> column(bias.data + queries.first * bias.row_stride + keys.index[k] * bias.col_stride,
                                bias.row_stride, queries.count);
    T* const row = scores + k * stride;
    for (int64_t i = 0; i < panel_width<T>(queries); ++i) {
      const T added = static_cast<T>(to_compute(column.values[i])) * static_cast<T>(log2_e);
      row[i] = added == -infinity<T> ? added : row[i] + added;
    }
  }
}

// Whether a mask hides keys query by query. One without a dimension of queries is left to KeyWalk.
inline bool masks_queries(const AttentionVisibility& visible) {
  return visible.mask.data && visible.mask.stride[2] != 0;
}

// Whether finish_scores changes the scores of a panel that sees `s`.
inline bool finishes_scores(const AttentionProblem& p, const Seen& s) {
  return p.bias.data || masks_queries(p.visible) || s.partly();
}

// Bias and everything that hides a key from a query, on the scores [key][query] of a panel.
template <class T>
void finish_scores(const AttentionProblem& p, int64_t b, int64_t h, const KeyBlock& keys, const Seen& s, Queries queries,
                   T* scores, int64_t stride) {
  auto with_bias = [&](auto type) {
    add_bias(head_of<decltype(type)>(p.bias, b, h), keys, s, queries, scores, stride);
  };
  if (p.bias.data) p.bias_dtype == p.dtype ? with_storage<T>(p.dtype, with_bias) : with_bias(float{});
  if (masks_queries(p.visible))
    hide_by_mask(head_of<unsigned char>(p.visible.mask, b, h), keys, s, queries, scores, stride);
  if (s.partly()) hide_by_window(p.visible, keys, s, queries, scores, stride);
}

// Whether some key of a block may be hidden from some of the queries.
inline bool hides_some(const AttentionProblem& p, const KeyBlock& keys, Queries queries) {
  return p.bias.data || masks_queries(p.visible) || seen<float>(p.visible, keys, queries).partly();
}

// Equal blocks of at most `most`, in whole vectors.
template <class T>
int64_t query_block(int64_t queries, int64_t most) {
  return round_up(even_piece(max<int64_t>(1, queries), most), lanes<T>);
}

// Keys of a block: at most `most`, fewer where their rows would leave the L2 cache no room.
template <class T>
int64_t key_block(int64_t row_elements, int64_t most) {
  constexpr int64_t bytes = int64_t{224} << 10;
  return max<int64_t>(16, min<int64_t>(most, bytes / (row_elements * static_cast<int64_t>(sizeof(T))) / 2 * 2));
}

}  // namespace
}  // namespace cvfast
