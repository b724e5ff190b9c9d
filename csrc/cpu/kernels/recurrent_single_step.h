// A single step (a cell by itself): reads each weight once, where it lies. Packing would cost more than the step.
//
// An element of a gate is a dot product along the rows of weights and operand, a vector at a time: chains of multiply-adds
// over every lanes-th product, added pairwise at the end. The order is the same for any number of samples.
#pragma once
#include "parallel.h"
#include "recurrent_cells.h"
#include "recurrent_sequence.h"

namespace cvfast {
namespace {

// One product of several: the weights' rows [*, depth] with x [rows, depth], x with zeros up to full vectors.
template <class S>
struct DotOperand {
  const Compute<S>* x;
  int64_t x_stride;
  const S* weight;
  int64_t depth;
};

// partial[i][u] = vectors of partial sums of row i and weight row units[u], over all operands.
template <class S, int Rows, int Units>
void dot_tile(const DotOperand<S>* operands, int count, int64_t row, const int64_t* units,
              Vector<Compute<S>> (*partial)[lanes<Compute<S>>]) {
  using T = Compute<S>;
  constexpr int L = lanes<T>;
  Vector<T> sum[Rows][Units] = {};
  for (int operand = 0; operand < count; ++operand) {
    const DotOperand<S>& o = operands[operand];
    const T* x = o.x + row * o.x_stride;
    const S* weight[Units];
#pragma GCC unroll 8
    for (int u = 0; u < Units; ++u) weight[u] = o.weight + units[u] * o.depth;
    int64_t k = 0;
    auto add = [&](auto load) {
      Vector<T> w[Units];
#pragma GCC unroll 8
      for (int u = 0; u < Units; ++u) w[u] = load(weight[u] + k);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        const Vector<T> v = load_as<Vector<T>>(x + i * o.x_stride + k);
#pragma GCC unroll 8
        for (int u = 0; u < Units; ++u) sum[i][u] += v * w[u];
      }
    };
    for (; k + L <= o.depth; k += L) add([](const S* from) { return load_vector(from); });
    if (k < o.depth) add([&](const S* from) { return load_first(from, o.depth - k); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int u = 0; u < Units; ++u) partial[i][u] = sum[i][u];
}

template <class T>
struct IntegerOf {
  typedef int32_t type __attribute__((vector_size(CVFAST_VECTOR_BYTES)));
};
template <>
struct IntegerOf<double> {
  typedef int64_t type __attribute__((vector_size(CVFAST_VECTOR_BYTES)));
};

// Sums of neighbours: a0 + a1, a2 + a3, ..., b0 + b1, ...
template <class T>
Vector<T> add_neighbours(Vector<T> a, Vector<T> b) {
  typename IntegerOf<T>::type even, odd;
  for (int i = 0; i < lanes<T>; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// The vector whose lane u is the sum of the lanes of v[u]. Overwrites v.
template <class T>
Vector<T> sum_lanes(Vector<T>* v) {
#pragma GCC unroll 4
  for (int count = lanes<T> / 2; count > 0; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) v[i] = add_neighbours<T>(v[2 * i], v[2 * i + 1]);
  return v[0];
}

inline bool single_step_applies(const RecurrentForward& p) {
  return p.sequence.steps == 1 && !p.sequence.lengths && p.shape.projected == 0 && p.shape.hidden > 0;
}

template <class S, class Cell>
struct SingleStep {
  using T = Compute<S>;
  static constexpr int L = lanes<T>;
  static constexpr int most_rows = 3;

  const RecurrentForward& p;
  const int64_t batch = p.sequence.batch, inputs = p.shape.input, hidden = p.shape.hidden;
  T *x, *h;  // operands with rows padded to full vectors

  explicit SingleStep(const RecurrentForward& problem) : p(problem) {}

  void run(const ThreadPool& pool) {
    const int64_t x_stride = round_up(inputs, L), h_stride = round_up(hidden, L);
    Carver::carve(ScratchUse::caller, [&](Carver& scratch) {
      x = scratch.take<T>(batch * x_stride);
      h = scratch.take<T>(batch * h_stride);
    });
    const S* from = static_cast<const S*>(p.input.data);
    for (int64_t i = 0; i < batch; ++i) {
      copy_contiguous(from + i * p.input.sample_stride, x + i * x_stride, inputs);
      copy_contiguous(static_cast<const S*>(p.h_0) + i * hidden, h + i * h_stride, hidden);
      zero_row(x + i * x_stride + inputs, x_stride - inputs);
      zero_row(h + i * h_stride + hidden, h_stride - hidden);
    }
    const DotOperand<S> operands[] = {{x, x_stride, static_cast<const S*>(p.weights.w_ih), inputs},
                                      {h, h_stride, static_cast<const S*>(p.weights.w_hh), hidden}};
    const int64_t blocks = ceil_div(hidden, L);
    auto take_blocks = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) unit_block(operands, i * L);
    };
    const bool worth_threads = batch * hidden * (inputs + hidden) * Cell::gates > int64_t{1} << 18;
    if (!worth_threads) return take_blocks(0, blocks);
    parallel_for(pool, blocks, [&](int64_t begin, int64_t end) { take_blocks(begin, end); });
  }

  // L hidden units, of all samples.
  void unit_block(const DotOperand<S>* operands, int64_t unit) const {
    int64_t row = 0;
    for (; row + most_rows <= batch; row += most_rows) rows<most_rows>(operands, row, unit);
    if (batch - row == 2) rows<2>(operands, row, unit);
    if (batch - row == 1) rows<1>(operands, row, unit);
  }

  template <int Rows>
  void rows(const DotOperand<S>* operands, int64_t row, int64_t unit) const {
    Vector<T> x_gates[Rows][Cell::gates], h_gates[Rows][Cell::gates];
    for (int gate = 0; gate < Cell::gates; ++gate) {
      const Vector<T> b_ih = bias(p.weights.b_ih, gate, unit), b_hh = bias(p.weights.b_hh, gate, unit);
      const bool joined = Cell::x_slot(gate) == gate;  // X and R enter as their sum
      Vector<T> sums[2][Rows];
      if (joined) dots<Rows>(operands, 2, row, gate, unit, sums[1]);
      else dots<Rows>(operands, 1, row, gate, unit, sums[0]), dots<Rows>(operands + 1, 1, row, gate, unit, sums[1]);
      for (int i = 0; i < Rows; ++i) {
        x_gates[i][gate] = joined ? b_ih : sums[0][i] + b_ih;
        h_gates[i][gate] = sums[1][i] + b_hh;
      }
    }
    for (int i = 0; i < Rows; ++i) run_cell(row + i, unit, x_gates[i], h_gates[i]);
  }

  Vector<T> bias(const void* from, int gate, int64_t unit) const {
    return from ? load_first(static_cast<const S*>(from) + gate * hidden + unit, hidden - unit) : Vector<T>{};
  }

  // sums[i]: a gate of L units of row i.
  template <int Rows>
  void dots(const DotOperand<S>* operands, int count, int64_t row, int gate, int64_t unit, Vector<T>* sums) const {
    constexpr int units = min(Rows == 1 ? 8 : 4, L);
    Vector<T> partial[Rows][L];
    for (int u = 0; u < L; u += units) {
      int64_t weight_rows[units];
      for (int i = 0; i < units; ++i) weight_rows[i] = gate * hidden + min(unit + u + i, hidden - 1);
      Vector<T> part[Rows][L];
      dot_tile<S, Rows, units>(operands, count, row, weight_rows, part);
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < units; ++j) partial[i][u + j] = part[i][j];
    }
    for (int i = 0; i < Rows; ++i) sums[i] = sum_lanes<T>(partial[i]);
  }

  void run_cell(int64_t row, int64_t unit, const Vector<T> (&x_gates)[Cell::gates],
                const Vector<T> (&h_gates)[Cell::gates]) const {
    const int64_t at = row * hidden + unit, count = hidden - unit;
    Vector<T> keep[Cell::saved];
    Vector<T> memory = load_first(static_cast<const S*>(Cell::has_c ? p.c_0 : p.h_0) + at, count);
    const Vector<T> result = Cell::forward(x_gates, h_gates, memory, keep);
    store_first(result, static_cast<S*>(p.h_n) + at, count);
    store_first(result, static_cast<S*>(p.output.data) + row * p.output.sample_stride + unit, count);
    if constexpr (Cell::has_c) store_first(memory, static_cast<S*>(p.c_n) + at, count);
    if (!p.saved) return;
    T* saved = static_cast<T*>(p.saved) + row * Cell::saved * hidden + unit;
    for (int i = 0; i < Cell::saved; ++i) store_first(keep[i], saved + i * hidden, count);
  }
};

}  // namespace
}  // namespace cvfast
