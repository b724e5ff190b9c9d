// What one core does at most, to measure the other kernels by: multiply-adds and exponentials in registers, and reading
// memory. Compiled once per instruction set, exports cvfast::<CVFAST_ISA>::peak.
#include "../kernel_table.h"
#include "exp.h"
#include "simd.h"

namespace cvfast {
namespace {

// Independent sums: enough to hide the latency of a multiply-add, few enough for 16 registers.
constexpr int chains = 14;

template <class T>
double multiply_adds(int64_t steps, double x) {
  const Vector<T> factor = Vector<T>{} + static_cast<T>(x);
  Vector<T> sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = Vector<T>{} + static_cast<T>(i);  // alike, they would be made one sum
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) sum[i] = sum[i] * factor + factor;
  double total = 0;
  for (int i = 0; i < chains; ++i)
    for (int j = 0; j < lanes<T>; ++j) total += static_cast<double>(sum[i][j]);
  return total;
}

// Of numbers that differ from step to step and don't wait for each other.
double exponentials(int64_t steps, double x) {
  FloatVector number = FloatVector{} - static_cast<float>(x), sum[2] = {};
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) {
      sum[i % 2] += exp2<float>(number);
      number -= 1e-6f;
    }
  double total = 0;
  for (int j = 0; j < lanes<float>; ++j) total += static_cast<double>(sum[0][j] + sum[1][j]);
  return total;
}

// The sum keeps the loads alive; eight of them, so that additions never wait for each other.
uint32_t read(const char* data, int64_t bytes, int64_t passes) {
  constexpr int sums = 8;
  constexpr int64_t step = sums * CVFAST_VECTOR_BYTES;
  UintVector sum[sums] = {};
  for (int64_t pass = 0; pass < passes; ++pass)
    for (int64_t at = 0; at + step <= bytes; at += step)
#pragma GCC unroll 8
      for (int i = 0; i < sums; ++i) sum[i] += load_as<UintVector>(data + at + i * CVFAST_VECTOR_BYTES);
  uint32_t total = 0;
  for (int i = 0; i < sums; ++i)
    for (int j = 0; j < lanes<uint32_t>; ++j) total += sum[i][j];
  return total;
}

}  // namespace

namespace CVFAST_ISA {
extern const PeakKernels peak;
const PeakKernels peak = {chains * CVFAST_VECTOR_BYTES, multiply_adds<float>, multiply_adds<double>, exponentials, read};
}  // namespace CVFAST_ISA

}  // namespace cvfast
