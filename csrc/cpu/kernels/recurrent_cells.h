// What happens to one vector of hidden units in one step, forward and backward; the equations are in
// cvfast/recurrent.h, the derivatives follow from them. x and h are the projections X and R, each gate a vector.
//
// `memory` is the state that goes by a cell's gates: c of the lstm (updated), the previous h of the gru.
// `saved` is what the derivative will need; `grad` the derivative to the distinct ones among X's and R's gates, and
// x_slot and h_slot say which of them belongs to a gate.
#pragma once
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

  static V forward(const V (&x)[gates], const V (&h)[gates], V& c, V (&keep)[saved]) {
    const V i = sigmoid<T>(x[0] + h[0]), f = sigmoid<T>(x[1] + h[1]), g = tanh<T>(x[2] + h[2]), o = sigmoid<T>(x[3] + h[3]);
    c = f * c + i * g;
    keep[0] = i, keep[1] = f, keep[2] = g, keep[3] = o, keep[4] = c;
    return o * tanh<T>(c);
  }

  // The derivative to the previous h that does not go through R. dh: to h'; dc: to c', becomes that to the previous c.
  static V backward(const V (&keep)[saved], V previous_c, V dh, V& dc, V (&grad)[grads]) {
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

  static V forward(const V (&x)[gates], const V (&h)[gates], V& previous_h, V (&keep)[saved]) {
    const V r = sigmoid<T>(x[0] + h[0]), z = sigmoid<T>(x[1] + h[1]), n = tanh<T>(x[2] + r * h[2]);
    keep[0] = r, keep[1] = z, keep[2] = n, keep[3] = h[2];
    return n + z * (previous_h - n);
  }

  static V backward(const V (&keep)[saved], V previous_h, V dh, V&, V (&grad)[grads]) {
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

  static V forward(const V (&x)[gates], const V (&h)[gates], V&, V (&keep)[saved]) {
    const V sum = x[0] + h[0];
    keep[0] = Relu ? (sum < T{0} ? V{} : sum) : tanh<T>(sum);  // in this order a NaN stays one
    return keep[0];
  }

  static V backward(const V (&keep)[saved], V, V dh, V&, V (&grad)[grads]) {
    grad[0] = Relu ? (keep[0] <= T{0} ? V{} : dh) : dh * (T{1} - keep[0] * keep[0]);
    return V{};
  }
};

}  // namespace
}  // namespace cvfast
