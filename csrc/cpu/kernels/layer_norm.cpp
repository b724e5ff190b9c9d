// Layer normalisation for one instruction set; see conv2d.cpp. Exports cvfast::<CVFAST_ISA>::layer_norm and nothing else.
#include "cvfast/layer_norm.h"

#include "../kernel_table.h"
#include "parallel.h"
#include "simd.h"

namespace cvfast {
namespace {

constexpr int64_t L = lanes<float>, chains = 4;

// Sum of value(i, count) over the vectors of a row, `count` elements from i on: chains of vectors, then pairwise. Of the last
// vector the lanes beyond the row must be 0.
template <class Value>
float sum_of_row(int64_t size, Value&& value) {
  FloatVector sum[chains] = {};
  int64_t i = 0;
  for (; i + chains * L <= size; i += chains * L)
#pragma GCC unroll 4
    for (int j = 0; j < chains; ++j) sum[j] += value(i + j * L, L);
  for (int j = 0; i < size; i += L, j = (j + 1) % chains) sum[j] += value(i, min(size - i, L));
  const FloatVector all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  float element[L];
  store_as(element, all);
  for (int64_t step = L / 2; step > 0; step /= 2)
    for (int64_t j = 0; j < step; ++j) element[j] += element[j + step];
  return element[0];
}

// The mean first, then the squares of what differs from it: nothing is lost where the mean is large.
void normalize_row(const LayerNormForward& p, const float* from, float* to) {
  const float count = static_cast<float>(p.size);
  const float mean = sum_of_row(p.size, [&](int64_t i, int64_t some) { return load_first(from + i, some); }) / count;
  float means[L];
  store_as(means, FloatVector{} + mean);
  const float squares = sum_of_row(p.size, [&](int64_t i, int64_t some) {
    const FloatVector difference = load_first(from + i, some) - load_first(means, some);
    return difference * difference;
  });
  const float scale = static_cast<float>(1 / __builtin_sqrt(squares / count + p.epsilon));
  const auto normalize = [&](int64_t i, int64_t some) {
    const FloatVector weight = load_first(p.weight + i, some), bias = load_first(p.bias + i, some);
    store_first((load_first(from + i, some) - mean) * scale * weight + bias, to + i, some);
  };
  int64_t i = 0;
  for (; i + L <= p.size; i += L) normalize(i, L);
  if (i < p.size) normalize(i, p.size - i);
}

void run_forward(const LayerNormForward& p, const ThreadPool& pool) {
  constexpr int64_t piece = 16;  // rows
  parallel_for(pool, ceil_div(p.rows, piece), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * piece; row < min(end * piece, p.rows); ++row)
      normalize_row(p, p.input + row * p.size, p.output + row * p.size);
  });
}

}  // namespace

namespace CVFAST_ISA {
extern const LayerNormKernel layer_norm;
const LayerNormKernel layer_norm = {run_forward};
}  // namespace CVFAST_ISA

}  // namespace cvfast
