// The logistic function and the hyperbolic tangent of vectors. NaN stays NaN; infinities give 0, 1 and -1.
#pragma once
#include "exp.h"
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

// e^x = scale + scale * growth, with scale = 2^n and growth = e^r - 1; for x between `least` and `most`, or NaN. Of `N`
// vectors step by step: one after the other, a core's scheduler would be full of instructions that wait for each other.
template <class T>
struct ExpParts {
  Vector<T> scale, growth;
};
template <class T, int N>
[[gnu::always_inline]] inline void exp_parts(const Vector<T> (&x)[N], ExpParts<T> (&e)[N]) {
  using E = Exponential<T>;
  Vector<T> shifted[N], r[N], q[N];
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) shifted[k] = x[k] * E::log2_e + E::magic;
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) {
    const Vector<T> n = shifted[k] - E::magic;
    r[k] = (x[k] - n * E::ln2_high) - n * E::ln2_low;
    q[k] = Vector<T>{} + E::coefficients[0];
  }
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof E::coefficients / sizeof(T); ++i)
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) q[k] = q[k] * r[k] + E::coefficients[i];
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) {
    const auto bits = bit_cast<Vector<typename E::Bits>>(shifted[k]) << E::fraction_bits;
    e[k] = {bit_cast<Vector<T>>(bits), r[k] * r[k] * q[k] + r[k]};
  }
}
template <class T>
[[gnu::always_inline]] inline ExpParts<T> exp_parts(Vector<T> x) {
  ExpParts<T> e[1];
  exp_parts<T, 1>({x}, e);
  return e[0];
}

// A NaN stays one.
template <class T>
[[gnu::always_inline]] inline Vector<T> at_most(Vector<T> x, T most) { return lesser_of(Vector<T>{} + most, x); }
template <class T>
[[gnu::always_inline]] inline Vector<T> clamp(Vector<T> x, T least, T most) {
  return at_most<T>(greater_of(Vector<T>{} + least, x), most);
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

// e^2x + 1 for 0 <= x <= saturated / 2, or NaN; only as exact as 1 - 2 / (e^2x + 1) needs it where it is greater than 0.55.
template <class T>
[[gnu::always_inline]] inline Vector<T> exp_of_twice_plus_1(Vector<T> x) {
  using E = Exp2<T>;
  constexpr T factor = T(2 * log2_e);
  const Vector<T> shifted = x * factor + E::magic, f = x * factor - (shifted - E::magic);
  Vector<T> p = Vector<T>{} + E::coefficients[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof E::coefficients / sizeof(T); ++i) p = p * f + E::coefficients[i];
  return p * bit_cast<Vector<T>>(bit_cast<Vector<typename E::Bits>>(shifted) << E::fraction_bits) + T{1};
}

// Polynomial below 0.625, 1 - 2 / (e^2|x| + 1) beyond: both round hardly more often than the result has to be. Error at
// most 2 ulp. (1 - tanh^2, the derivative, is as good as the last place of a tanh near 1.)
template <class T>
[[gnu::always_inline]] inline Vector<T> tanh(Vector<T> x) {
  using Bits = Vector<typename Exponential<T>::Bits>;
  const Bits sign = bit_cast<Bits>(x) & (Bits{} + (typename Exponential<T>::Bits{1} << (8 * sizeof(T) - 1)));
  const Vector<T> magnitude = bit_cast<Vector<T>>(bit_cast<Bits>(x) ^ sign), square = x * x;
  Vector<T> p = Vector<T>{} + tanh_coefficients<T>[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof tanh_coefficients<T> / sizeof(T); ++i) p = p * square + tanh_coefficients<T>[i];
  const Vector<T> near = magnitude * (square * p) + magnitude;
  const Vector<T> far = T{1} - T{2} / exp_of_twice_plus_1<T>(at_most<T>(magnitude, Exponential<T>::saturated / 2));
  return bit_cast<Vector<T>>(bit_cast<Bits>(magnitude < T(0.625) ? near : far) | sign);
}

#if CVFAST_VECTOR_BYTES == 64 && defined(__AVX512DQ__)

// With AVX-512 floats need neither clamping nor two formulas for tanh: scalef knows infinite exponents, and a polynomial's
// coefficients come from a table in a register, by the argument. `N` vectors at once, step by step, since a single one
// would wait for itself.

// 1 / (1 + e^-x): -x / ln 2 = n + f with whole n, 2^f by Exp2's polynomial.
template <int N>
[[gnu::always_inline]] inline void sigmoids_avx512(const FloatVector (&x)[N], FloatVector (&y)[N]) {
  const __m512 one = _mm512_set1_ps(1), high = _mm512_set1_ps(-1.44269502f), low = _mm512_set1_ps(-1.92596303e-8f);
  __m512 n[N], f[N], p[N];
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) n[k] = _mm512_roundscale_ps((__m512)x[k] * high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) f[k] = _mm512_fmadd_ps((__m512)x[k], low, _mm512_fmsub_ps((__m512)x[k], high, n[k]));
  constexpr int smaller_magnitude = 2;
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) f[k] = _mm512_range_ps(f[k], one, smaller_magnitude);  // beyond 1 where n is too large to be exact
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) p[k] = _mm512_set1_ps(Exp2<float>::coefficients[0]);
#pragma GCC unroll 8
  for (unsigned i = 1; i < sizeof Exp2<float>::coefficients / sizeof(float); ++i)
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) p[k] = _mm512_fmadd_ps(p[k], f[k], _mm512_set1_ps(Exp2<float>::coefficients[i]));
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) y[k] = (FloatVector)(one / (one + _mm512_scalef_ps(p[k], n[k])));
}

// tanh(m + d) as a polynomial of d, by the interval of |x| = m + d: the first two bits of 1 + |x| behind the leading one and the
// last two of its exponent tell which of 16. Rows: m, tanh(m), which is a float to within 1e-10, and the coefficients of
// (tanh(m + d) - tanh(m)) / d from the lowest power on (Chebyshev fit, relative error of tanh 1.4e-8; from 9 on it is 1).
alignas(64) constexpr float tanh_intervals[][16] = {
    {1.25039935f, 1.75005722f, 2.2501092f, 2.75299072f, 3.50007868f, 4.50198889f, 5.5f, 6.5f, 8.f, 9.05000019f, 9.f,
     9.f, 0.f, 0.375065655f, 0.625029325f, 0.875141978f},
    {0.848395586f, 0.941382051f, 0.97803086f, 0.991908073f, 0.998178184f, 0.99975419f, 0.999966621f, 0.99999547f,
     0.999999762f, 1.f, 1.f, 1.f, 0.f, 0.35841462f, 0.554620028f, 0.703977227f},
    {0.28022489f, 0.113799818f, 0.0434556343f, 0.0161183756f, 0.00364033319f, 0.000491561776f, 6.68049906e-05f,
     9.04133412e-06f, 4.50334738e-07f, 0.f, 0.f, 0.f, 1.f, 0.871538937f, 0.692396641f, 0.504416049f},
    {-0.23774159f, -0.107129112f, -0.0425009541f, -0.0159879439f, -0.00363368448f, -0.000491439132f, -6.85479172e-05f,
     -8.37133302e-06f, -2.09919648e-07f, 0.f, 0.f, 0.f, -1.14163436e-06f, -0.312372297f, -0.38401702f, -0.355097413f},
    {0.108300544f, 0.0629204512f, 0.0270822626f, 0.0104855476f, 0.00241216458f, 0.000327243528f, 4.45015576e-05f,
     6.0233192e-06f, 2.96609585e-07f, 0.f, 0.f, 0.f, -0.333268702f, -0.178555921f, -0.0178194009f, 0.0818402916f},
    {-0.0126247425f, -0.0235205311f, -0.0123203192f, -0.00507164607f, -0.00119769049f, -0.000163501885f,
     -3.63710751e-06f, -1.01584237e-05f, -7.89905698e-07f, 0.f, 0.f, 0.f, -0.0012004642f, 0.168116495f, 0.137886241f,
     0.060752403f},
    {-0.0195850097f, 0.0035136994f, 0.00397805404f, 0.00190342299f, 0.000487690209f, 6.7640809e-05f, 9.22523395e-06f,
     1.24914141e-06f, 6.91487259e-08f, 0.f, 0.f, 0.f, 0.143159613f, 0.0189273451f, -0.0544549488f, -0.0585796274f},
    {0.0151034603f, 0.00206240593f, -0.000724119134f, -0.00054343621f, -0.000156074006f, -2.23199931e-05f,
     -5.26950826e-05f, 1.86427551e-05f, 4.04884048e-07f, 0.f, 0.f, 0.f, -0.0370957181f, -0.0690857247f, -0.0239834357f,
     0.0130416919f}};
constexpr float tanh_most = 14;

template <int N>
[[gnu::always_inline]] inline void tanhs_avx512(const FloatVector (&x)[N], FloatVector (&y)[N]) {
  constexpr int rows = sizeof tanh_intervals / sizeof tanh_intervals[0];
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  __m512 magnitude[N], d[N], p[N];
  UintVector interval[N];
  auto row = [&](int k, int i) noexcept { return (__m512)__builtin_shuffle((FloatVector)_mm512_load_ps(tanh_intervals[i]), interval[k]); };
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k)  // min in this order lets a NaN through
    magnitude[k] = _mm512_min_ps(_mm512_set1_ps(tanh_most), _mm512_andnot_ps(_mm512_castsi512_ps(sign), (__m512)x[k]));
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) interval[k] = (UintVector)((FloatVector)magnitude[k] + 1) >> 21;
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) d[k] = _mm512_sub_ps(magnitude[k], row(k, 0)), p[k] = row(k, rows - 1);
#pragma GCC unroll 8
  for (int i = rows - 2; i > 0; --i)
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) p[k] = _mm512_fmadd_ps(p[k], d[k], row(k, i));
  constexpr int first_or_both_others = 0xf8;
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k)
    y[k] = (FloatVector)_mm512_ternarylogic_epi32((__m512i)p[k], (__m512i)x[k], sign, first_or_both_others);
}

template <>
[[gnu::always_inline]] inline FloatVector sigmoid<float>(FloatVector x) {
  auto& only = reinterpret_cast<FloatVector(&)[1]>(x);
  sigmoids_avx512(only, only);
  return x;
}
template <>
[[gnu::always_inline]] inline FloatVector tanh<float>(FloatVector x) {
  auto& only = reinterpret_cast<FloatVector(&)[1]>(x);
  tanhs_avx512(only, only);
  return x;
}
constexpr bool interleaves_floats = true;
#else
constexpr bool interleaves_floats = false;
#endif

// Whether sigmoids and tanhs of several vectors take less time than one after the other.
template <class T>
constexpr bool interleaves = interleaves_floats && sizeof(T) == sizeof(float);

template <class T, int N>
[[gnu::always_inline]] inline void sigmoids(const Vector<T> (&x)[N], Vector<T> (&y)[N]) {
#if CVFAST_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
  if constexpr (interleaves<T>) return sigmoids_avx512(x, y);
#endif
  for (int k = 0; k < N; ++k) y[k] = sigmoid<T>(x[k]);
}
template <class T, int N>
[[gnu::always_inline]] inline void tanhs(const Vector<T> (&x)[N], Vector<T> (&y)[N]) {
#if CVFAST_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
  if constexpr (interleaves<T>) return tanhs_avx512(x, y);
#endif
  for (int k = 0; k < N; ++k) y[k] = tanh<T>(x[k]);
}

}  // namespace
}  // namespace cvfast
