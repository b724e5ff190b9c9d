// The backward pass, from the last step to the first, some steps (a chunk) at a time:
//   each thread takes some of the samples (or, where there are few, some of the hidden units) back through the chunk: the
//   cells' derivative, then its product with W_hh;
//   then the chunk's share of the gradients to weights and inputs, as matrix products over all of its rows.
// So memory for the gates' gradients is that of a chunk. Sums over a chunk are added in order.
#pragma once
#include "panel_product.h"
#include "parallel.h"
#include "recurrent_cells.h"
#include "recurrent_sequence.h"
#include "team.h"

namespace cvfast {
namespace {

constexpr int64_t chunk_rows = 512;  // few rows, deep sums: each chunk reads and writes all of the weights' gradients

// to [rows, cols] += a [rows, depth] times B [depth, cols], whole panels of columns. B is read once, where it lies: some of its
// rows at a time, while the next ones come near.
[[gnu::noinline]] inline void add_product(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t a_stride,
                                          const float* b, int64_t b_stride, float* to, int64_t stride) {
  constexpr int64_t step = 16;  // rows whose panel stays in the first-level cache even where they are pages apart
  for (int64_t k = 0; k < depth; k += step, a += step, b += step * b_stride) {
    const int64_t deep = min(step, depth - k);
    for (int64_t col = 0; col < cols; col += panel_cols<float>) {
      for (int64_t row = deep; row < min(deep + step, depth - k); ++row)
        for (int64_t i = 0; i < panel_cols<float>; i += line_elements<float>)
          __builtin_prefetch(b + row * b_stride + col + i, 0, 2);
      column_product<float, most_vectors>(rows, deep, Matrix<const float>{a, a_stride, 1}, b + col, b_stride, to + col, stride,
                                          true);
    }
  }
}

template <class T>
struct Backward {
  static constexpr int L = lanes<T>;
  static constexpr int vectors = 4;  // of a panel of the matrices that a step multiplies with
  static constexpr int panel_columns = vectors * L;

  const RecurrentBackward& p;
  const Ranks ranks{p.sequence};
  const Storage<T> storage{p.dtype};
  const CellKind<T>& cell = cell_kind<T>(p.cell);
  const int64_t batch = p.sequence.batch, inputs = p.shape.input, hidden = p.shape.hidden, projected = p.shape.projected;
  const int64_t outputs = projected > 0 ? projected : hidden;
  const int64_t rows = cell.gates * hidden;      // of W_ih and W_hh
  // Of a row of `gates`: rows at a power of two would share the same sets of the first-level cache.
  const int64_t slots = round_up(cell.grads * hidden, L) + L;
  const int64_t h_stride = round_up(outputs, panel_columns), units = round_up(hidden, panel_columns);
  const int64_t chunk = steps_of(chunk_rows, batch);
  const bool wants_weights = p.wants_weights, wants_input = p.wants_input;
  // A cell by itself multiplies with each weight once: to pack them would take longer.
  const bool in_place = p.dtype == DType::f32 && p.sequence.steps == 1 && projected == 0 && hidden % panel_cols<T> == 0 &&
                        inputs % panel_cols<T> == 0;

  ThreadCut cut;
  int64_t* counters;    // of each group's team
  T* gates;             // [rows of a chunk, slots] gradients of the gates
  T* unprojected_grad;  // [rows of a chunk, h_stride] with a projection: gradients of h
  T *dh, *dc;           // [batch, h_stride], [batch, units] by rank: gradients of the states between two steps
  T* dh_hidden;         // [batch, units] with a projection: gradients of what is projected
  T *w_hh, *w_hr, *w_ih;  // packed: [panel][rows][panel_columns], [panel][projected][..], [panel][rows][product_cols]

  // The gradient of one weight matrix: A^T B summed over all rows, A some columns of `gates` (or unprojected_grad).
  struct WeightGrad {
    int64_t rows, cols;
    int64_t stride = 0;   // cols with padding
    T* sum = nullptr;     // [rows, stride]
    T* bias = nullptr;    // [rows]
    T* panels = nullptr;  // B of a chunk, packed: [panel][rows of the chunk][product_cols]

    bool stored = false;  // whether sum and bias are the results themselves

    void take(Carver& scratch, int64_t depth, Storage<T> storage, void* to, void* to_bias) {
      stride = round_up(cols, product_cols<T>);
      stored = !storage.converts() && stride == cols;
      sum = stored ? static_cast<T*>(to) : scratch.take<T>(rows * stride);
      bias = stored && to_bias ? static_cast<T*>(to_bias) : scratch.take<T>(rows);
      panels = scratch.take<T>(depth * stride);
    }
    // Row k of a chunk of `depth` rows.
    [[gnu::noinline]] void pack_row(int64_t k, int64_t depth, const T* from) const {
      for (int64_t col = 0; col < stride; col += product_cols<T>) {
        T* to = panels + col * depth + k * product_cols<T>;
        for (int64_t i = 0; i < product_cols<T>; i += L)
          store_as(to + i, cols - col > i ? load_units(from + col + i, cols - col - i) : Vector<T>{});
      }
    }
    void store(Storage<T> storage, void* to, void* to_bias) const {
      if (stored) return;
      for (int64_t row = 0; row < rows; ++row) storage.store(sum + row * stride, to, row * cols, cols);
      if (to_bias) storage.store(bias, to_bias, 0, rows);
    }
  };
  WeightGrad w_ih_grad{rows, inputs}, w_hh_grad{rows, outputs}, w_hr_grad{projected, hidden};

  explicit Backward(const RecurrentBackward& problem) : p(problem) {}

  void run(const ThreadPool& pool) {
    cut = ThreadCut::of(pool.threads, batch, hidden, h_stride / panel_columns);
    const int64_t depth = min(chunk, max<int64_t>(p.sequence.steps, 1)) * batch;
    Carver::carve(ScratchUse::caller, [&](Carver& scratch) {
      gates = scratch.take<T>(depth * slots);
      unprojected_grad = scratch.take<T>(projected > 0 ? depth * h_stride : 0);
      dh = scratch.take<T>(batch * h_stride);
      dc = scratch.take<T>(batch * units);
      dh_hidden = scratch.take<T>(projected > 0 ? batch * units : 0);
      counters = scratch.take<int64_t>(cut.groups * Team::size(cut.shares));
      w_hh = scratch.take<T>(in_place ? 0 : rows * h_stride);
      w_hr = scratch.take<T>(projected * units);
      w_ih = scratch.take<T>(wants_input && !in_place ? rows * round_up(inputs, product_cols<T>) : 0);
      if (!wants_weights) return;
      w_ih_grad.take(scratch, depth, storage, p.grad_weights.w_ih, p.grad_weights.b_ih);
      w_hh_grad.take(scratch, depth, storage, p.grad_weights.w_hh, p.grad_weights.b_hh);
      if (projected > 0) w_hr_grad.take(scratch, depth, storage, p.grad_weights.w_hr, nullptr);
    });
    if (!in_place) pack(pool);
    start(pool);
    bool first = true;
    for (int64_t last = last_step(); last > 0 || first; last = max<int64_t>(0, last - chunk), first = false) {
      const int64_t step = max<int64_t>(0, last - chunk);
      zero_row(counters, cut.groups * Team::size(cut.shares));
      parallel_for(pool, cut.members(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) Member(*this, i).go_back(step, last);
      });
      products(step, last, first, pool);
    }
    finish(pool);
  }

  int64_t last_step() const {  // no sample has more steps
    int64_t last = p.sequence.steps;
    while (last > 0 && ranks.active(last - 1) == 0) --last;
    return last;
  }

  // A matrix [depth, cols] in panels of `width` columns, `stride` in all.
  void pack_matrix(const void* from, int64_t depth, int64_t cols, int64_t stride, int64_t width, T* to,
                   const ThreadPool& pool) const {
    parallel_for(pool, stride / width, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t col = panel * width, count = max<int64_t>(0, min(width, cols - col));
          T* row = to + (panel * depth + k) * width;
          storage.load(from, k * cols + col, row, count);
          zero_row(row + count, width - count);
        }
    });
  }

  void pack(const ThreadPool& pool) {
    constexpr int piece = piece_vectors<vectors> * L;
    pack_matrix(p.weights.w_hh, rows, outputs, h_stride, piece, w_hh, pool);
    if (projected > 0) pack_matrix(p.weights.w_hr, projected, hidden, units, piece, w_hr, pool);
    if (wants_input) pack_matrix(p.weights.w_ih, rows, inputs, round_up(inputs, product_cols<T>), product_cols<T>, w_ih, pool);
  }

  void load_state(const void* from, int64_t sample, int64_t count, T* to, int64_t stride) const {
    if (from) storage.load(from, sample * count, to, count);
    zero_row(to + (from ? count : 0), stride - (from ? count : 0));
  }

  // The states' gradients behind the last step, and zeros in grad_input beyond the samples' lengths.
  void start(const ThreadPool& pool) {
    parallel_for(pool, batch, [&](int64_t begin, int64_t end) {
      for (int64_t rank = begin; rank < end; ++rank) {
        load_state(p.grad_h_n, ranks.sample(rank), outputs, dh + rank * h_stride, h_stride);
        load_state(cell.has_c ? p.grad_c_n : nullptr, ranks.sample(rank), hidden, dc + rank * units, units);
        if (wants_input && ranks.padded())
          for (int64_t time = ranks.length(rank); time < p.sequence.steps; ++time)
            storage.zero(p.grad_input.data, ranks.offset(p.grad_input, time, rank), inputs);
      }
    });
  }

  void finish(const ThreadPool& pool) {
    parallel_for(pool, batch, [&](int64_t begin, int64_t end) {
      for (int64_t rank = begin; rank < end; ++rank) {
        const int64_t sample = ranks.sample(rank);
        storage.store(dh + rank * h_stride, p.grad_h_0, sample * outputs, outputs);
        if (cell.has_c) storage.store(dc + rank * units, p.grad_c_0, sample * hidden, hidden);
      }
    });
    if (!wants_weights) return;
    w_ih_grad.store(storage, p.grad_weights.w_ih, p.grad_weights.b_ih);
    w_hh_grad.store(storage, p.grad_weights.w_hh, p.grad_weights.b_hh);
    if (projected > 0) w_hr_grad.store(storage, p.grad_weights.w_hr, nullptr);
  }

  const T* saved(int64_t step, int64_t rank) const {
    return static_cast<const T*>(p.saved) + (ranks.first(step) + rank) * cell.saved * hidden;
  }
  // h before the step, units [unit, unit + count): of the output, or the initial state; in `row` if it must be converted.
  const T* h_before(int64_t step, int64_t rank, int64_t unit, int64_t count, T* row) const {
    if (step == 0) return storage.view(p.h_0, ranks.sample(rank) * outputs + unit, count, row);
    return storage.view(p.output.data, ranks.offset(p.output, ranks.time(step - 1, rank), rank) + unit, count, row);
  }
  // Likewise the cell's memory (see recurrent_cells.h).
  const T* memory_before(int64_t step, int64_t rank, int64_t unit, int64_t count, T* row) const {
    if (!cell.has_c) return h_before(step, rank, unit, count, row);
    if (step > 0) return saved(step - 1, rank) + (cell.saved - 1) * hidden + unit;
    return storage.view(p.c_0, ranks.sample(rank) * hidden + unit, count, row);
  }

  // A thread: takes ranks [begin, end) back through the steps of a chunk, all hidden units or its share of them.
  struct Member {
    const Backward& b;
    const Ranks ranks = b.ranks;
    const int64_t group, own;
    const int64_t begin = ranks.cut(group, b.cut.groups), end = ranks.cut(group + 1, b.cut.groups);
    const Team team = {b.cut.shares, b.counters + group * Team::size(b.cut.shares)};
    int64_t stage = 0;
    T* scratch_row;

    Member(const Backward& backward, int64_t index)
        : b(backward), group(index / backward.cut.shares), own(index % backward.cut.shares) {
      scratch_row = static_cast<T*>(thread_scratch(ScratchUse::worker, max(b.hidden, b.outputs) * sizeof(T)));
    }

    // work(first, next): columns of the panels of a share, of `columns` in all.
    template <class Work>
    void together(int64_t columns, Work&& work) {
      const int64_t panels = columns / panel_columns, shares = team.shares;
      team.stage(stage++, own, [&](int64_t share) {
        work(panels * share / shares * panel_columns, panels * (share + 1) / shares * panel_columns);
      });
    }

    void go_back(int64_t first_step, int64_t last_step) {
      for (int64_t step = last_step - 1; step >= first_step; --step) {
        const int64_t rows = max<int64_t>(0, min(ranks.active(step), end) - begin);
        if (rows == 0) continue;
        const int64_t place = ranks.first(step) - ranks.first(first_step) + begin;
        T* gates = b.gates + place * b.slots;
        T* dh = b.dh + begin * b.h_stride;
        if (b.projected > 0) back_through_projection(step, rows, dh, b.unprojected_grad + place * b.h_stride);
        together(b.units, [&](int64_t unit, int64_t next) {
          if (b.projected == 0) add_output_grads(step, rows, unit, next);
          for (int64_t row = 0; row < rows; ++row) back_through_cell(step, row, unit, next, gates + row * b.slots);
        });
        together(b.h_stride, [&](int64_t col, int64_t next) {
          if constexpr (sizeof(T) == sizeof(float))
            if (b.in_place) {
              const float* weights = static_cast<const float*>(b.p.weights.w_hh) + col;
              return add_product(rows, min(next, b.hidden) - col, b.rows, gates, b.slots, weights, b.hidden, dh + col,
                                 b.h_stride);
            }
          auto fetch = [&](const PanelSums<T>& s) { fetch_saved(step - 1, s.row, s.rows, col + s.panel * panel_columns, s.panels); };
          multiply(rows, gates, b.slots, b.w_hh, b.rows, col, next, dh, b.h_stride, true, step % 2, fetch);
        });
      }
    }

    void add_output_grads(int64_t step, int64_t rows, int64_t col, int64_t next) const {
      const int64_t count = min(next, b.outputs) - col;
      for (int64_t row = 0; b.p.grad_output.data && row < rows && count > 0; ++row) {
        const int64_t rank = begin + row, offset = ranks.offset(b.p.grad_output, ranks.time(step, rank), rank);
        const T* grad = b.storage.view(b.p.grad_output.data, offset + col, count, scratch_row);
        T* to = b.dh + rank * b.h_stride + col;
        for (int64_t i = 0; i < count; i += L)
          store_as(to + i, load_as<Vector<T>>(to + i) + load_units(grad + i, count - i));
      }
    }

    // Brings near what the cells of a step will read, of some panels' units.
    void fetch_saved(int64_t step, int64_t row, int64_t rows, int64_t unit, int64_t panels) const {
      const int64_t count = min(panels * panel_columns, b.hidden - unit);
      for (int64_t r = row; step >= 0 && r < row + rows; ++r) {
        const T* saved = b.saved(step, begin + r) + unit;
        for (int64_t i = 0; i < b.cell.saved; ++i, saved += b.hidden)
          for (int64_t k = 0; k < count; k += 64 / sizeof(T)) __builtin_prefetch(saved + k, 0, 2);
      }
    }

    // Columns [col, next) of: to (+)= a B, B packed in panels.
    template <class Fetch>
    static void multiply(int64_t rows, const T* a, int64_t a_stride, const T* panels, int64_t depth, int64_t col,
                         int64_t next, T* to, int64_t stride, bool add, bool last_first, Fetch&& fetch) {
      panel_product<T, vectors>(
          rows, a, a_stride, {panels + col * depth, (next - col) / panel_columns, depth}, last_first,
          fetch,
          [&](const PanelSums<T>& s) {
            const int64_t count = s.panels * panel_columns;
            const T* sum = s.sum;
            for (int64_t r = 0; r < s.rows; ++r, sum += count) {
              T* at = to + (s.row + r) * stride + col + s.panel * panel_columns;
              for (int64_t i = 0; i < count; i += L)
                store_as(at + i, add ? load_as<Vector<T>>(at + i) + load_as<Vector<T>>(sum + i) : load_as<Vector<T>>(sum + i));
            }
          });
    }

    // dh_hidden = dh W_hr. dh is kept for W_hr's gradient and starts anew: nothing of it goes by the projection.
    void back_through_projection(int64_t step, int64_t rows, T* dh, T* kept) {
      together(b.h_stride, [&](int64_t col, int64_t next) {
        add_output_grads(step, rows, col, next);
        for (int64_t row = 0; row < rows; ++row) {
          copy_row(dh + row * b.h_stride + col, kept + row * b.h_stride + col, next - col);
          zero_row(dh + row * b.h_stride + col, next - col);
        }
      });
      together(b.units, [&](int64_t col, int64_t next) {
        multiply(rows, kept, b.h_stride, b.w_hr, b.projected, col, next, b.dh_hidden + begin * b.units, b.units, false, step % 2,
                 [](const PanelSums<T>&) {});
      });
    }

    void back_through_cell(int64_t step, int64_t row, int64_t first_unit, int64_t next_unit, T* gates) const {
      const int64_t rank = begin + row, last_unit = min(next_unit, b.hidden);
      if (first_unit >= last_unit) return;
      b.cell.backward({b.hidden, first_unit, last_unit, b.saved(step, rank),
                       b.memory_before(step, rank, first_unit, last_unit - first_unit, scratch_row),
                       b.projected > 0 ? b.dh_hidden + rank * b.units : b.dh + rank * b.h_stride, b.dc + rank * b.units,
                       gates});
    }
  };

  // Calls use(row, step, rank) for rows [begin, end) of the chunk that starts at `step`.
  template <class Use>
  void for_each_row(int64_t step, int64_t begin, int64_t end, Use&& use) const {
    const int64_t origin = ranks.first(step);
    for (int64_t row = begin; row < end; ++step) {
      const int64_t first = ranks.first(step) - origin, next = min(end, ranks.first(step + 1) - origin);
      for (; row < next; ++row) use(row, step, row - first);
    }
  }

  // Pieces of the products of a chunk.
  int64_t weight_blocks(int64_t of) const { return ceil_div(of, product_block_rows); }

  void products(int64_t step, int64_t last, bool first, const ThreadPool& pool) {
    const int64_t depth = ranks.first(last) - ranks.first(step);
    if (wants_weights) {
      parallel_for(pool, depth, [&](int64_t begin, int64_t end) { pack_operands(step, begin, end, depth); });
      const int64_t blocks = cell.gates * weight_blocks(hidden);
      parallel_for(pool, blocks + weight_blocks(projected), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          if (i < blocks) add_gate_rows(i / weight_blocks(hidden), i % weight_blocks(hidden) * product_block_rows, depth, first);
          else add_projection_rows((i - blocks) * product_block_rows, depth, first);
      });
    }
    if (wants_input && depth > 0) {
      const int64_t col_blocks = ceil_div(inputs, product_block_cols<T>);
      parallel_for(pool, ceil_div(depth, product_block_rows) * col_blocks, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          input_block(step, i / col_blocks * product_block_rows, depth, i % col_blocks * product_block_cols<T>);
      });
    }
  }

  // x, h before the step, and what was projected: rows [begin, end) of the chunk.
  void pack_operands(int64_t step, int64_t begin, int64_t end, int64_t depth) {
    T* scratch_row = static_cast<T*>(thread_scratch(ScratchUse::worker, max(inputs, outputs) * sizeof(T)));
    for_each_row(step, begin, end, [&](int64_t row, int64_t s, int64_t rank) {
      const int64_t offset = ranks.offset(p.input, ranks.time(s, rank), rank);
      w_ih_grad.pack_row(row, depth, storage.view(p.input.data, offset, inputs, scratch_row));
      w_hh_grad.pack_row(row, depth, h_before(s, rank, 0, outputs, scratch_row));
      if (projected > 0) pack_unprojected(row, depth, saved(s, rank));
    });
  }

  void pack_unprojected(int64_t row, int64_t depth, const T* keep) {  // o tanh(c) of the lstm
    for (int64_t unit = 0; unit < w_hr_grad.stride; unit += L) {
      const int64_t count = hidden - unit;
      Vector<T> value = {};
      if (count > 0) value = load_units(keep + 3 * hidden + unit, count) * tanh<T>(load_units(keep + 4 * hidden + unit, count));
      store_as(w_hr_grad.panels + unit / product_cols<T> * product_cols<T> * depth + row * product_cols<T> + unit % product_cols<T>, value);
    }
  }

  // A gate's rows from `unit` on, of the gradients to W_ih and W_hh.
  void add_gate_rows(int64_t gate, int64_t unit, int64_t depth, bool first) {
    const int64_t count = min(hidden - unit, product_block_rows), row = gate * hidden + unit, x_slot = cell.x_slots[gate];
    const T* block = copy_block(gates + gate * hidden + unit, slots, depth, count);
    add_rows(w_hh_grad, block, row, count, depth, first);
    if (x_slot != gate) block = copy_block(gates + x_slot * hidden + unit, slots, depth, count);
    add_rows(w_ih_grad, block, row, count, depth, first);
  }

  void add_projection_rows(int64_t row, int64_t depth, bool first) {
    const int64_t count = min(projected - row, product_block_rows);
    add_rows(w_hr_grad, copy_block(unprojected_grad + row, h_stride, depth, count), row, count, depth, first);
  }

  // `count` columns of a matrix of `depth` rows, product_block_rows apart.
  const T* copy_block(const T* from, int64_t stride, int64_t depth, int64_t count) const {
    T* block = static_cast<T*>(thread_scratch(ScratchUse::worker, product_block_rows * depth * sizeof(T)));
    for (int64_t i = 0; i < depth; ++i) copy_row(from + i * stride, block + i * product_block_rows, count);
    return block;
  }

  // Rows [row, row + count) of A^T B and of A's column sums; A [depth, count] in `block`.
  void add_rows(const WeightGrad& grad, const T* block, int64_t row, int64_t count, int64_t depth, bool first) const {
    for (int64_t k = 0; k == 0 || k < depth; k += product_depth<T>) {
      const int64_t deep = min(depth - k, product_depth<T>);
      const T* a = block + k * product_block_rows;
      const bool add = !first || k > 0;
      panel_block(count, grad.cols, deep, Matrix<const T>{a, 1, product_block_rows}, grad.panels + k * product_cols<T>,
                  depth * product_cols<T>, grad.sum + row * grad.stride, grad.stride, add);
      add_column_sums(a, deep, count, grad.bias + row, add);
    }
  }

  static void add_column_sums(const T* block, int64_t depth, int64_t count, T* to, bool add) {
    constexpr int together = 4;  // chains of additions that hide their latency
    static_assert(product_block_rows % (together * L) == 0);
    for (int64_t col = 0; col < count; col += together * L) {
      Vector<T> sum[together] = {};
      for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 4
        for (int i = 0; i < together; ++i) sum[i] += load_as<Vector<T>>(block + k * product_block_rows + col + i * L);
      for (int64_t i = 0, at = col; i < together && at < count; ++i, at += L)
        store_units<T>(add ? load_units(to + at, count - at) + sum[i] : sum[i], to + at, count - at);
    }
  }

  // Rows [row, row + product_block_rows) of the chunk and columns [col, col + block_cols) of the inputs' gradient.
  void input_block(int64_t step, int64_t row, int64_t depth, int64_t col) {
    const int64_t count = min(depth - row, product_block_rows), cols = min(inputs - col, product_block_cols<T>);
    T* c = static_cast<T*>(thread_scratch(ScratchUse::worker, product_block_rows * product_block_cols<T> * sizeof(T)));
    if (in_place) zero_row(c, product_block_rows * product_block_cols<T>);
    if constexpr (sizeof(T) == sizeof(float))
      for (int64_t gate = 0; in_place && gate < cell.gates; ++gate)
        add_product(count, cols, hidden, gates + row * slots + cell.x_slots[gate] * hidden, slots,
                    static_cast<const float*>(p.weights.w_ih) + gate * hidden * inputs + col, inputs, c, product_block_cols<T>);
    for (int64_t gate = 0; !in_place && gate < cell.gates; ++gate)
      for (int64_t k = 0; k < hidden; k += product_depth<T>) {
        const int64_t deep = min(hidden - k, product_depth<T>);
        const T* a = gates + row * slots + cell.x_slots[gate] * hidden + k;
        const T* b = w_ih + col * rows + (gate * hidden + k) * product_cols<T>;
        panel_block(count, cols, deep, Matrix<const T>{a, slots, 1}, b, rows * product_cols<T>, c, product_block_cols<T>,
                    gate > 0 || k > 0);
      }
    if (rows == 0) zero_row(c, product_block_rows * product_block_cols<T>);
    for_each_row(step, row, row + count, [&](int64_t i, int64_t s, int64_t rank) {
      const int64_t offset = ranks.offset(p.grad_input, ranks.time(s, rank), rank);
      storage.store(c + (i - row) * product_block_cols<T>, p.grad_input.data, offset + col, cols);
    });
  }
};

}  // namespace
}  // namespace cvfast
