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

// One product of several: the weights' rows [*, depth] with x [rows, depth], x with zeros up to full vectors. Strides in elements.
template <class T>
struct DotOperand {
  const T* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride, depth;
};

#if CVFAST_VECTOR_BYTES == 64
constexpr int most_dot_rows = 4;
#else
constexpr int most_dot_rows = 3;
#endif
template <class T>
constexpr int dot_units = min(4, lanes<T>);  // weight rows of a tile

// sum += vectors of `count` products, of weight rows with rows of x. `Fetched` of the next tile's weight rows, from `ahead` on,
// come near: the processor's own fetching ends with each row's page, and knows nothing of the next rows.
template <int Fetched, class S, int Rows, int Units, class T>
[[gnu::always_inline]] inline void add_dots(const S* const (&weight)[Units], const T* x, int64_t x_stride, int64_t k,
                                            int64_t count, const S* ahead, int64_t depth, Vector<T> (&sum)[Rows][Units]) {
  Vector<T> w[Units];
#pragma GCC unroll 8
  for (int u = 0; u < Fetched; ++u) __builtin_prefetch(ahead + u * depth + k);
#pragma GCC unroll 8
  for (int u = 0; u < Units; ++u) w[u] = load_units(weight[u] + k, count);
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    const Vector<T> v = load_as<Vector<T>>(x + i * x_stride + k);
#pragma GCC unroll 8
    for (int u = 0; u < Units; ++u) sum[i][u] += v * w[u];
  }
}

template <class T>
struct IntegerOf {
  typedef int32_t type __attribute__((vector_size(CVFAST_VECTOR_BYTES)));
};
template <>
struct IntegerOf<double> {
  typedef int64_t type __attribute__((vector_size(CVFAST_VECTOR_BYTES)));
};

// Sums of neighbours, those of `a` before those of `b`: among the lanes of each 16 bytes, which processors shuffle with ease, or
// (Blocks) among the 16 bytes as a whole.
template <class T, bool Blocks>
[[gnu::always_inline]] inline Vector<T> add_neighbours(Vector<T> a, Vector<T> b) {
  constexpr int L = lanes<T>, block = min<int>(L, 16 / sizeof(T)), unit = Blocks ? block : 1, group = Blocks ? L : block;
  typename IntegerOf<T>::type even, odd;
  for (int i = 0; i < L; ++i) {
    const int place = i % group / unit, first = place * 2 * unit % group + i / group * group + i % unit;
    even[i] = first + (place * 2 * unit >= group ? L : 0), odd[i] = even[i] + unit;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Overwrites v, `count` vectors. The sum of each is that of its lanes; `width` sums stand side by side in each part of a vector, in
// the end width * count of them.
template <class T, int count, int width = 1>
[[gnu::always_inline]] inline Vector<T> sum_parts(Vector<T>* v) {
  if constexpr (count > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) v[i] = add_neighbours<T, width * sizeof(T) >= 16>(v[2 * i], v[2 * i + 1]);
    return sum_parts<T, count / 2, 2 * width>(v);
  }
  return v[0];
}

// Some of the operands, or a piece of one. `first`: the sums begin with them. `last`: the sums end with them.
template <class T>
struct DotPiece {
  const DotOperand<T>* operands;
  int count;
  bool first, last;
};

// partial[i] = sums of row i and the weight rows from `unit` on, over all operands, lanes / dot_units of each; weight rows from
// `end` on count as the one before. S: the weights' storage type. `pass` of Passes tiles of the same weights: each brings its
// share of the next tile's weights near, since memory works slowly, but beside all of the products. One row of x waits for
// nothing but loads, which that would delay (a quarter of the time on Sapphire Rapids, a tenth on Zen 4). Between two pieces
// the sums are kept in `kept`.
template <class S, int Rows, int Passes, class T = Compute<S>>
[[gnu::noinline]] void dot_tile(const DotPiece<T>& piece, int64_t row, int64_t unit, int64_t end, int pass,
                                Vector<T> (*kept)[dot_units<T>], Vector<T>* partial, int64_t stride) {
  constexpr int L = lanes<T>, Units = dot_units<T>, Fetched = Rows * Passes > 1 ? Units / Passes : 0;
  Vector<T> sum[Rows][Units] = {};
  if (!piece.first)
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int u = 0; u < Units; ++u) sum[i][u] = kept[i][u];
  for (int operand = 0; operand < piece.count; ++operand) {
    const DotOperand<T>& o = piece.operands[operand];
    const T* x = o.x + row * o.x_stride;
    const S* weight[Units];
#pragma GCC unroll 8
    for (int u = 0; u < Units; ++u) weight[u] = static_cast<const S*>(o.weight) + min(unit + u, end - 1) * o.weight_stride;
    const S* ahead = weight[0] + (Units + pass * Fetched) * o.weight_stride;
    int64_t k = 0;
    for (; k + L <= o.depth; k += L) add_dots<Fetched>(weight, x, o.x_stride, k, L, ahead, o.weight_stride, sum);
    if (k < o.depth) add_dots<Fetched>(weight, x, o.x_stride, k, o.depth - k, ahead, o.weight_stride, sum);
  }
  if (!piece.last) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int u = 0; u < Units; ++u) kept[i][u] = sum[i][u];
    return;
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) partial[i * stride] = sum_parts<T, Units>(sum[i]);
}

template <class T>
using DotTile = void (*)(const DotPiece<T>&, int64_t, int64_t, int64_t, int, Vector<T> (*)[dot_units<T>], Vector<T>*, int64_t);
template <class T>
using DotTiles = const DotTile<T> (*)[4];
template <class S>
constexpr DotTile<Compute<S>> dot_tiles[2][4] = {  // by passes and rows; of two passes each has two rows at least
    {dot_tile<S, 1, 1>, dot_tile<S, 2, 1>, dot_tile<S, 3, 1>, dot_tile<S, most_dot_rows, 1>},
    {nullptr, dot_tile<S, 2, 2>, dot_tile<S, 3, 2>, dot_tile<S, most_dot_rows, 2>}};
template <class T>
DotTiles<T> dot_tiles_of(DType dtype) {
  if constexpr (sizeof(T) == sizeof(double)) return dot_tiles<double>;
  else return dtype == DType::bf16 ? dot_tiles<Bf16> : dtype == DType::f16 ? dot_tiles<F16> : dot_tiles<float>;
}

inline bool single_step_applies(const RecurrentForward& p) {
  return p.sequence.steps == 1 && !p.sequence.lengths && p.shape.projected == 0 && p.shape.hidden > 0;
}

template <class T>
struct SingleStep {
  static constexpr int L = lanes<T>;
  static constexpr int64_t most_rows = 2 * most_dot_rows;  // that share what the first-level cache holds of the weights
  // Of most_rows rows of x beside two tiles' weights and sums in the first-level cache: 16 + 16 + 8 KiB.
  static constexpr int64_t piece_depth = 2048 / sizeof(T);

  const RecurrentForward& p;
  const CellKind<T>& cell = cell_kind<T>(p.cell);
  const Storage<T> storage{p.dtype};
  const DotTiles<T> tiles = dot_tiles_of<T>(p.dtype);
  const int64_t batch = p.sequence.batch, inputs = p.shape.input, hidden = p.shape.hidden;
  const int64_t x_stride = round_up(inputs, L), units = round_up(hidden, L), columns = cell.gates * units;
  T *x, *h, *c;          // [batch, x_stride], [batch, units]: operands with zeros up to full vectors
  T* result;             // [batch, units]
  T *b_ih, *b_hh;        // [gates, units]
  T *x_gates, *h_gates;  // [batch, gates, units]; where X and R enter as their sum, it is in h_gates

  explicit SingleStep(const RecurrentForward& problem) : p(problem) {}

  void run(const ThreadPool& pool) {
    Carver::carve(ScratchUse::caller, [&](Carver& scratch) {
      x = scratch.take<T>(batch * x_stride);
      h = scratch.take<T>(batch * units);
      c = scratch.take<T>(batch * units);
      result = scratch.take<T>(batch * units);
      b_ih = scratch.take<T>(columns);
      b_hh = scratch.take<T>(columns);
      x_gates = scratch.take<T>(batch * columns);
      h_gates = scratch.take<T>(batch * columns);
    });
    load_operands();
    const DotOperand<T> operands[] = {{x, x_stride, p.weights.w_ih, inputs, inputs}, {h, units, p.weights.w_hh, hidden, hidden}};
    auto take_blocks = [&](int64_t begin, int64_t end) {
      for (int gate = 0; gate < cell.gates; ++gate)
        for (int64_t i = begin; i < end; ++i) gate_sums(operands, gate, i * L);
      run_cell(begin * L, end - begin);
    };
    const int64_t blocks = units / L;
    const bool worth_threads = batch * hidden * (inputs + hidden) * cell.gates > int64_t{1} << 18;
    if (worth_threads) parallel_for(pool, blocks, [&](int64_t begin, int64_t end) { take_blocks(begin, end); });
    else take_blocks(0, blocks);
    for (int64_t i = 0; i < batch; ++i) {
      storage.store(result + i * units, p.h_n, i * hidden, hidden);
      if (p.output.data != p.h_n) storage.store(result + i * units, p.output.data, i * p.output.sample_stride, hidden);
      if (cell.has_c) storage.store(c + i * units, p.c_n, i * hidden, hidden);
    }
  }

  void load_operands() {
    zero_row(x_gates, batch * columns);
    for (int64_t i = 0; i < batch; ++i) {
      load(p.input.data, i * p.input.sample_stride, inputs, x + i * x_stride, x_stride);
      load(p.h_0, i * hidden, hidden, h + i * units, units);
      if (cell.has_c) load(p.c_0, i * hidden, hidden, c + i * units, units);
    }
    for (int64_t gate = 0; gate < cell.gates; ++gate) {
      load(p.weights.b_ih, gate * hidden, p.weights.b_ih ? hidden : 0, b_ih + gate * units, units);
      load(p.weights.b_hh, gate * hidden, p.weights.b_hh ? hidden : 0, b_hh + gate * units, units);
      if (cell.x_slots[gate] == gate) join_biases(b_ih + gate * units, b_hh + gate * units, units);
    }
  }

  void load(const void* from, int64_t offset, int64_t count, T* to, int64_t stride) const {
    storage.load(from, offset, to, count);
    zero_row(to + count, stride - count);
  }

  // A gate of L hidden units, of all samples.
  void gate_sums(const DotOperand<T>* operands, int gate, int64_t unit) const {
    const bool joined = cell.x_slots[gate] == gate;
    for (int64_t row = 0, count; row < batch; row += count) {
      count = min(batch - row, most_rows);
      const int64_t at = row * columns + gate * units + unit;
      if (!joined) dots(operands, 1, row, count, gate, unit, x_gates + at);
      dots(joined ? operands : operands + 1, joined ? 2 : 1, row, count, gate, unit, h_gates + at);
    }
  }

  // Some weight rows at a time pass by all of the rows, while they are in the first-level cache.
  void dots(const DotOperand<T>* operands, int operand_count, int64_t row, int64_t count, int gate, int64_t unit,
            T* to) const {
    constexpr int parts = L / dot_units<T>;
    Vector<T> kept[parts][most_rows][dot_units<T>], partial[most_rows * parts];
    const int passes = static_cast<int>(ceil_div(count, most_dot_rows));
    auto add = [&](const DotPiece<T>& piece) {
      for (int part = 0; part < parts; ++part) {
        int64_t i = 0, some;
        for (int pass = 0; pass < passes; ++pass, i += some) {
          some = ceil_div(count - i, passes - pass);  // equal tiles, as far as that goes
          tiles[passes - 1][some - 1](piece, row + i, gate * hidden + unit + part * dot_units<T>, (gate + 1) * hidden, pass,
                                      kept[part] + i, partial + i * parts + part, parts);
        }
      }
    };
    add_pieces(operands, operand_count, add);
    for (int64_t i = 0; i < count; ++i) store_as(to + i * columns, sum_parts<T, parts, dot_units<T>>(partial + i * parts));
  }

  // Calls add(DotPiece) for all operands: together, or where their rows would not stay in the first-level cache, in pieces.
  template <class Add>
  void add_pieces(const DotOperand<T>* operands, int count, Add&& add) const {
    if (batch == 1 || inputs + hidden <= piece_depth) return add({operands, count, true, true});
    bool first = true;
    for (int operand = 0; operand < count; ++operand) {
      const DotOperand<T>& o = operands[operand];
      for (int64_t k = 0; k < o.depth; k += piece_depth, first = false) {
        const DotOperand<T> piece = {o.x + k, o.x_stride, static_cast<const char*>(o.weight) + storage.bytes(k), o.weight_stride,
                                     min(o.depth - k, piece_depth)};
        add({&piece, 1, first, operand + 1 == count && k + piece_depth >= o.depth});
      }
    }
  }

  // Units [unit, unit + vectors * L) of all samples.
  void run_cell(int64_t unit, int64_t vectors) const {
    ForwardStep<T> step = {};
    step.items = batch, step.vectors = vectors, step.gate_stride = units;
    step.x = x_gates + unit, step.r = h_gates + unit, step.x_stride = step.r_stride = columns;
    step.b_ih = b_ih + unit, step.b_hh = b_hh + unit;
    step.memory = (cell.has_c ? c : h) + unit, step.memory_stride = units;
    step.result = result + unit, step.result_stride = units;
    step.saved = p.saved ? static_cast<T*>(p.saved) + unit : nullptr;
    step.saved_stride = cell.saved * hidden, step.hidden = hidden, step.units = hidden - unit;
    cell.forward(step);
  }
};

}  // namespace
}  // namespace cvfast
