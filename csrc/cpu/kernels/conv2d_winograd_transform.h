// Winograd's F(4x4, 3x3): 4x4 results of a 3x3 correlation from a 6x6 patch, by 36 products instead of 144 (Lavin and
// Gray, "Fast algorithms for convolutional neural networks", 2016). And F(4x4, 2x2): of a 2x2 correlation from a 5x5 patch,
// by 25 products instead of 64.
//
// With the patch d and the kernel g, the results are A^T [(G g G^T) * (B^T d B)] A, where the product * goes element by
// element and is summed over channels. The interpolation points of F(4x4, 3x3) are 0, +-a, +-b and infinity. a = 5/8 and
// b = 3/2 are exact in binary and give about half the error of the usual 1 and 2. Those of F(4x4, 2x2) are +-c, +-d and
// infinity; c = 3/8 and d = 5/4 give 0.4 of the error of 0, +-1, 2 and infinity.
//
// The gradient to the kernel follows from the same bilinear form: with the gradient o of the 4x4 results it is
// G^T [(A o A^T) * (B^T d B)] G, summed over tiles before the outer transform.
//
// Every statement below has one way only to be contracted to fused multiply-adds, so that all instruction sets with a
// fused multiply-add give the same bits.
#pragma once
#include <utility>

#include "simd.h"

namespace cvfast {
namespace {

constexpr int winograd_outputs = 4;  // of a tile, on each axis
// Inputs of a tile and products, on each axis, with a kernel of Taps x Taps.
template <int Taps>
constexpr int winograd_inputs = winograd_outputs + Taps - 1;

// ---- F(4x4, 3x3) ----

constexpr float point_a = 0.625f, point_b = 1.5f;
constexpr float square_a = point_a * point_a, square_b = point_b * point_b;

// B^T on six vectors.
inline void transform_line(const FloatVector (&d)[6], FloatVector (&t)[6]) {
  const FloatVector even_a = d[4] - square_b * d[2], odd_a = d[3] - square_b * d[1];
  const FloatVector even_b = d[4] - square_a * d[2], odd_b = d[3] - square_a * d[1];
  const FloatVector zero = d[4] - (square_a + square_b) * d[2], infinity = d[5] - (square_a + square_b) * d[3];
  t[0] = zero + (square_a * square_b) * d[0];
  t[1] = even_a + point_a * odd_a;
  t[2] = even_a - point_a * odd_a;
  t[3] = even_b + point_b * odd_b;
  t[4] = even_b - point_b * odd_b;
  t[5] = infinity + (square_a * square_b) * d[1];
}

// G and A stay without their scale factors, which the last transform makes up for.
constexpr float scale_zero = 1 / (square_a * square_b);
constexpr float scale_a = 1 / (2 * square_a * (square_a - square_b)), scale_b = 1 / (2 * square_b * (square_b - square_a));
constexpr float ratio_a = scale_a / scale_zero, ratio_b = scale_b / scale_zero;

// G on three vectors.
inline void transform_kernel(const FloatVector (&g)[3], FloatVector (&t)[6]) {
  const FloatVector even_a = g[0] + square_a * g[2], even_b = g[0] + square_b * g[2];
  t[0] = g[0];
  t[1] = even_a + point_a * g[1];
  t[2] = even_a - point_a * g[1];
  t[3] = even_b + point_b * g[1];
  t[4] = even_b - point_b * g[1];
  t[5] = g[2];
}

// A^T on six vectors; the results lack the factors result_scale<3>.
inline void transform_products(const FloatVector (&m)[6], FloatVector (&o)[4]) {
  const FloatVector even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  const FloatVector first = m[0] + ratio_a * even_a, last = m[5] + (scale_a * square_a * point_a) * odd_a;
  o[0] = first + ratio_b * even_b;
  o[1] = odd_a - (point_a / point_b) * odd_b;
  o[2] = even_a - even_b;
  o[3] = last + (scale_b * square_b * point_b) * odd_b;
}
template <int Taps>
constexpr float result_scale[4] = {scale_zero, scale_a * point_a, scale_a * square_a, 1};

// A on four vectors.
inline void transform_line(const FloatVector (&o)[4], FloatVector (&t)[6]) {
  const FloatVector even_a = o[0] + square_a * o[2], odd_a = o[1] + square_a * o[3];
  const FloatVector even_b = o[0] + square_b * o[2], odd_b = o[1] + square_b * o[3];
  t[0] = o[0];
  t[1] = even_a + point_a * odd_a;
  t[2] = even_a - point_a * odd_a;
  t[3] = even_b + point_b * odd_b;
  t[4] = even_b - point_b * odd_b;
  t[5] = o[3];
}

// G^T on six vectors; the results lack the factors kernel_scale<3>.
inline void transform_sums(const FloatVector (&m)[6], FloatVector (&g)[3]) {
  const FloatVector even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  const FloatVector first = m[0] + ratio_a * even_a, last = m[5] + (scale_a * square_a) * even_a;
  g[0] = first + ratio_b * even_b;
  g[1] = odd_a - (point_a / point_b) * odd_b;
  g[2] = last + (scale_b * square_b) * even_b;
}
template <int Taps>
constexpr float kernel_scale[3] = {scale_zero, scale_a * point_a, 1};

// ---- F(4x4, 2x2) ----

constexpr float point_c = 0.375f, point_d = 1.25f;
constexpr float square_c = point_c * point_c, square_d = point_d * point_d;

// B^T on five vectors.
inline void transform_line(const FloatVector (&d)[5], FloatVector (&t)[5]) {
  const FloatVector even_c = d[2] - square_d * d[0], odd_c = d[3] - square_d * d[1];
  const FloatVector even_d = d[2] - square_c * d[0], odd_d = d[3] - square_c * d[1];
  const FloatVector infinity = d[4] - (square_c + square_d) * d[2];
  t[0] = odd_c + point_c * even_c;
  t[1] = odd_c - point_c * even_c;
  t[2] = odd_d + point_d * even_d;
  t[3] = odd_d - point_d * even_d;
  t[4] = infinity + (square_c * square_d) * d[0];
}

// G on two vectors. Without a second tap the product at infinity, the last one, is 0.
inline void transform_kernel(const FloatVector (&g)[2], FloatVector (&t)[5]) {
  t[0] = g[0] + point_c * g[1];
  t[1] = g[0] - point_c * g[1];
  t[2] = g[0] + point_d * g[1];
  t[3] = g[0] - point_d * g[1];
  t[4] = g[1];
}

// One element of G's result for a line of taps in memory, with the bits that transform_kernel() gives it.
struct OuterColumn {
  int64_t tap;
  FloatVector operator()(const float* line) const { return load_vector(line + tap * lanes<float>); }
};
struct InnerColumn3 {
  float square, point;
  FloatVector operator()(const float* line) const {
    const FloatVector even = load_vector(line) + square * load_vector(line + 2 * lanes<float>);
    return even + point * load_vector(line + lanes<float>);
  }
};
struct InnerColumn2 {
  float point;
  FloatVector operator()(const float* line) const {
    return load_vector(line) + point * load_vector(line + lanes<float>);
  }
};

// Calls use(column, what gives its elements) for all columns of points.
template <int Taps, class Use>
void for_each_column(Use&& use) {
  if constexpr (Taps == 3) {
    use(0, OuterColumn{0});
    use(1, InnerColumn3{square_a, point_a}), use(2, InnerColumn3{square_a, -point_a});
    use(3, InnerColumn3{square_b, point_b}), use(4, InnerColumn3{square_b, -point_b});
    use(5, OuterColumn{2});
  } else {
    use(0, InnerColumn2{point_c}), use(1, InnerColumn2{-point_c});
    use(2, InnerColumn2{point_d}), use(3, InnerColumn2{-point_d});
    use(4, OuterColumn{1});
  }
}

constexpr float scale_c = 1 / (2 * point_c * (square_c - square_d));

// A^T on five vectors; the results lack the factors result_scale<2>.
inline void transform_products(const FloatVector (&m)[5], FloatVector (&o)[4]) {
  const FloatVector even_c = m[0] + m[1], odd_c = m[0] - m[1], even_d = m[2] + m[3], odd_d = m[2] - m[3];
  const FloatVector last = even_c - (square_d / square_c) * even_d;
  o[0] = odd_c - (point_c / point_d) * odd_d;
  o[1] = even_c - even_d;
  o[2] = odd_c - (point_d / point_c) * odd_d;
  o[3] = last + 1 / (scale_c * square_c * point_c) * m[4];
}
template <>
constexpr float result_scale<2>[4] = {scale_c, scale_c * point_c, scale_c * square_c, scale_c * square_c * point_c};

// A on four vectors.
inline void transform_line(const FloatVector (&o)[4], FloatVector (&t)[5]) {
  const FloatVector even_c = o[0] + square_c * o[2], odd_c = o[1] + square_c * o[3];
  const FloatVector even_d = o[0] + square_d * o[2], odd_d = o[1] + square_d * o[3];
  t[0] = even_c + point_c * odd_c;
  t[1] = even_c - point_c * odd_c;
  t[2] = even_d + point_d * odd_d;
  t[3] = even_d - point_d * odd_d;
  t[4] = o[3];
}

// G^T on five vectors; the results lack the factors kernel_scale<2>. The first one does not need the product at infinity.
inline void transform_sums(const FloatVector (&m)[5], FloatVector (&g)[2]) {
  const FloatVector even_c = m[0] + m[1], odd_c = m[0] - m[1], even_d = m[2] + m[3], odd_d = m[2] - m[3];
  const FloatVector finite = even_c - even_d;
  g[0] = odd_c - (point_c / point_d) * odd_d;
  g[1] = finite + 1 / (scale_c * point_c) * m[4];
}
template <>
constexpr float kernel_scale<2>[3] = {scale_c, scale_c * point_c};

// ---- Four vectors seen as columns of 4x4 blocks: lane 4 q + j of vector i is element (i, j) of block q. ----

template <class S>
struct QuadOf { typedef uint16_t type __attribute__((vector_size(8))); };
template <>
struct QuadOf<float> { typedef float type __attribute__((vector_size(16))); };
template <class S>
using Quad = typename QuadOf<S>::type;  // four neighbours in memory
template <class S>
struct StoredVectorOf { using type = HalfVector; };
template <>
struct StoredVectorOf<float> { using type = FloatVector; };

constexpr int quads = lanes<float> / 4;

// Element i of two vectors, one after the other, that goes to lane `lane`.
constexpr int interleave_low(int lane) { return lane / 4 * 4 + lane % 4 / 2 + lane % 2 * lanes<float>; }
constexpr int interleave_high(int lane) { return interleave_low(lane) + 2; }
constexpr int pairs_low(int lane) { return lane / 4 * 4 + lane % 2 + lane % 4 / 2 * lanes<float>; }
constexpr int pairs_high(int lane) { return pairs_low(lane) + 2; }

template <int (*Element)(int), int... Lane>
FloatVector shuffle(FloatVector a, FloatVector b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, Element(Lane)...);
}
template <int (*Element)(int)>
FloatVector shuffle(FloatVector a, FloatVector b) {
  return shuffle<Element>(a, b, std::make_integer_sequence<int, lanes<float>>{});
}

// Transposes each 4x4 block.
inline void transpose_blocks(FloatVector (&v)[4]) {
  const FloatVector low01 = shuffle<interleave_low>(v[0], v[1]), high01 = shuffle<interleave_high>(v[0], v[1]);
  const FloatVector low23 = shuffle<interleave_low>(v[2], v[3]), high23 = shuffle<interleave_high>(v[2], v[3]);
  v[0] = shuffle<pairs_low>(low01, low23);
  v[1] = shuffle<pairs_high>(low01, low23);
  v[2] = shuffle<pairs_low>(high01, high23);
  v[3] = shuffle<pairs_high>(high01, high23);
}

// The quads at from, from + stride, ... as one vector.
template <class S>
FloatVector load_quads(const S* from, int64_t stride) {
  typename StoredVectorOf<S>::type stored;
  if constexpr (quads == 1) {
    stored = load_as<Quad<S>>(from);
  } else {
    const auto two = [&](int64_t i) {
      return __builtin_shufflevector(load_as<Quad<S>>(from + i * stride), load_as<Quad<S>>(from + (i + 1) * stride), 0, 1, 2, 3,
                                     4, 5, 6, 7);
    };
    if constexpr (quads == 2)
      stored = two(0);
    else
      stored = __builtin_shufflevector(two(0), two(2), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  return load_vector(reinterpret_cast<const S*>(&stored));
}

template <class S>
void store_quads(FloatVector v, S* to, int64_t stride) {
  typename StoredVectorOf<S>::type stored;
  S* element = reinterpret_cast<S*>(&stored);
  store_vector(v, element);
  for (int q = 0; q < quads; ++q) store_as(to + q * stride, load_as<Quad<S>>(element + 4 * q));
}

// v[j] lane i = from[i * stride + j] for j < 4: four neighbours of each of as many lines as a vector has lanes.
template <class S>
void load_columns(const S* from, int64_t stride, FloatVector (&v)[4]) {
  for (int i = 0; i < 4; ++i) v[i] = load_quads(from + i * stride, 4 * stride);
  transpose_blocks(v);
}

template <class S>
void store_columns(FloatVector (&v)[4], S* to, int64_t stride) {
  transpose_blocks(v);
  for (int i = 0; i < 4; ++i) store_quads(v[i], to + i * stride, 4 * stride);
}

}  // namespace
}  // namespace cvfast
