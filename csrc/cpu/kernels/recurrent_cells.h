// What happens to one vector of hidden units in one step, forward and backward; the equations are in
// cvfast/recurrent.h, the derivatives follow from them. x and h are the projections X and R, each gate a vector.
//
// `memory` is the state that goes by a cell's gates: c of the lstm (updated), the previous h of the gru.
// `saved` is what the derivative will need; `grad` the derivative to the distinct ones among X's and R's gates: that of
// R's gate g is number g, that of X's gate g number x_slot(g).
//
// The loops around do not know the cell: they call it through CellKind, whole rows or tiles at a time.
#pragma once
#include "cvfast/recurrent.h"
#include "sigmoid_tanh.h"

namespace cvfast {
namespace {

template <class T>
struct LstmCell {
  using Element = T;
  using V = Vector<T>;
  static constexpr int gates = 4, vectors = 1, saved = 5, grads = 4;  // vectors: of hidden units in a panel
  static constexpr bool has_c = true;
  static constexpr int x_slot(int gate) { return gate; }

  [[gnu::always_inline]] static V forward(const V (&x)[gates], const V (&h)[gates], V& c, V (&keep)[saved]) {
    const V i = sigmoid<T>(x[0] + h[0]), f = sigmoid<T>(x[1] + h[1]), g = tanh<T>(x[2] + h[2]), o = sigmoid<T>(x[3] + h[3]);
    c = f * c + i * g;
    keep[0] = i, keep[1] = f, keep[2] = g, keep[3] = o, keep[4] = c;
    return o * tanh<T>(c);
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
  static constexpr int gates = 3, vectors = 1, saved = 4, grads = 4;
  static constexpr bool has_c = false;
  static constexpr int x_slot(int gate) { return gate < 2 ? gate : 3; }

  [[gnu::always_inline]] static V forward(const V (&x)[gates], const V (&h)[gates], V& previous_h, V (&keep)[saved]) {
    const V r = sigmoid<T>(x[0] + h[0]), z = sigmoid<T>(x[1] + h[1]), n = tanh<T>(x[2] + r * h[2]);
    keep[0] = r, keep[1] = z, keep[2] = n, keep[3] = h[2];
    return n + z * (previous_h - n);
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
  static constexpr int gates = 1, vectors = 4, saved = 1, grads = 1;
  static constexpr bool has_c = false;
  static constexpr int x_slot(int gate) { return gate; }

  [[gnu::always_inline]] static V forward(const V (&x)[gates], const V (&h)[gates], V&, V (&keep)[saved]) {
    const V sum = x[0] + h[0];
    keep[0] = Relu ? (sum < T{0} ? V{} : sum) : tanh<T>(sum);  // in this order a NaN stays one
    return keep[0];
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

template <class Cell, class T = typename Cell::Element>
void forward_step(const ForwardStep<T>& step) {
  constexpr int L = lanes<T>;
  const ForwardStep<T> s = step;
  for (int64_t item = 0; item < s.items; ++item)
    for (int64_t unit = 0; unit < s.vectors * L; unit += L) {
      Vector<T> x[Cell::gates], r[Cell::gates], keep[Cell::saved];
#pragma GCC unroll 4
      for (int g = 0; g < Cell::gates; ++g) {
        const int64_t at = g * s.gate_stride + unit;
        x[g] = load_as<Vector<T>>(s.x + item * s.x_stride + at) + load_as<Vector<T>>(s.b_ih + item * s.b_stride + at);
        r[g] = load_as<Vector<T>>(s.r + item * s.r_stride + at);
        if (Cell::x_slot(g) != g) r[g] += load_as<Vector<T>>(s.b_hh + item * s.b_stride + at);
      }
      T* at = s.memory + item * s.memory_stride + unit;
      Vector<T> memory = load_as<Vector<T>>(at);
      store_as(s.result + item * s.result_stride + unit, Cell::forward(x, r, memory, keep));
      if constexpr (Cell::has_c) store_as(at, memory);
      const int64_t count = s.units - item * s.units_stride - unit;
      if (s.saved && count > 0)
#pragma GCC unroll 8
        for (int i = 0; i < Cell::saved; ++i)
          store_units<T>(keep[i], s.saved + item * s.saved_stride + i * s.hidden + unit, count);
    }
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
