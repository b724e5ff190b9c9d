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

// (tanh(x) / x - 1) / x^2 as a polynomial of x^2 for |x| < 0.625, highest power first (Chebyshev fit, relative error of
// tanh 1.7e-8 and 1e-17).
template <class T>
constexpr T tanh_coefficients[] = {T(-6.09671417e-3), T(2.09971790e-2), T(-5.38509096e-2), T(1.33327697e-1),
                                   T(-3.33333289e-1)};
template <>
constexpr double tanh_coefficients<double>[] = {
    6.485163482793113e-06, -3.12011014257974e-05,   9.257116129556769e-05, -0.0002375906496055562,
    0.0005896606577757043, -0.0014557754120478055,  0.0035921217511549622, -0.008863235103240878,
    0.021869488519008305,  -0.05396825396789699,    0.13333333333333042,   -0.3333333333333333};

// Polynomial below 0.625, 1 - 2 / (e^2|x| + 1) beyond: both round hardly more often than the result has to be. Error at
// most 2 ulp. (1 - tanh^2, the derivative, is as good as the last place of a tanh near 1.)
template <class T>
[[gnu::always_inline]] inline Vector<T> tanh(Vector<T> x) {
  using Bits = Vector<typename Exponential<T>::Bits>;
  const Bits sign = bit_cast<Bits>(x) & (Bits{} + (typename Exponential<T>::Bits{1} << (8 * sizeof(T) - 1)));
  const Vector<T> magnitude = bit_cast<Vector<T>>(bit_cast<Bits>(x) ^ sign), square = x * x;
  const ExpParts<T> e = exp_parts<T>(clamp<T>(magnitude + magnitude, T{0}, Exponential<T>::saturated));
  Vector<T> p = Vector<T>{} + tanh_coefficients<T>[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof tanh_coefficients<T> / sizeof(T); ++i) p = p * square + tanh_coefficients<T>[i];
  const Vector<T> near = magnitude * (square * p) + magnitude;
  const Vector<T> far = T{1} - T{2} / ((e.scale + e.scale * e.growth) + T{1});
  return bit_cast<Vector<T>>(bit_cast<Bits>(magnitude < T(0.625) ? near : far) | sign);
}

}  // namespace
}  // namespace cvfast
