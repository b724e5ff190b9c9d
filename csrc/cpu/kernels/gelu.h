// x Phi(x), with the normal distribution's function Phi (Hendrycks and Gimpel, "Gaussian error linear units", 2016).
#pragma once
#include "exp.h"
#include "sigmoid_tanh.h"

namespace cvfast {
namespace {

// exp(a^2 / 2) Phi(-a) for a in [0, 14.2] as a quotient of polynomials, highest power first (minimax fit, relative error 6e-9).
constexpr float tail_above[] = {4.0889145e-3f, 4.0449034e-2f, 1.8268925e-1f, 4.3755877e-1f, 0.5f};
constexpr float tail_below[] = {1.0249264e-2f, 1.0139740e-1f, 4.6802932e-1f, 1.2002368f, 1.6730025f, 1.f};

#if CVFAST_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
// Within 1 ulp, in a quarter of a division's time: a reciprocal of 14 bits, and what is missing times it.
inline FloatVector quotient(FloatVector a, FloatVector b) {
  const FloatVector reciprocal = (FloatVector)_mm512_rcp14_ps((__m512)b), q = a * reciprocal;
  return q + (a - b * q) * reciprocal;
}
#else
inline FloatVector quotient(FloatVector a, FloatVector b) { return a / b; }
#endif

inline FloatVector magnitude(FloatVector x) { return bit_cast<FloatVector>(bit_cast<UintVector>(x) & 0x7fffffffu); }

// What is known of x by a <= |x|, as far as float32 tells the rest from 0.
struct Normal {
  FloatVector a, bell, tail;  // exp(-x^2 / 2), Phi(-|x|): this loses nothing where it is near 0
};

inline Normal normal(FloatVector x) {
  const FloatVector a = lesser_of(FloatVector{} + 14.2f, magnitude(x));  // in this order, which lets a NaN through
  FloatVector above = FloatVector{} + tail_above[0], below = FloatVector{} + tail_below[0];
#pragma GCC unroll 8
  for (int i = 1; i < 5; ++i) above = above * a + tail_above[i];
#pragma GCC unroll 8
  for (int i = 1; i < 6; ++i) below = below * a + tail_below[i];
  const FloatVector bell = exp2<float>(x * (x * static_cast<float>(-log2_e / 2)));
  return {a, bell, bell * quotient(above, below)};
}

// x for x > 0, less |x| Phi(-|x|). The sum of halves is NaN for -inf, as torch's result is.
inline FloatVector gelu(FloatVector x) {
  const Normal n = normal(x);
  const FloatVector half = x * 0.5f;
  return half + magnitude(half) - n.a * n.tail;
}
// Phi(x) + x Phi'(x)
inline FloatVector gelu_derivative(FloatVector x) {
  const Normal n = normal(x);
  return (x < 0 ? n.tail : 1 - n.tail) + 0.398942280f * x * n.bell;
}

inline Vector<double> gelu(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] *= 0.5 * __builtin_erfc(-0.7071067811865476 * x[i]);
  return x;
}

// Its approximation 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
template <class V>
V gelu_tanh(V x) {
  using T = __typeof__(x[0] + 0);
  return T(0.5) * x * (1 + tanh<T>(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)));
}

}  // namespace
}  // namespace cvfast
