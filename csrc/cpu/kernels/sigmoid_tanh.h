// The logistic function and the hyperbolic tangent of vectors. NaN stays NaN; infinities give 0, 1 and -1.
#pragma once
#include "simd.h"

namespace cvfast {
namespace {

// x = n ln 2 + r with |r| <= ln 2 / 2: adding `magic` rounds x / ln 2 to the whole number n and leaves n plus the
// exponent's bias in the last bits. ln 2 in two parts, the first so short that n times it is exact. `coefficients` of
// (e^r - 1 - r) / r^2, highest power first (Chebyshev fit, relative error of e^r - 1: 2.3e-8 and 3.7e-17).
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  using Bits = uint32_t;
  static constexpr float magic = 12582912.f + 127, log2_e = 1.44269504f, ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
  static constexpr float least = -87.3f, most = 88.3f;  // n from -126 to 127
  static constexpr float saturated = 18.1f;             // tanh(saturated / 2) rounds to 1
  static constexpr int fraction_bits = 23;
  static constexpr float coefficients[] = {1.39261836e-3f, 8.36317905e-3f, 4.16665546e-2f, 1.66665770e-1f, 0.5f};
};
template <>
struct Exponential<double> {
  using Bits = uint64_t;
  static constexpr double magic = 6755399441055744. + 1023, log2_e = 1.4426950408889634, ln2_high = 0.6931471801362932,
                          ln2_low = 4.2365213658092841e-10;
  static constexpr double least = -708, most = 709, saturated = 38.2;
  static constexpr int fraction_bits = 52;
  static constexpr double coefficients[] = {
      2.5100385495510319e-8, 2.7620088445409748e-7, 2.7557268459997065e-6, 2.4801521295954375e-5, 1.9841269863053617e-4,
      1.3888888917213717e-3, 8.3333333333300618e-3, 4.1666666666624128e-2, 1.6666666666666667e-1, 0.5000000000000001};
};

// e^x = scale + scale * growth, with scale = 2^n and growth = e^r - 1; for x between `least` and `most`, or NaN.
template <class T>
struct ExpParts {
  Vector<T> scale, growth;
};
template <class T>
[[gnu::always_inline]] inline ExpParts<T> exp_parts(Vector<T> x) {
  using E = Exponential<T>;
  const Vector<T> shifted = x * E::log2_e + E::magic;
  const Vector<T> n = shifted - E::magic;
  const Vector<T> r = (x - n * E::ln2_high) - n * E::ln2_low;
  Vector<T> q = Vector<T>{} + E::coefficients[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof E::coefficients / sizeof(T); ++i) q = q * r + E::coefficients[i];
  const auto bits = bit_cast<Vector<typename E::Bits>>(shifted) << E::fraction_bits;
  return {bit_cast<Vector<T>>(bits), r * r * q + r};
}

template <class T>
[[gnu::always_inline]] inline Vector<T> clamp(Vector<T> x, T least, T most) {  // a NaN stays one
  x = x < least ? Vector<T>{} + least : x;
  return x > most ? Vector<T>{} + most : x;
}

// 1 / (1 + e^-x); error at most 3 ulp where the result is a normal number.
template <class T>
[[gnu::always_inline]] inline Vector<T> sigmoid(Vector<T> x) {
  const ExpParts<T> e = exp_parts<T>(clamp<T>(-x, Exponential<T>::least, Exponential<T>::most));
  return T{1} / (T{1} + (e.scale + e.scale * e.growth));
}

// float: x + x^3 p(x^2) below 0.625 (Chebyshev fit, relative error 1.7e-8) and 1 - 2 / (e^2|x| + 1) beyond, which round
// about as often as the result has to. double: with u = e^2|x| - 1, u / (u + 2) and 1 - 2 / (u + 2). Error at most 3 ulp.
// (1 - tanh^2, the derivative, is as good as the last place of a tanh near 1.)
template <class T>
[[gnu::always_inline]] inline Vector<T> tanh(Vector<T> x) {
  using Bits = Vector<typename Exponential<T>::Bits>;
  const Bits sign = bit_cast<Bits>(x) & (Bits{} + (typename Exponential<T>::Bits{1} << (8 * sizeof(T) - 1)));
  const Vector<T> magnitude = bit_cast<Vector<T>>(bit_cast<Bits>(x) ^ sign);
  const ExpParts<T> e = exp_parts<T>(clamp<T>(magnitude + magnitude, T{0}, Exponential<T>::saturated));
  Vector<T> result;
  if constexpr (sizeof(T) == sizeof(float)) {
    constexpr float coefficients[] = {-6.09671417e-3f, 2.09971790e-2f, -5.38509096e-2f, 1.33327697e-1f, -3.33333289e-1f};
    const Vector<T> square = x * x;
    Vector<T> p = Vector<T>{} + coefficients[0];
#pragma GCC unroll 4
    for (int i = 1; i < 5; ++i) p = p * square + coefficients[i];
    const Vector<T> near = magnitude * (square * p) + magnitude;
    const Vector<T> far = T{1} - T{2} / ((e.scale + e.scale * e.growth) + T{1});
    result = magnitude < 0.625f ? near : far;
  } else {
    const Vector<T> u = (e.scale - T{1}) + e.scale * e.growth;
    const Vector<T> near = u < T{1} ? u : Vector<T>{} - T{2}, one = u < T{1} ? Vector<T>{} : Vector<T>{} + T{1};
    result = one + near / (u + T{2});
  }
  return bit_cast<Vector<T>>(bit_cast<Bits>(result) | sign);
}

}  // namespace
}  // namespace cvfast
