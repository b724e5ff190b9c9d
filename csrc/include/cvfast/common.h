// What every kernel header shares. Plain C++: no torch, no Python, no CUDA (rule 1 of docs/architecture.md).
#pragma once
#include <cstdint>

namespace cvfast {

// Storage type of the elements a kernel reads and writes. bf16 and f16 are computed in float32.
enum class DType : int32_t { f32, f64, bf16, f16 };

// The caller's threads. parallel_for cuts [0, n) into ranges, calls body(state, begin, end) for each of them on some
// thread and returns when all are done. A kernel must give the same bits however the ranges are cut.
struct ThreadPool {
  int32_t threads;
  void (*parallel_for)(int64_t n, void (*body)(void* state, int64_t begin, int64_t end), void* state);
};

// A 4-D tensor [N, C, H, W] (for weights [K, C/groups, R, S]) in the caller's memory; strides are in elements, >= 0.
struct Tensor4 {
  void* data;
  int64_t stride[4];
};

struct ConstTensor4 {
  const void* data;
  int64_t stride[4];
};

}  // namespace cvfast
