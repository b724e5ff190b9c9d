// What happens to one vector of hidden units in one step, forward and backward; the equations are in
// cvfast/recurrent.h, the derivatives follow from them. x and h are the projections X and R, each gate a vector.
//
// `memory` is the state that goes by a cell's gates: c of the lstm (updated), the previous h of the gru.
// `saved` is what the derivative will need; `grad` the derivative to the distinct ones among X's and R's gates: that of
// R's gate g is number g, that of X's gate g number x_slot(g).
//
// The loops around do not know the cell: they call it through CellKind, whole rows or tiles at a time. forward takes N vectors at
// once (see `interleaves`), in two halves: `end` gets what `begin` leaves in `between`. Number `late` of `saved` is end's.
#pragma once
#include "cvfast/recurrent.h"
#include "sigmoid_tanh.h"

namespace cvfast {
namespace {

template <class T>
struct LstmCell {
  using Element = T;
  using V = Vector<T>;
  static constexpr int gates = 4, vectors = 1, saved = 5, grads = 4, interleaved = 2;  // vectors: of hidden units in a panel
  static constexpr int between = 1, late = -1;
  static constexpr bool has_c = true;
  static constexpr int x_slot(int gate) { return gate; }

  template <int N>
  static void begin(const V (&x)[N][gates], const V (&h)[N][gates], V (&c)[N], V (&o)[N][between], V (&keep)[N][saved]) {
    V ifo[3 * N], g[N];
    for (int n = 0; n < N; ++n) {
      ifo[3 * n] = x[n][0] + h[n][0], ifo[3 * n + 1] = x[n][1] + h[n][1], ifo[3 * n + 2] = x[n][3] + h[n][3];
      g[n] = x[n][2] + h[n][2];
    }
    sigmoids<T>(ifo, ifo);
    tanhs<T>(g, g);
    for (int n = 0; n < N; ++n) {
      c[n] = ifo[3 * n + 1] * c[n] + ifo[3 * n] * g[n];
      o[n][0] = ifo[3 * n + 2];
      keep[n][0] = ifo[3 * n], keep[n][1] = ifo[3 * n + 1], keep[n][2] = g[n], keep[n][3] = ifo[3 * n + 2], keep[n][4] = c[n];
    }
  }
  template <int N>
  static void end(const V (&o)[N][between], const V (&c)[N], V (&result)[N], V (&)[N]) {
    tanhs<T>(c, result);
    for (int n = 0; n < N; ++n) result[n] = o[n][0] * result[n];
  }

  // The derivative to the previous h that does not go through R. dh: to h'; dc: to c', becomes that to the previous c.
  [[gnu::always_inline]] static V backward(const V (&keep)[saved], V previous_c, V dh, V& dc, V (&grad)[grads]) {
    const V i = keep[0], f = keep[1], g = keep[2], o = keep[3], t = tanh<T>(keep[4]);
    dc += dh * o * (T{1} - t * t);
    grad[0] = dc * g * (i * (T{1} - i));
    grad[1] = dc * previous_c * (f * (T{1} - f));
    grad[2] = dc * i * (T{1} - g * g);
    grad[3] = dh * t * (o * (T{1} - o));
    dc *= f;
    return V{};
  }
};

template <class T>
struct GruCell {
  using Element = T;
  using V = Vector<T>;
  static constexpr int gates = 3, vectors = 1, saved = 4, grads = 4, interleaved = 2;
  static constexpr int between = 2, late = 2;
  static constexpr bool has_c = false;
  static constexpr int x_slot(int gate) { return gate < 2 ? gate : 3; }

  template <int N>
  static void begin(const V (&x)[N][gates], const V (&h)[N][gates], V (&)[N], V (&z_and_n)[N][between],
                    V (&keep)[N][saved]) {
    for (int n = 0; n < N; ++n) z_and_n[n][0] = x[n][1] + h[n][1], z_and_n[n][1] = x[n][0] + h[n][0];
    auto& z_and_r = reinterpret_cast<V(&)[2 * N]>(z_and_n);
    sigmoids<T>(z_and_r, z_and_r);
    for (int n = 0; n < N; ++n) {
      keep[n][0] = z_and_n[n][1], keep[n][1] = z_and_n[n][0], keep[n][3] = h[n][2];
      z_and_n[n][1] = x[n][2] + keep[n][0] * h[n][2];
    }
  }
  template <int N>
  static void end(const V (&z_and_n)[N][between], const V (&previous_h)[N], V (&result)[N], V (&candidate)[N]) {
    for (int n = 0; n < N; ++n) candidate[n] = z_and_n[n][1];
    tanhs<T>(candidate, candidate);
    for (int n = 0; n < N; ++n) result[n] = candidate[n] + z_and_n[n][0] * (previous_h[n] - candidate[n]);
  }

  [[gnu::always_inline]] static V backward(const V (&keep)[saved], V previous_h, V dh, V&, V (&grad)[grads]) {
    const V r = keep[0], z = keep[1], n = keep[2];
    const V dn = dh * (T{1} - z) * (T{1} - n * n);
    grad[0] = dn * keep[3] * (r * (T{1} - r));
    grad[1] = dh * (previous_h - n) * (z * (T{1} - z));
    grad[2] = dn * r;
    grad[3] = dn;
    return dh * z;
  }
};

template <class T, bool Relu>
struct RnnCell {
  using Element = T;
  using V = Vector<T>;
  static constexpr int gates = 1, vectors = 4, saved = 1, grads = 1, interleaved = 4;
  static constexpr int between = 1, late = 0;
  static constexpr bool has_c = false;
  static constexpr int x_slot(int gate) { return gate; }

  template <int N>
  static void begin(const V (&x)[N][gates], const V (&h)[N][gates], V (&)[N], V (&sum)[N][between], V (&)[N][saved]) {
    for (int n = 0; n < N; ++n) sum[n][0] = x[n][0] + h[n][0];
  }
  template <int N>
  static void end(const V (&sum)[N][between], const V (&)[N], V (&result)[N], V (&keep)[N]) {
    for (int n = 0; n < N; ++n) result[n] = sum[n][0];
    if constexpr (!Relu) tanhs<T>(result, result);
    for (int n = 0; n < N; ++n) {
      if constexpr (Relu) result[n] = result[n] < T{0} ? V{} : result[n];  // in this order a NaN stays one
      keep[n] = result[n];
    }
  }

  [[gnu::always_inline]] static V backward(const V (&keep)[saved], V, V dh, V&, V (&grad)[grads]) {
    grad[0] = Relu ? (keep[0] <= T{0} ? V{} : dh) : dh * (T{1} - keep[0] * keep[0]);
    return V{};
  }
};

// load_first and store_first with the tails, which are rare, out of line.
template <class S>
[[gnu::noinline]] Vector<Compute<S>> load_tail(const S* from, int64_t count) { return load_first(from, count); }
template <class T>
[[gnu::noinline]] void store_tail(Vector<T> v, T* to, int64_t count) { store_first(v, to, count); }
template <class S>
Vector<Compute<S>> load_units(const S* from, int64_t count) {
  return count >= lanes<Compute<S>> ? load_vector(from) : load_tail(from, count);
}
template <class T>
void store_units(Vector<T> v, T* to, int64_t count) {
  if (count >= lanes<T>) store_vector(v, to);
  else store_tail<T>(v, to, count);
}

// A forward step of some hidden units, from the projections to the new state, for several items: rows, or panels of units of
// one row. Units are in whole vectors; an item of x, r and of the biases has gate g at g * gate_stride. Where X and R enter
// as their sum, b_ih holds the sum of both biases. Strides in elements, from item to item.
template <class T>
struct ForwardStep {
  int64_t items, vectors, gate_stride;
  const T *x, *r;      // W_ih x and W_hh h
  const T *b_ih, *b_hh;
  T *memory, *result;
  T* saved;            // [saved, hidden], or nullptr
  int64_t x_stride, r_stride, b_stride, memory_stride, result_stride, saved_stride;
  int64_t hidden;      // all hidden units
  int64_t units, units_stride;  // those there are from the item's first one on: units - item * units_stride
};

// A vector of hidden units of a step: where it finds what the step has pointers to.
template <class T>
struct Place {
  const T *x, *r, *b_ih, *b_hh;
  T *memory, *result, *saved;
  int64_t vector, units;  // its number in its item; units from it on

  explicit Place(const ForwardStep<T>& s) noexcept
      : x(s.x), r(s.r), b_ih(s.b_ih), b_hh(s.b_hh), memory(s.memory), result(s.result), saved(s.saved), vector(0), units(s.units) {}

  [[gnu::always_inline]] void go_on(const ForwardStep<T>& s) {
    constexpr int64_t L = lanes<T>;
    const bool same_item = ++vector < s.vectors;
    const int64_t back = (s.vectors - 1) * L;  // to the item's first vector
    x += same_item ? L : s.x_stride - back;
    r += same_item ? L : s.r_stride - back;
    b_ih += same_item ? L : s.b_stride - back;
    b_hh += same_item ? L : s.b_stride - back;
    memory += same_item ? L : s.memory_stride - back;
    result += same_item ? L : s.result_stride - back;
    if (saved) saved += same_item ? L : s.saved_stride - back;
    units -= same_item ? L : s.units_stride - back;
    if (!same_item) vector = 0;
  }

  [[gnu::always_inline]] void save(const ForwardStep<T>& s, int number, Vector<T> value) const {
    if (saved && units > 0) store_units<T>(value, saved + number * s.hidden, units);
  }
};

template <class Cell, int N, class T = typename Cell::Element>
[[gnu::always_inline]] inline void begin_forward(const ForwardStep<T>& s, Place<T>& place, Vector<T> (&between)[N][Cell::between]) {
  Vector<T> x[N][Cell::gates], r[N][Cell::gates], keep[N][Cell::saved], memory[N];
  Place<T> at = place;
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n, at.go_on(s)) {
#pragma GCC unroll 4
    for (int g = 0; g < Cell::gates; ++g) {
      x[n][g] = load_as<Vector<T>>(at.x + g * s.gate_stride) + load_as<Vector<T>>(at.b_ih + g * s.gate_stride);
      r[n][g] = load_as<Vector<T>>(at.r + g * s.gate_stride);
      if (Cell::x_slot(g) != g) r[n][g] += load_as<Vector<T>>(at.b_hh + g * s.gate_stride);
    }
    if constexpr (Cell::has_c) memory[n] = load_as<Vector<T>>(at.memory);
  }
  Cell::template begin<N>(x, r, memory, between, keep);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n, place.go_on(s)) {
    if constexpr (Cell::has_c) store_as(place.memory, memory[n]);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::saved; ++i)
      if (i != Cell::late) place.save(s, i, keep[n][i]);
  }
}

template <class Cell, int N, class T = typename Cell::Element>
[[gnu::always_inline]] inline void end_forward(const ForwardStep<T>& s, Place<T>& place, const Vector<T> (&between)[N][Cell::between]) {
  Vector<T> memory[N], result[N], late[N];
  Place<T> at = place;
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n, at.go_on(s)) memory[n] = load_as<Vector<T>>(at.memory);
  Cell::template end<N>(between, memory, result, late);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n, place.go_on(s)) {
    store_as(place.result, result[n]);
    if constexpr (Cell::late >= 0) place.save(s, Cell::late, late[n]);
  }
}

// Takes N of `left` vectors at a time, as long as there are so many; returns how many are left. Several begin before the first of
// them ends: half of a cell has so long a chain of instructions that a processor reaches the next vectors' meanwhile, a whole
// cell's is too long for that.
template <class Cell, int N, class T = typename Cell::Element>
int64_t take_forward(const ForwardStep<T>& s, Place<T>& begun, Place<T>& ended, int64_t left) {
  constexpr int together = interleaves<T> ? 1 : 8;
  Vector<T> between[together][N][Cell::between];
  while (left >= N) {
    const int64_t count = together == 1 ? 1 : min<int64_t>(left, together);
    for (int64_t i = 0; i < count; ++i) begin_forward<Cell>(s, begun, between[i]);
    for (int64_t i = 0; i < count; ++i) end_forward<Cell>(s, ended, between[i]);
    left -= count * N;
  }
  return left;
}

template <class Cell, class T = typename Cell::Element>
void forward_step(const ForwardStep<T>& step) {
  constexpr int N = interleaves<T> ? Cell::interleaved : 1;
  const ForwardStep<T> s = step;
  Place<T> begun(s), ended(s);
  const int64_t left = take_forward<Cell, N>(s, begun, ended, s.items * s.vectors);
  if constexpr (N > 1) take_forward<Cell, 1>(s, begun, ended, left);
}

// b_ih += b_hh [count] for a gate whose X and R enter as their sum.
template <class T>
void join_biases(T* b_ih, const T* b_hh, int64_t count) {
  for (int64_t i = 0; i < count; ++i) b_ih[i] += b_hh[i];
}

// A backward step of hidden units [first, last) of one row: from the derivative to h' to those to the gates and to what of
// the previous h does not go through R; dc likewise (lstm).
template <class T>
struct BackwardStep {
  int64_t hidden, first, last;
  const T* saved;   // [saved, hidden]
  const T* memory;  // of the units from `first` on
  T *dh, *dc;       // [hidden, to whole vectors]
  T* gates;         // [grads, hidden]
};

template <class Cell, class T = typename Cell::Element>
void backward_step(const BackwardStep<T>& step) {
  const BackwardStep<T> s = step;
  for (int64_t unit = s.first; unit < s.last; unit += lanes<T>) {
    const int64_t count = s.hidden - unit;
    Vector<T> keep[Cell::saved], grad[Cell::grads], dc = {};
#pragma GCC unroll 8
    for (int i = 0; i < Cell::saved; ++i) keep[i] = load_units(s.saved + i * s.hidden + unit, count);
    if constexpr (Cell::has_c) dc = load_as<Vector<T>>(s.dc + unit);
    const Vector<T> memory = load_units(s.memory + unit - s.first, count);
    store_as(s.dh + unit, Cell::backward(keep, memory, load_as<Vector<T>>(s.dh + unit), dc, grad));
    if constexpr (Cell::has_c) store_as(s.dc + unit, dc);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::grads; ++i) store_units<T>(grad[i], s.gates + i * s.hidden + unit, count);
  }
}

template <class T>
struct CellKind {
  int gates, vectors, saved, grads;
  bool has_c;
  int x_slots[4];
  void (*forward)(const ForwardStep<T>&);
  void (*backward)(const BackwardStep<T>&);

  template <class Cell>
  static constexpr CellKind of() {
    return {Cell::gates, Cell::vectors, Cell::saved, Cell::grads, Cell::has_c,
            {Cell::x_slot(0), Cell::x_slot(1), Cell::x_slot(2), Cell::x_slot(3)}, forward_step<Cell>, backward_step<Cell>};
  }
};

template <class T>
constexpr CellKind<T> cell_kinds[] = {  // by RecurrentCell
    CellKind<T>::template of<LstmCell<T>>(), CellKind<T>::template of<GruCell<T>>(),
    CellKind<T>::template of<RnnCell<T, false>>(), CellKind<T>::template of<RnnCell<T, true>>()};

template <class T>
const CellKind<T>& cell_kind(RecurrentCell cell) { return cell_kinds<T>[static_cast<int>(cell)]; }

}  // namespace
}  // namespace cvfast
