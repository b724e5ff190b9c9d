// Exponentials of vectors.
#pragma once
#include "simd.h"

namespace cvfast {
namespace {

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

// 2^f on [-1/2, 1/2] by a polynomial (minimax, relative error 2.6e-9 and 1.8e-17), and what splits x into n + f: adding
// `magic` rounds to the nearest whole number n and leaves n plus the exponent's bias in the last bits.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  using Bits = uint32_t;
  static constexpr float magic = 12582912.f + 127, least = -127;
  static constexpr float ln_2_high = 0.693359375f, ln_2_rest = -2.12194440e-4f;  // whole multiples of the former are exact
  static constexpr int fraction_bits = 23;
  static constexpr float coefficients[] = {1.5594677695e-4f, 1.3406643847e-3f, 9.6176929762e-3f, 5.5503105512e-2f,
                                           2.4022652783e-1f, 6.9314721497e-1f, 1.f};
};
template <>
struct Exp2<double> {
  using Bits = uint64_t;
  static constexpr double magic = 6755399441055744. + 1023, least = -1023;
  static constexpr double ln_2_high = 0.69314718036912382, ln_2_rest = 1.9082149292705877e-10;
  static constexpr int fraction_bits = 52;
  static constexpr double coefficients[] = {
      4.0780717860928704e-10, 7.0725703945407994e-9, 1.0180647660573069e-7, 1.3215442675452855e-6,
      1.5252727385189775e-5,  1.5403530441571850e-4, 1.3333558153439970e-3, 9.6181291076070026e-3,
      5.5504108664790395e-2,  2.4022650695910098e-1, 6.9314718055994570e-1, 1.};
};

// 2^x for x < 128 (double: 1024), error at most 2 ulp; 0 below the normal numbers' range, exactly 1 at 0; a NaN stays one.
template <class T>
Vector<T> exp2(Vector<T> x) {
  using E = Exp2<T>;
  x = x < E::least ? Vector<T>{} + E::least : x;
  const Vector<T> shifted = x + E::magic;
  const Vector<T> f = x - (shifted - E::magic);
  Vector<T> p = Vector<T>{} + E::coefficients[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof E::coefficients / sizeof(T); ++i) p = p * f + E::coefficients[i];
  return p * bit_cast<Vector<T>>(bit_cast<Vector<typename E::Bits>>(shifted) << E::fraction_bits);
}

template <class T>
struct TanhAndSlope {
  Vector<T> tanh, slope;
};

// tanh(x), error at most 3 ulp, and its derivative; a NaN stays one. With e = exp(-2 |x|) and u = e - 1, of full accuracy
// near 0: -u / (u + 2) and 4 e / (u + 2)^2, which, unlike 1 - tanh^2, loses nothing where tanh is near 1.
template <class T>
TanhAndSlope<T> tanh_and_slope(Vector<T> x) {
  using E = Exp2<T>;
  constexpr T most = static_cast<T>(-E::least * ln_2 / 2);
  Vector<T> magnitude = x < 0 ? -x : x;
  magnitude = magnitude > most ? Vector<T>{} + most : magnitude;
  const Vector<T> y = -2 * magnitude, shifted = y * static_cast<T>(log2_e) + E::magic, n = shifted - E::magic;
  const Vector<T> f = ((y - n * E::ln_2_high) - n * E::ln_2_rest) * static_cast<T>(log2_e);
  Vector<T> p = Vector<T>{} + E::coefficients[0];
  constexpr unsigned count = sizeof E::coefficients / sizeof(T);
#pragma GCC unroll 16
  for (unsigned i = 1; i + 1 < count; ++i) p = p * f + E::coefficients[i];
  const Vector<T> scale = bit_cast<Vector<T>>(bit_cast<Vector<typename E::Bits>>(shifted) << E::fraction_bits);
  const Vector<T> grown = scale * (p * f), u = grown + (scale - 1), inverse = 1 / (u + 2);
  const Vector<T> result = u / (u + 2);
  return {x < 0 ? result : -result, 4 * (grown + scale) * inverse * inverse};
}

}  // namespace
}  // namespace cvfast
