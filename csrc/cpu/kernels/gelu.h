// x Phi(x), with the normal distribution's function Phi (Hendrycks and Gimpel, "Gaussian error linear units", 2016).
#pragma once
#include "sigmoid_tanh.h"

namespace cvfast {
namespace {

// exp(a^2) erfc(a) for a in [0, 10] as a quotient of polynomials, highest power first (minimax fit, relative error 6e-9).
constexpr float erfcx_above[] = {3.27113177e-2f, 2.28814302e-1f, 7.30756991e-1f, 1.23760311f, 1.f};
constexpr float erfcx_below[] = {5.79785883e-2f, 4.05589611e-1f, 1.32378686f, 2.40047356f, 2.36598284f, 1.f};

struct Normal {
  FloatVector phi, bell;  // Phi(x), exp(-x^2 / 2)
};

// With Phi(-|x|) = exp(-x^2 / 2) erfcx(|x| / sqrt(2)) / 2, which loses nothing where Phi is near 0.
inline Normal normal(FloatVector x) {
  constexpr float farthest = 10;
  const FloatVector distance = (x < 0 ? -x : x) * 0.707106781f, a = clamp<float>(distance, 0, farthest);
  FloatVector above = FloatVector{} + erfcx_above[0], below = FloatVector{} + erfcx_below[0];
#pragma GCC unroll 8
  for (int i = 1; i < 5; ++i) above = above * a + erfcx_above[i];
#pragma GCC unroll 8
  for (int i = 1; i < 6; ++i) below = below * a + erfcx_below[i];
  const ExpParts<float> e = exp_parts<float>(clamp<float>(-0.5f * x * x, Exponential<float>::least, 0));
  const FloatVector bell = e.scale + e.scale * e.growth, tail = 0.5f * bell * (above / below);
  const FloatVector phi = distance > farthest ? FloatVector{} : tail;  // -inf gives NaN, as torch's
  return {x < 0 ? phi : 1 - phi, distance > farthest ? FloatVector{} : bell};
}

inline FloatVector gelu(FloatVector x) { return x * normal(x).phi; }
// Phi(x) + x Phi'(x)
inline FloatVector gelu_derivative(FloatVector x) {
  const Normal n = normal(x);
  return n.phi + 0.398942280f * x * n.bell;
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
