// Products of small matrices for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::batched_product and
// nothing else.
#include "../kernel_table.h"
#include "../scratch.h"
#include "gemm.h"
#include "parallel.h"

namespace cvfast {
namespace {

template <class T>
struct Sample {
  Matrix<const T> left, right;
  T* result;
};

template <class T>
Sample<T> sample(const BatchedProduct& p, int64_t b) {
  auto matrix = [b](const BatchedMatrices& m) {
    return Matrix<const T>{static_cast<const T*>(m.data) + b * m.stride[0], m.stride[1], m.stride[2]};
  };
  return {matrix(p.left), matrix(p.right), static_cast<T*>(p.result) + b * p.rows * p.cols};
}

template <int n>
struct RowCount {
  static constexpr int value = n;
};

template <class T>
Matrix<const T> columns_from(Matrix<const T> m, int64_t first) {
  return {m.data + first * m.col_stride, m.row_stride, m.col_stride};
}

// Brings rows into the second-level cache one after the other: panels would ask for a line of each, which no processor foresees.
template <class T>
void fetch_rows(const T* rows, int64_t stride, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < width; k += line_elements<T>) __builtin_prefetch(rows + i * stride + k, 0, 2);
}

// Columns [first, first + count) of a result; `count` in whole vectors.
template <class T>
void product_of_vectors(const BatchedProduct& p, const Sample<T>& s, int64_t first, int64_t count) {
  for (int64_t k = 0; k < p.depth; k += block_depth) {
    fetch_rows(s.right.data + k * s.right.row_stride + first, s.right.row_stride, min(block_depth, p.depth - k), count);
    block_product<T>(p.rows, count, min(block_depth, p.depth - k), columns_from(s.left, k),
                     {s.right.data + k * s.right.row_stride + first, panel_cols<T>, panel_cols<T>, s.right.row_stride},
                     s.result + first, p.cols, p.add || k > 0);
  }
}

// One row of left and `count` <= long_row columns: right is read row by row, as memory likes it best. The sums are those of
// product_of_vectors, to the last bit.
constexpr int64_t long_row = 1024;
template <class T>
void product_of_one_row(const BatchedProduct& p, const Sample<T>& s, int64_t first, int64_t count) {
  alignas(64) T sums[long_row];
  auto add_rows = [&](int64_t k, auto together) {
    constexpr int Rows = decltype(together)::value;
    for (int64_t j = 0; j < count; j += lanes<T>) {
      Vector<T> sum = load_as<Vector<T>>(sums + j);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i)
        sum += s.left.data[(k + i) * s.left.col_stride] * load_vector(s.right.data + (k + i) * s.right.row_stride + first + j);
      store_as(sums + j, sum);
    }
  };
  for (int64_t k = 0; k < p.depth;) {
    const bool add = p.add || k > 0;
    for (int64_t j = 0; j < count; ++j) sums[j] = T{};
    const int64_t stop = min(k + block_depth, p.depth);
    for (; k + 4 <= stop; k += 4) add_rows(k, RowCount<4>{});
    for (; k < stop; ++k) add_rows(k, RowCount<1>{});
    for (int64_t j = 0; j < count; ++j) s.result[first + j] = add ? s.result[first + j] + sums[j] : sums[j];
  }
}

// A depth of one: the result is written row by row.
template <class T>
void product_of_one_column(const BatchedProduct& p, const Sample<T>& s, int64_t first, int64_t count) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const T element = s.left.data[i * s.left.row_stride];
    T* const to = s.result + i * p.cols + first;
    const T* const right = s.right.data + first;
    if (p.add)
      for (int64_t j = 0; j < count; j += lanes<T>) store_vector(load_vector(to + j) + element * load_vector(right + j), to + j);
    else
      for (int64_t j = 0; j < count; j += lanes<T>) store_vector(element * load_vector(right + j), to + j);
  }
}

// The last columns, less than a vector, through a copy of whole vectors.
template <class T>
void product_of_tail(const BatchedProduct& p, const Sample<T>& s, int64_t first) {
  const int64_t count = p.cols - first;
  T* const right = static_cast<T*>(thread_scratch(ScratchUse::worker, (block_depth + p.rows) * lanes<T> * sizeof(T)));
  T* const result = right + block_depth * lanes<T>;
  for (int64_t k = 0; k < p.depth; k += block_depth) {
    const int64_t depth = min(block_depth, p.depth - k);
    for (int64_t i = 0; i < depth; ++i)
      store_as(right + i * lanes<T>, load_first(s.right.data + (k + i) * s.right.row_stride + first, count));
    column_product<T, 1>(p.rows, depth, columns_from(s.left, k), right, lanes<T>, result, lanes<T>, k > 0);
  }
  for (int64_t i = 0; i < p.rows; ++i) {
    T* const to = s.result + i * p.cols + first;
    const Vector<T> sum = load_as<Vector<T>>(result + i * lanes<T>);
    store_first(p.add ? load_first(to, count) + sum : sum, to, count);
  }
}

template <class T>
T sum_of_lanes(Vector<T> v) {
  using Index = decltype(v < v);
#pragma GCC unroll 4
  for (int half = lanes<T> / 2; half > 0; half /= 2) {
    Index other;
    for (int i = 0; i < lanes<T>; ++i) other[i] = i ^ half;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}

// result[i, j] (+)= rows i of left . rows j of right
template <class T, int Rows, int Cols>
void dot_tile(const T* left, int64_t left_stride, const T* right, int64_t right_stride, int64_t depth, T* result,
              int64_t result_stride, bool add) {
  Vector<T> sum[Rows][Cols] = {};
  auto step = [&](int64_t k, auto load) {
    Vector<T> column[Cols];
#pragma GCC unroll 4
    for (int j = 0; j < Cols; ++j) column[j] = load(right + j * right_stride + k);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Vector<T> row = load(left + i * left_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < Cols; ++j) sum[i][j] += row * column[j];
    }
  };
  int64_t k = 0;
  for (; k + lanes<T> <= depth; k += lanes<T>) step(k, [](const T* from) { return load_vector(from); });
  if (k < depth) step(k, [&](const T* from) { return load_first(from, depth - k); });
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Cols; ++j) {
      T& to = result[i * result_stride + j];
      to = sum_of_lanes<T>(sum[i][j]) + (add ? to : T{});
    }
}

// Columns [first, last) of a result whose right operand is transposed: each row of `right` is read once per four of left.
template <class T>
void product_of_rows(const BatchedProduct& p, const Sample<T>& s, int64_t first, int64_t last) {
  const int64_t ls = s.left.row_stride, rs = s.right.row_stride;
  for (int64_t j = first; j < last;) {
    const bool four_columns = j + 4 <= last;
    const T* const right = s.right.data + j * rs;
    for (int64_t i = 0; i < p.rows;) {
      const bool four_rows = i + 4 <= p.rows;
      const T* const left = s.left.data + i * ls;
      T* const result = s.result + i * p.cols + j;
      if (four_rows && four_columns)
        dot_tile<T, 4, 4>(left, ls, right, rs, p.depth, result, p.cols, p.add);
      else if (four_rows)
        dot_tile<T, 4, 1>(left, ls, right, rs, p.depth, result, p.cols, p.add);
      else if (four_columns)
        dot_tile<T, 1, 4>(left, ls, right, rs, p.depth, result, p.cols, p.add);
      else
        dot_tile<T, 1, 1>(left, ls, right, rs, p.depth, result, p.cols, p.add);
      i += four_rows ? 4 : 1;
    }
    j += four_columns ? 4 : 1;
  }
}

template <class T>
void batched_product(const BatchedProduct& p, const ThreadPool& pool) {
  if (p.depth == 0) {
    if (!p.add) zero_matrix(Matrix<T>{static_cast<T*>(p.result), p.cols, 1}, p.batch * p.rows, p.cols);
    return;
  }
  const bool one = !p.transposed && (p.rows == 1 || p.depth == 1);
  const int64_t step = one ? long_row : block_cols<T>, blocks = ceil_div(p.cols, step);
  parallel_for(pool, p.batch * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Sample<T> s = sample<T>(p, unit / blocks);
      const int64_t first = unit % blocks * step, last = min(p.cols, first + step);
      if (p.transposed) {
        product_of_rows(p, s, first, last);
        continue;
      }
      const int64_t whole = (last - first) / lanes<T> * lanes<T>;
      if (p.depth == 1)
        product_of_one_column(p, s, first, whole);
      else if (one)
        product_of_one_row(p, s, first, whole);
      else
        product_of_vectors(p, s, first, whole);
      if (first + whole < last) product_of_tail(p, s, first + whole);
    }
  });
}

void product(const BatchedProduct& p, const ThreadPool& pool) {
  p.dtype == DType::f64 ? batched_product<double>(p, pool) : batched_product<float>(p, pool);
}

}  // namespace

namespace CVFAST_ISA {
extern const BatchedProductKernel batched_product;
const BatchedProductKernel batched_product = {product};
}  // namespace CVFAST_ISA

}  // namespace cvfast
