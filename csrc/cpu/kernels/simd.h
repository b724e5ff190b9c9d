// Portable SIMD: vectors of CVFAST_VECTOR_BYTES through the compiler's vector extension, storage types and their
// conversion to the type that a kernel computes with.
//
// Everything under kernels/ is compiled once per instruction set. It has internal linkage and uses no code of the
// standard library: a function compiled for AVX-512 that the linker merges with its baseline twin would crash an older
// machine.
//
// a * b + c is contracted to a fused multiply-add where the instruction set has one (-ffp-contract=fast), in full
// tiles and in tails alike, so that an element's bits don't depend on its place in a tile.
#pragma once
#include <cstdint>
#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace cvfast {
namespace {

template <class A>
constexpr A min(A a, A b) { return b < a ? b : a; }
template <class A>
constexpr A max(A a, A b) { return a < b ? b : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(CVFAST_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int lanes = CVFAST_VECTOR_BYTES / sizeof(T);

using FloatVector = Vector<float>;
using UintVector = Vector<uint32_t>;
typedef uint16_t HalfVector __attribute__((vector_size(CVFAST_VECTOR_BYTES / 2)));  // one 16-bit lane per float lane

// a > b ? a : b and a < b ? a : b of each lane: b where one of them is not a number. The compiler would take two instructions.
template <class V>
V greater_of(V a, V b) { return a > b ? a : b; }
template <class V>
V lesser_of(V a, V b) { return a < b ? a : b; }
#if CVFAST_VECTOR_BYTES == 64 && defined(__AVX512F__)
inline FloatVector greater_of(FloatVector a, FloatVector b) { return (FloatVector)_mm512_max_ps((__m512)a, (__m512)b); }
inline FloatVector lesser_of(FloatVector a, FloatVector b) { return (FloatVector)_mm512_min_ps((__m512)a, (__m512)b); }
#elif CVFAST_VECTOR_BYTES == 32 && defined(__AVX__)
inline FloatVector greater_of(FloatVector a, FloatVector b) { return (FloatVector)_mm256_max_ps((__m256)a, (__m256)b); }
inline FloatVector lesser_of(FloatVector a, FloatVector b) { return (FloatVector)_mm256_min_ps((__m256)a, (__m256)b); }
#endif

template <class V>
V load_as(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
void store_as(void* to, V v) { __builtin_memcpy(to, &v, sizeof v); }

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  return load_as<To>(&from);
}

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

// The type that a storage type is computed in.
template <class S>
struct ComputeOf { using type = float; };
template <>
struct ComputeOf<double> { using type = double; };
template <class S>
using Compute = typename ComputeOf<S>::type;

// The conversions are written once, for a scalar (F float, U uint32_t) and for a vector (FloatVector, UintVector).

template <class F, class U>
F bf16_to_float(U bits) { return bit_cast<F>(bits << 16); }

// To nearest, ties to even; a NaN stays a NaN (made quiet, so that cutting its payload can't turn it into infinity).
template <class F, class U>
U float_to_bf16(F value) {
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet_nan = (bits >> 16) | 0x40u;
  return value != value ? quiet_nan : rounded;
}

template <class F, class U>
F f16_to_float(U bits) {
  const U sign = (bits & 0x8000u) << 16;
  const U magnitude = bits & 0x7fffu;
  const U normal = (magnitude << 13) + ((127u - 15u) << 23);
  const U special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? U{} + 0x400000u : U{});  // NaN made quiet
  // A subnormal is magnitude * 2^-24: write it into the last bits of 0.5 (ulp 2^-24) and take 0.5 away, exactly.
  const F half = bit_cast<F>(U{} + 0x3f000000u);
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude | 0x3f000000u) - half);
  const U finite = magnitude < 0x400u ? subnormal : normal;
  return bit_cast<F>((magnitude >= 0x7c00u ? special : finite) | sign);
}

// To nearest, ties to even; overflow to infinity; NaN made quiet.
template <class F, class U>
U float_to_f16(F value) {
  const U bits = bit_cast<U>(value);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 0.5 (ulp 2^-24) rounds to the subnormal's multiple of 2^-24.
  const F half = bit_cast<F>(U{} + 0x3f000000u);
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + half) - 0x3f000000u;
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  const U infinite = magnitude > 0x7f800000u ? ((magnitude >> 13) & 0x3ffu) | 0x7e00u : U{} + 0x7c00u;
  return (magnitude >= 0x477ff000u ? infinite : finite) | sign;  // from 65520 on it rounds to infinity
}

inline float to_compute(float v) { return v; }
inline double to_compute(double v) { return v; }
inline float to_compute(Bf16 v) { return bf16_to_float<float, uint32_t>(v.bits); }
inline void from_compute(float v, float* to) { *to = v; }
inline void from_compute(double v, double* to) { *to = v; }
inline void from_compute(float v, Bf16* to) { to->bits = static_cast<uint16_t>(float_to_bf16<float, uint32_t>(v)); }

// One vector of elements, in the type it is computed in.
inline FloatVector load_vector(const float* from) { return load_as<FloatVector>(from); }
inline Vector<double> load_vector(const double* from) { return load_as<Vector<double>>(from); }
inline FloatVector load_vector(const Bf16* from) {
  return bf16_to_float<FloatVector>(__builtin_convertvector(load_as<HalfVector>(from), UintVector));
}
inline void store_vector(FloatVector v, float* to) { store_as(to, v); }
inline void store_vector(Vector<double> v, double* to) { store_as(to, v); }
inline void store_vector(FloatVector v, Bf16* to) {
  store_as(to, __builtin_convertvector(float_to_bf16<FloatVector, UintVector>(v), HalfVector));
}

#if defined(__F16C__)
inline float to_compute(F16 v) { return _cvtsh_ss(v.bits); }
inline void from_compute(float v, F16* to) { to->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
#if defined(__AVX512F__)
inline FloatVector load_vector(const F16* from) { return _mm512_cvtph_ps(load_as<__m256i>(from)); }
inline void store_vector(FloatVector v, F16* to) { store_as(to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline FloatVector load_vector(const F16* from) {
  FloatVector v;
  for (int i = 0; i < lanes<float>; i += 8)
    _mm256_storeu_ps(reinterpret_cast<float*>(&v) + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  return v;
}
inline void store_vector(FloatVector v, F16* to) {
  for (int i = 0; i < lanes<float>; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(reinterpret_cast<const float*>(&v) + i),
                                     _MM_FROUND_TO_NEAREST_INT));
}
#endif
#else
inline float to_compute(F16 v) { return f16_to_float<float, uint32_t>(v.bits); }
inline void from_compute(float v, F16* to) { to->bits = static_cast<uint16_t>(float_to_f16<float, uint32_t>(v)); }
inline FloatVector load_vector(const F16* from) {
  return f16_to_float<FloatVector>(__builtin_convertvector(load_as<HalfVector>(from), UintVector));
}
inline void store_vector(FloatVector v, F16* to) {
  store_as(to, __builtin_convertvector(float_to_f16<FloatVector, UintVector>(v), HalfVector));
}
#endif

// A vector whose first `count` >= 0 elements are in memory; the others are 0 and not stored.
template <class S>
Vector<Compute<S>> load_first(const S* from, int64_t count) {
  if (count >= lanes<Compute<S>>) return load_vector(from);
  Compute<S> element[lanes<Compute<S>>] = {};
  for (int64_t i = 0; i < count; ++i) element[i] = to_compute(from[i]);
  return load_vector(element);
}
template <class S>
void store_first(Vector<Compute<S>> v, S* to, int64_t count) {
  if (count >= lanes<Compute<S>>) return store_vector(v, to);
  for (int64_t i = 0; i < count; ++i) from_compute(static_cast<Compute<S>>(v[i]), to + i);
}

#if defined(__AVX512F__) && CVFAST_VECTOR_BYTES == 64
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xffff); }
inline FloatVector load_first(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
inline void store_first(FloatVector v, float* to, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), v); }
#elif defined(__AVX2__) && CVFAST_VECTOR_BYTES == 32
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(min<int64_t>(count, 8))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline FloatVector load_first(const float* from, int64_t count) {
  if (__builtin_constant_p(count >= 8) && count >= 8) return load_vector(from);
  return _mm256_maskload_ps(from, first_lanes(count));
}
inline void store_first(FloatVector v, float* to, int64_t count) {
  if (count >= 8) return store_vector(v, to);  // masked, it is slow
  _mm256_maskstore_ps(to, first_lanes(count), v);
}
#endif

// A matrix in memory; strides in elements. Either stride may be 1.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;
};

template <class T>
Matrix<T> transposed(Matrix<T> m) { return {m.data, m.col_stride, m.row_stride}; }

template <class From, class To>
void copy_contiguous(const From* from, To* to, int64_t count) {
  constexpr int step = lanes<Compute<From>>;
  if (count < step) {
    for (int64_t i = 0; i < count; ++i) from_compute(to_compute(from[i]), to + i);
    return;
  }
  for (int64_t i = 0; i + step < count; i += step) store_vector(load_vector(from + i), to + i);
  store_vector(load_vector(from + count - step), to + count - step);  // overlaps the one before: no tail
}

template <class From, class To>
void copy_strided(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_compute(to_compute(from[i * from_stride]), to + i * to_stride);
}

// to[i, j] = from[i, j] for i < rows, j < cols, converted through the compute type.
template <class From, class To>
void copy_matrix(Matrix<From> from, Matrix<To> to, int64_t rows, int64_t cols) {
  const bool rows_contiguous = from.row_stride == 1 && to.row_stride == 1;
  const bool cols_contiguous = from.col_stride == 1 && to.col_stride == 1;
  // The inner loop goes along the contiguous dimension if there is just one, else along the longer one.
  if (rows_contiguous != cols_contiguous ? rows_contiguous : rows > cols) {
    from = transposed(from), to = transposed(to);
    const int64_t swapped = rows;
    rows = cols, cols = swapped;
  }
  for (int64_t i = 0; i < rows; ++i) {
    From* source = from.data + i * from.row_stride;
    To* target = to.data + i * to.row_stride;
    if (from.col_stride == 1 && to.col_stride == 1)
      copy_contiguous(source, target, cols);
    else
      copy_strided(source, from.col_stride, target, to.col_stride, cols);
  }
}

template <class T>
void zero_matrix(Matrix<T> to, int64_t rows, int64_t cols) {
  if (to.col_stride != 1) {
    to = transposed(to);
    const int64_t swapped = rows;
    rows = cols, cols = swapped;
  }
  if (to.col_stride == 1 && to.row_stride == cols) cols *= rows, rows = 1;
  for (int64_t i = 0; i < rows; ++i) {
    T* row = to.data + i * to.row_stride;
    if (to.col_stride == 1)
      __builtin_memset(static_cast<void*>(row), 0, cols * sizeof(T));
    else
      for (int64_t j = 0; j < cols; ++j) row[j * to.col_stride] = T{};
  }
}

}  // namespace
}  // namespace cvfast
