// Scores of a vector of queries most of whose lanes are empty: dot products along the features instead of products lane by
// lane, which would take as long as for a full vector.
#pragma once
#include "attention_tiles.h"
#include "transpose.h"

namespace cvfast {
namespace {

// A dot product costs a sum over lanes besides.
template <class T>
constexpr int few_queries = max(1, lanes<T> / 8);

// Lane i: the sum of all lanes of rows[i]. Overwrites the rows.
template <class T, int Bit = 1>
[[gnu::always_inline]] inline Vector<T> sums_of_rows(Vector<T>* rows) {
  constexpr int L = lanes<T>;
  if constexpr (Bit == L) {
    return rows[0];
  } else {
    decltype(Vector<T>{} < Vector<T>{}) low, high;
    for (int j = 0; j < L; ++j) {
      low[j] = j & Bit ? L + (j ^ Bit) : j;
      high[j] = j & Bit ? L + j : j | Bit;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L / (2 * Bit); ++i) {
      const Vector<T> a = rows[2 * i], b = rows[2 * i + 1];
      rows[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    return sums_of_rows<T, 2 * Bit>(rows);
  }
}

// to[k, i] = rows[k] . column i of panel [size][width], for keys k in [first, last) and `count` <= few_queries<T> columns; the
// vector's other lanes are 0. size: whole vectors, at most most_features.
constexpr int64_t most_features = 256;
template <class T>
void few_queries_scores(Matrix<const T> rows, const T* panel, int64_t width, int64_t count, int64_t size, int64_t first,
                        int64_t last, T* to, int64_t to_stride) {
  constexpr int L = lanes<T>;
  alignas(64) T queries[few_queries<T>][most_features], sums[L];
  for (int64_t d = 0; d < size; ++d)
    for (int64_t i = 0; i < count; ++i) queries[i][d] = panel[d * width + i];
  for (int64_t k = first; k < last; ++k) store_as(to + k * to_stride, Vector<T>{});
  for (int64_t k = first; k < last; k += L)
    for (int64_t i = 0; i < count; ++i) {
      Vector<T> parts[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) {
        const T* const row = rows.data + min(k + j, last - 1) * rows.row_stride;
        parts[j] = load_as<Vector<T>>(row) * load_as<Vector<T>>(queries[i]);
        for (int64_t d = L; d < size; d += L) parts[j] += load_as<Vector<T>>(row + d) * load_as<Vector<T>>(queries[i] + d);
      }
      store_as(sums, sums_of_rows<T>(parts));
      for (int64_t j = 0; j < L && k + j < last; ++j) to[(k + j) * to_stride + i] = sums[j];
    }
}

}  // namespace
}  // namespace cvfast
