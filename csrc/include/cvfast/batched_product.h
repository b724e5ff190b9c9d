// Products of matrices, one per sample: result[b] = left[b] * right[b], or left[b] * right[b]^T.
#pragma once
#include "common.h"

namespace cvfast {

// Matrices of f32 or f64 with these strides in elements (of sample, row, column).
struct BatchedMatrices {
  const void* data;
  int64_t stride[3];
};

// Every size may be 0. The result is fully written or added to, and the same bits for any number of threads, for a sample alone or in
// a batch and for any strides. An element is a chain of multiply-adds over at most 256 products, the chains added up in
// order; transposed, one chain per vector lane, added up pairwise.
struct BatchedProduct {
  int64_t batch, rows, depth, cols;
  DType dtype;
  BatchedMatrices left;   // [B, rows, depth]; transposed: column stride 1
  BatchedMatrices right;  // [B, depth, cols], transposed: [B, cols, depth]; column stride 1
  bool transposed;
  void* result;  // [B, rows, cols], contiguous
  bool add;      // to what is there
};

}  // namespace cvfast
