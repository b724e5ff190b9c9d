// Exponentials of vectors.
#pragma once
#include "simd.h"
#if defined(__AVX512DQ__)
#include <immintrin.h>
#endif

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
  static constexpr int fraction_bits = 23;
  static constexpr float coefficients[] = {1.5594677695e-4f, 1.3406643847e-3f, 9.6176929762e-3f, 5.5503105512e-2f,
                                           2.4022652783e-1f, 6.9314721497e-1f, 1.f};
};
template <>
struct Exp2<double> {
  using Bits = uint64_t;
  static constexpr double magic = 6755399441055744. + 1023, least = -1023;
  static constexpr int fraction_bits = 52;
  static constexpr double coefficients[] = {
      4.0780717860928704e-10, 7.0725703945407994e-9, 1.0180647660573069e-7, 1.3215442675452855e-6,
      1.5252727385189775e-5,  1.5403530441571850e-4, 1.3333558153439970e-3, 9.6181291076070026e-3,
      5.5504108664790395e-2,  2.4022650695910098e-1, 6.9314718055994570e-1, 1.};
};

#if CVFAST_VECTOR_BYTES == 64 && defined(__AVX512DQ__)

// 2^f on [0, 1] by a polynomial (minimax, relative error 2.1e-9 and 3.3e-18). x - floor(x) (0 for an infinite x) and
// p * 2^floor(x) are instructions.
template <class T>
struct Exp2OfFraction;
template <>
struct Exp2OfFraction<float> {
  static constexpr float coefficients[] = {2.16129140e-4f, 1.24678469e-3f, 9.67545151e-3f, 5.54852806e-2f,
                                           2.40229306e-1f, 6.93147044e-1f, 1.f};
  static FloatVector fraction(FloatVector x) {
    return (FloatVector)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static FloatVector scaled(FloatVector p, FloatVector x) { return (FloatVector)_mm512_scalef_ps((__m512)p, (__m512)x); }
};
template <>
struct Exp2OfFraction<double> {
  static constexpr double coefficients[] = {
      6.26346596450606661e-10, 6.5595294161681019e-9,   1.02532124146725063e-7, 1.32083672916121851e-6,
      1.52531750553557014e-5,  1.54035123096389078e-4,  1.33335586295664337e-3, 9.61812909955080175e-3,
      5.55041086656022526e-2,  2.40226506959063302e-1, 6.93147180559945928e-1, 1.};
  static Vector<double> fraction(Vector<double> x) {
    return (Vector<double>)_mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static Vector<double> scaled(Vector<double> p, Vector<double> x) {
    return (Vector<double>)_mm512_scalef_pd((__m512d)p, (__m512d)x);
  }
};

// 2^x for x < 128 (double: 1024), error at most 2 ulp; exactly 1 at 0; a NaN stays one.
template <class T>
Vector<T> exp2(Vector<T> x) {
  using E = Exp2OfFraction<T>;
  const Vector<T> f = E::fraction(x);
  Vector<T> p = Vector<T>{} + E::coefficients[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof E::coefficients / sizeof(T); ++i) p = p * f + E::coefficients[i];
  return E::scaled(p, x);
}

// 2^x of all of them.
template <class T, int N>
[[gnu::always_inline]] inline void exp2(Vector<T> (&x)[N]) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = exp2<T>(x[i]);
}

#else

// Splits x into n + f, n whole and f in [-1/2, 1/2], which it leaves, and returns what `scaled` takes to multiply by 2^n.
template <class T>
struct Whole {
  static Vector<T> split(Vector<T>& x) {
    using E = Exp2<T>;
    const Vector<T> shifted = x + E::magic;
    x -= shifted - E::magic;
    return bit_cast<Vector<T>>(bit_cast<Vector<typename E::Bits>>(shifted) << E::fraction_bits);
  }
  static Vector<T> scaled(Vector<T> p, Vector<T> power) { return p * power; }
};
#if CVFAST_VECTOR_BYTES == 32 && defined(__AVX2__)
// n is added to p's exponent: the units that multiply have enough to do. 0 where x is not a number.
template <>
struct Whole<float> {
  static FloatVector split(FloatVector& x) {
    const UintVector n = (UintVector)_mm256_cvtps_epi32((__m256)x);
    x -= (FloatVector)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return bit_cast<FloatVector>(n << Exp2<float>::fraction_bits);
  }
  static FloatVector scaled(FloatVector p, FloatVector n) {
    return bit_cast<FloatVector>(bit_cast<UintVector>(p) + bit_cast<UintVector>(n));
  }
};
#endif

// 2^x for x < 128 (double: 1024) of all of them, error at most 2 ulp; below the normal numbers' range less than the least of
// them, 0 where x <= -127 (-1023); exactly 1 at 0; a NaN stays one. Step by step: each of them waits for its last step.
template <class T, int N>
[[gnu::always_inline]] inline void exp2(Vector<T> (&x)[N]) {
  using E = Exp2<T>;
  Vector<T> n[N], p[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    x[i] = greater_of(Vector<T>{} + E::least, x[i]);  // in this order, which lets a NaN through
    n[i] = Whole<T>::split(x[i]);
    p[i] = Vector<T>{} + E::coefficients[0];
  }
#pragma GCC unroll 16
  for (unsigned k = 1; k < sizeof E::coefficients / sizeof(T); ++k)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + E::coefficients[k];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = Whole<T>::scaled(p[i], n[i]);
}

template <class T>
Vector<T> exp2(Vector<T> x) {
  Vector<T> one[] = {x};
  exp2<T>(one);
  return one[0];
}

#endif

// log(x) for x from 1 on, error about 1 ulp; a NaN stays one. With x = 2^e m, m within sqrt(2) of 1, and
// t = (m - 1) / (m + 1): log(m) = 2 (t + t^3 / 3 + t^5 / 5 + ...), |t| < 0.172.
template <class T>
Vector<T> log(Vector<T> x) {
  using E = Exp2<T>;
  using Bits = typename E::Bits;
  constexpr Bits root_half = sizeof(T) == 4 ? Bits{0x3f3504f3u} : static_cast<Bits>(0x3fe6a09e667f3bcdull);
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  const Vector<Bits> above = bit_cast<Vector<Bits>>(x) - root_half;
  const Vector<Bits> exponent = above >> E::fraction_bits;
  const Vector<T> m = bit_cast<Vector<T>>(bit_cast<Vector<Bits>>(x) - (exponent << E::fraction_bits));
  const Vector<T> t = (m - 1) / (m + 1), square = t * t;
  Vector<T> sum = Vector<T>{} + static_cast<T>(1. / (2 * terms - 1));
#pragma GCC unroll 16
  for (int i = terms - 1; i > 0; --i) sum = sum * square + static_cast<T>(1. / (2 * i - 1));
  const Vector<T> e = __builtin_convertvector(exponent, Vector<T>);
  const Vector<T> result = e * static_cast<T>(ln_2) + 2 * t * sum;
  return x == x ? result : x;
}

}  // namespace
}  // namespace cvfast
