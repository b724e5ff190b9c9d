// The forward pass. Each thread takes some of the samples through all steps, without waiting for the others; where there
// are too few samples, some of the hidden units through each step, with the others:
//   projection of the inputs of as many steps as keep the gates in the cache, one matrix product;
//   then step by step the product of h with the recurrent weights, tile by tile, and the cell right behind it.
//
// Columns of the gates are in panel order: [panel of units][gate][vector of units][lane].
#pragma once
#include "panel_product.h"
#include "parallel.h"
#include "recurrent_cells.h"
#include "recurrent_sequence.h"
#include "team.h"
#include "transpose.h"

namespace cvfast {
namespace {

// Rows of a chunk. In large layers each chunk reads W_ih from beyond the caches. Where a second-level cache of 512 KB is to be
// expected, fewer rows stay in it.
constexpr int64_t most_projected_rows = 192, fewer_projected_rows = narrow ? 96 : most_projected_rows;
constexpr int64_t projected_bytes = int64_t{400} << 10;

// Columns of the gates, in vectors.
struct PanelOrder {
  int64_t hidden, lanes, gates, unit_vectors;  // of a panel

  int64_t vectors() const { return gates * unit_vectors; }  // of a panel
  int64_t units() const { return unit_vectors * lanes; }
  int64_t columns() const { return vectors() * lanes; }
  int64_t panels() const { return ceil_div(hidden, units()); }
  // The first hidden unit and the gate of a vector of columns.
  int64_t unit(int64_t vector) const { return (vector / vectors() * unit_vectors + vector % unit_vectors) * lanes; }
  int64_t gate(int64_t vector) const { return vector % vectors() / unit_vectors; }
};

// to[k * width + c] = from[c * depth + k] for k < depth and c < lanes, 0 for c >= count.
template <class T>
[[gnu::noinline]] void pack_vector(const T* from, int64_t count, int64_t depth, T* to, int64_t width) {
  constexpr int L = lanes<T>;
  if (count >= L && depth >= L) return copy_transposed(from, depth, to, width, depth, L);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t c = 0; c < L; ++c) to[k * width + c] = c < count ? from[c * depth + k] : T{};
}

// What packed weights were made of: the vectors, the shape, and some elements of each weight, by which one sees that
// somebody wrote to it in a way that torch does not count as a change (weight.data.mul_(2), say).
struct Stamp {
  static constexpr int64_t samples = 32, weights = 5;
  int64_t shape[8];
  char elements[weights][samples * 8];

  template <class S>
  void sample(int64_t weight, const void* from, int64_t count) {
    for (int64_t i = 0; i < samples && count > 0; ++i)
      store_as(elements[weight] + i * sizeof(S), static_cast<const S*>(from)[(count - 1) * i / (samples - 1)]);
  }
};

template <class T>
struct Forward {
  static constexpr int L = lanes<T>;
  static constexpr int plain_vectors = 4, plain_columns = plain_vectors * L;  // of a panel of W_hr
  static constexpr int plain_piece = piece_vectors<plain_vectors> * L;

  const RecurrentForward& p;
  const Ranks ranks{p.sequence};
  const Storage<T> storage{p.dtype};
  const CellKind<T>& cell = cell_kind<T>(p.cell);
  const PanelOrder order{p.shape.hidden, L, cell.gates, cell.vectors};
  const int64_t batch = p.sequence.batch, inputs = p.shape.input, hidden = p.shape.hidden, projected = p.shape.projected;
  const int64_t outputs = projected > 0 ? projected : hidden;
  const int64_t units = order.panels() * order.units();  // hidden units with padding
  const int64_t h_stride = projected > 0 ? round_up(projected, plain_columns) : units;
  // Whether h is fed back from the output's rows.
  const bool in_place = !storage.converts() && projected == 0 && units == hidden && !p.sequence.lengths;
  const int64_t piece_columns = (order.vectors() == 3 ? piece_vectors<3> : piece_vectors<4>) * L;  // of W_hh
  const int64_t columns = round_up(order.panels() * order.columns(), product_cols<T>);
  const int64_t gate_stride = columns + L;  // rows at a power of two would share the same sets of the first-level cache
  const bool fewer = fewer_projected_rows * gate_stride * static_cast<int64_t>(sizeof(T)) <= projected_bytes;
  const int64_t projected_rows = fewer ? fewer_projected_rows : most_projected_rows;
  ThreadCut cut;
  int64_t group_rows;             // room for the rows of a chunk of one group
  Stamp* stamp;
  T *w_ih, *w_hh, *w_hr, *b_ih, *b_hh;
  T* gates;                       // [groups, group_rows, gate_stride] W_ih x
  T* h[2];                        // [batch, h_stride] by rank, before even and odd steps
  T *c, *unprojected;             // [batch, units]
  int64_t* counters;              // of each group's team

  explicit Forward(const RecurrentForward& problem) : p(problem) {}

  void take_packed(Carver& scratch) {
    stamp = scratch.take<Stamp>(1);
    w_ih = scratch.take<T>(columns * inputs);
    w_hh = scratch.take<T>(columns * outputs);
    w_hr = scratch.take<T>(projected > 0 ? h_stride * hidden : 0);
    b_ih = scratch.take<T>(columns);
    b_hh = scratch.take<T>(columns);
  }

  int64_t packed_bytes() { return Carver::bytes([&](Carver& scratch) { take_packed(scratch); }); }

  void pack_into(void* to, const ThreadPool& pool) {
    Carver::cut_from(to, [&](Carver& scratch) { take_packed(scratch); });
    *stamp = stamp_of_weights();
    pack(pool);
  }

  // Takes what was packed ahead, if it was made of these weights.
  bool take_kept() {
    if (!p.packed) return false;
    Carver::cut_from(const_cast<void*>(p.packed), [&](Carver& scratch) { take_packed(scratch); });
    const Stamp now = stamp_of_weights();
    return __builtin_memcmp(&now, stamp, sizeof now) == 0;
  }

  Stamp stamp_of_weights() const {
    const int64_t rows = cell.gates * hidden;
    Stamp stamp = {{L, sizeof(T), static_cast<int64_t>(p.dtype), static_cast<int64_t>(p.cell), inputs, hidden, projected,
                    p.weights.b_ih != nullptr}, {}};
    auto sample = [&](int64_t weight, const void* from, int64_t count) {
      if (storage.converts()) stamp.sample<uint16_t>(weight, from, count);
      else stamp.sample<T>(weight, from, count);
    };
    sample(0, p.weights.w_ih, rows * inputs);
    sample(1, p.weights.w_hh, rows * outputs);
    sample(2, p.weights.b_ih, p.weights.b_ih ? rows : 0);
    sample(3, p.weights.b_hh, p.weights.b_hh ? rows : 0);
    sample(4, p.weights.w_hr, projected * hidden);
    return stamp;
  }

  void pack(const ThreadPool& pool) const {
    parallel_for(pool, columns / product_cols<T>, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        pack_gates(p.weights.w_ih, inputs, i * product_cols<T>, product_cols<T>, w_ih + i * product_cols<T> * inputs);
    });
    parallel_for(pool, order.panels(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t col = i * order.columns(); col < (i + 1) * order.columns(); col += piece_columns)
          pack_gates(p.weights.w_hh, outputs, col, piece_columns, w_hh + col * outputs);
    });
    pack_gates(p.weights.b_ih, p.weights.b_ih ? 1 : 0, 0, columns, b_ih);
    pack_gates(p.weights.b_hh, p.weights.b_hh ? 1 : 0, 0, columns, b_hh);
    if (!p.weights.b_ih) zero_row(b_ih, columns), zero_row(b_hh, columns);
    for (int64_t vector = 0; vector < columns / L; ++vector)
      if (cell.x_slots[order.gate(vector)] == order.gate(vector)) join_biases(b_ih + vector * L, b_hh + vector * L, L);
    for (int64_t i = 0; projected > 0 && i < h_stride; i += L) {
      const int64_t piece = i / plain_piece * plain_piece;
      pack_rows(p.weights.w_hr, i, projected - i, hidden, w_hr + piece * hidden + i - piece, plain_piece);
    }
  }

  // Columns [first, first + count), whole vectors, of a weight matrix with rows of `depth` elements.
  void pack_gates(const void* weight, int64_t depth, int64_t first, int64_t count, T* to) const {
    for (int64_t c = 0; c < count; c += L) {
      const int64_t vector = (first + c) / L, unit = order.unit(vector), row = order.gate(vector) * hidden + unit;
      pack_rows(weight, row, hidden - unit, depth, to + c, count);
    }
  }

  void pack_rows(const void* weight, int64_t row, int64_t count, int64_t depth, T* to, int64_t width) const {
    const int64_t elements = min<int64_t>(count, L) * depth;
    T* scratch = storage.converts() ? static_cast<T*>(thread_scratch(ScratchUse::worker, L * depth * sizeof(T))) : nullptr;
    pack_vector(storage.view(weight, row * depth, elements, scratch), count, depth, to, width);
  }

  void run(const ThreadPool& pool) {
    cut = ThreadCut::of(pool.threads, batch, hidden, order.panels());
    group_rows = max(projected_rows, batch);
    const bool kept = take_kept();
    Carver::carve(ScratchUse::caller, [&](Carver& scratch) {
      if (!kept) take_packed(scratch);
      gates = scratch.take<T>(cut.groups * group_rows * gate_stride);
      for (T*& state : h) state = scratch.take<T>(batch * h_stride);
      c = scratch.take<T>(cell.has_c ? batch * units : 0);
      unprojected = scratch.take<T>(projected > 0 ? batch * units : 0);
      counters = scratch.take<int64_t>(cut.groups * Team::size(cut.shares));
    });
    zero_row(counters, cut.groups * Team::size(cut.shares));
    if (!kept) pack(pool);
    load_states();
    parallel_for(pool, cut.members(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) Member(*this, i).run();
    });
  }

  void load_states() const {
    for (int64_t rank = 0; rank < batch; ++rank) {
      const int64_t sample = ranks.sample(rank);
      T* to = h[0] + rank * h_stride;
      storage.load(p.h_0, sample * outputs, to, outputs);
      if (ranks.length(rank) == 0) storage.store(to, p.h_n, sample * outputs, outputs);
      zero_row(to + outputs, h_stride - outputs);
      zero_row(h[1] + rank * h_stride, h_stride);
      if (cell.has_c) {
        storage.load(p.c_0, sample * hidden, c + rank * units, hidden);
        zero_row(c + rank * units + hidden, units - hidden);
      }
    }
  }

  // Rows of a state.
  struct State {
    T* data;
    int64_t stride;
  };

  // A thread: takes ranks [begin, end) through all steps, all hidden units or its share of them.
  struct Member {
    const Forward& f;
    const Ranks ranks = f.ranks;
    const int64_t group, own;
    const int64_t begin = ranks.cut(group, f.cut.groups), end = ranks.cut(group + 1, f.cut.groups);
    const int64_t chunk = steps_of(f.projected_rows, end - begin);  // steps that are projected together
    const Team team = {f.cut.shares, f.counters + group * Team::size(f.cut.shares)};
    int64_t stage = 0;
    T* const gates = f.gates + group * f.group_rows * f.gate_stride;
    T* copied;
    State x;

    Member(const Forward& forward, int64_t index)
        : f(forward), group(index / forward.cut.shares), own(index % forward.cut.shares) {
      copied = static_cast<T*>(thread_scratch(ScratchUse::worker, chunk * (end - begin) * f.inputs * sizeof(T)));
    }

    int64_t active(int64_t step) const { return max<int64_t>(0, min(ranks.active(step), end) - begin); }

    // The first of the panels of a share, a multiple of those that are whole panels of the projection with any cell.
    static int64_t first_panel(int64_t share, int64_t shares, int64_t panels) {
      return share == shares ? panels : panels * share / shares / product_vectors * product_vectors;
    }

    template <class Work>
    void together(int64_t panels, Work&& work) {
      team.stage(stage++, own, [&](int64_t share) {
        work(first_panel(share, team.shares, panels), first_panel(share + 1, team.shares, panels));
      });
    }

    void run() {
      if (begin == end) return;
      for (int64_t step = 0; step < f.p.sequence.steps && active(step) > 0; step += chunk) {
        const int64_t last = min(step + chunk, f.p.sequence.steps), rows = load_inputs(step, last);
        together(f.order.panels(), [&](int64_t panel, int64_t next) { project(rows, panel, next); });
        const T* row = gates;
        for (int64_t s = step; s < last; row += active(s) * f.gate_stride, ++s) take_step(s, row);
      }
      if (own == 0) store_rest();
    }

    // Sets x [rows of steps [step, last), inputs]; returns the number of rows.
    int64_t load_inputs(int64_t step, int64_t last) {
      int64_t row = 0;
      x = {copied, f.inputs};
      if (!f.storage.converts() && !f.p.sequence.lengths && !f.p.sequence.reverse && end - begin == f.batch &&
          f.p.input.time_stride == f.batch * f.p.input.sample_stride) {  // all rows at equal distances: where they lie
        x = {const_cast<T*>(static_cast<const T*>(f.p.input.data)) + step * f.p.input.time_stride, f.p.input.sample_stride};
        return (last - step) * f.batch;
      }
      for (int64_t s = step; s < last; ++s)
        for (int64_t rank = begin; rank < begin + active(s); ++rank, ++row) {
          const int64_t offset = ranks.offset(f.p.input, ranks.time(s, rank), rank);
          f.storage.load(f.p.input.data, offset, copied + row * f.inputs, f.inputs);
        }
      return row;
    }

    // gates = x W_ih^T, the columns of panels [panel, next).
    void project(int64_t rows, int64_t panel, int64_t next) const {
      const int64_t first = panel * f.order.columns(), last = next == f.order.panels() ? f.columns : next * f.order.columns();
      // With a second chain of products the gates of a few columns at a time, which stay in a small L2 cache until it comes.
      const int64_t width = narrow && f.inputs > product_depth<T> ? product_block_cols<T> : last - first;
      for (int64_t row = 0; row < rows; row += product_block_rows)
        for (int64_t col = first; col < last; col += width)
          for (int64_t k = 0; k == 0 || k < f.inputs; k += product_depth<T>)
            panel_block(min(rows - row, product_block_rows), min(last - col, width), min(f.inputs - k, product_depth<T>),
                        Matrix<const T>{x.data + row * x.stride + k, x.stride, 1},
                        f.w_ih + col * f.inputs + k * product_cols<T>, f.inputs * product_cols<T>,
                        gates + row * f.gate_stride + col, f.gate_stride, k > 0,
                        {f.w_hh + col * f.outputs, f.outputs * product_cols<T>});
    }

    // h of rank `begin` before a step.
    State state(int64_t step) const {
      if (!f.in_place || step == 0) return {f.h[step % 2] + begin * f.h_stride, f.h_stride};
      const int64_t offset = ranks.offset(f.p.output, ranks.time(step - 1, begin), begin);
      return {static_cast<T*>(f.p.output.data) + offset, f.p.output.sample_stride};
    }

    void take_step(int64_t step, const T* projection) {
      const int64_t rows = active(step);
      const State h = state(step), next_h = state(step + 1);
      const State result = f.projected > 0 ? State{f.unprojected + begin * f.units, f.units} : next_h;
      T* saved = static_cast<T*>(f.p.saved);
      if (saved) saved += (ranks.first(step) + begin) * f.cell.saved * f.hidden;
      const State c = {f.c + begin * f.units, f.units};
      together(f.order.panels(), [&](int64_t panel, int64_t next) {
        const PackedPanels<T> w_hh = {f.w_hh + panel * f.order.columns() * f.outputs, next - panel, f.outputs};
        auto finish = [&](const PanelSums<T>& s) {
          run_cell({s.row, s.rows, panel + s.panel, s.panels, s.sum}, projection, f.cell.has_c ? c : h, result, saved);
        };
        auto fetch = [&](const PanelSums<T>& s) {
          const T* from = projection + s.row * f.gate_stride + (panel + s.panel) * f.order.columns();
          for (int64_t row = 0; row < s.rows; ++row, from += f.gate_stride)
            for (int64_t i = 0; i < s.panels * f.order.columns(); i += 64 / sizeof(T)) __builtin_prefetch(from + i);
          if (saved) fetch_saved(saved + s.row * f.cell.saved * f.hidden + (panel + s.panel) * f.order.units(), s.rows, s.panels);
        };
        if (f.order.vectors() == 3) panel_product<T, 3>(rows, h.data, h.stride, w_hh, step % 2, fetch, finish);
        else panel_product<T, 4>(rows, h.data, h.stride, w_hh, step % 2, fetch, finish);
        if (f.projected == 0) store_outputs(step, rows, next_h, panel * f.order.units(), next * f.order.units());
      });
      if (f.projected > 0)
        together(f.h_stride / plain_columns, [&](int64_t panel, int64_t next) {
          project_state(rows, result.data, next_h.data, panel, next);
          store_outputs(step, rows, next_h, panel * plain_columns, next * plain_columns);
        });
    }

    // What the cells of some rows and panels will store: memory takes in what it is asked to beside the products.
    void fetch_saved(const T* saved, int64_t rows, int64_t panels) const {
      for (int64_t i = 0; i < rows * f.cell.saved; ++i, saved += f.hidden)
        for (int64_t unit = 0; unit < panels * f.order.units(); unit += 64 / sizeof(T)) __builtin_prefetch(saved + unit, 1);
    }

    // The cells of s; the pointers are those of row 0.
    void run_cell(const PanelSums<T>& s, const T* projection, State memory, State result, T* saved) const {
      const int64_t units = f.order.units(), columns = f.order.columns(), unit = s.panel * units;
      const int64_t saved_stride = f.cell.saved * f.hidden;
      const bool by_panel = s.panels > 1;  // items are the panels of a row, not the rows of a panel
      ForwardStep<T> step = {};
      step.items = by_panel ? s.panels : s.rows, step.vectors = f.cell.vectors, step.gate_stride = units;
      step.hidden = f.hidden, step.units = f.hidden - unit, step.units_stride = by_panel ? units : 0;
      step.b_ih = f.b_ih + s.panel * columns, step.b_hh = f.b_hh + s.panel * columns, step.b_stride = by_panel ? columns : 0;
      step.x_stride = by_panel ? columns : f.gate_stride, step.r_stride = columns;
      step.memory_stride = by_panel ? units : memory.stride, step.result_stride = by_panel ? units : result.stride;
      step.saved_stride = by_panel ? units : saved_stride;
      for (int64_t i = 0; i < (by_panel ? s.rows : 1); ++i) {
        const int64_t row = s.row + i;
        step.x = projection + row * f.gate_stride + s.panel * columns, step.r = s.sum + i * s.panels * columns;
        step.memory = memory.data + row * memory.stride + unit, step.result = result.data + row * result.stride + unit;
        step.saved = saved ? saved + row * saved_stride + unit : nullptr;
        f.cell.forward(step);
      }
    }

    // Panels [panel, next) of next_h = unprojected W_hr^T.
    void project_state(int64_t rows, const T* unprojected, T* next_h, int64_t panel, int64_t next) const {
      panel_product<T, plain_vectors>(
          rows, unprojected, f.units, {f.w_hr + panel * plain_columns * f.hidden, next - panel, f.hidden}, false,
          [](const PanelSums<T>&) {},
          [&](const PanelSums<T>& s) {
            const int64_t count = s.panels * plain_columns;
            for (int64_t r = 0; r < s.rows; ++r)
              copy_row(s.sum + r * count, next_h + (s.row + r) * f.h_stride + (panel + s.panel) * plain_columns, count);
          });
    }

    // Units [unit, next) of h into the output, if they aren't there, and into h_n where a sample ends.
    void store_outputs(int64_t step, int64_t rows, State h, int64_t unit, int64_t next) const {
      const int64_t count = min(next, f.outputs) - unit;
      for (int64_t row = 0; row < rows && count > 0; ++row) {
        const int64_t rank = begin + row;
        const T* from = h.data + row * h.stride + unit;
        if (!f.in_place) f.storage.store(from, f.p.output.data, ranks.offset(f.p.output, ranks.time(step, rank), rank) + unit, count);
        if (step + 1 == ranks.length(rank))
          f.storage.store(from, f.p.h_n, ranks.sample(rank) * f.outputs + unit, count);
      }
    }

    // c_n, and zeros beyond the samples' lengths.
    void store_rest() const {
      for (int64_t rank = begin; rank < end; ++rank) {
        if (f.cell.has_c)
          f.storage.store(f.c + rank * f.units, f.p.c_n, ranks.sample(rank) * f.hidden, f.hidden);
        for (int64_t time = ranks.length(rank); ranks.padded() && time < f.p.sequence.steps; ++time)
          f.storage.zero(f.p.output.data, ranks.offset(f.p.output, time, rank), f.outputs);
      }
    }
  };
};

}  // namespace
}  // namespace cvfast
