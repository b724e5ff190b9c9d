// What all bindings share: torch's tensors and dtypes. Only what the headers of torch 2.11 have is used, so that cvfast can
// be built against them too.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "cvfast/common.h"

namespace cvfast {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "cvfast: dtype must be float32, float64, bfloat16 or float16");
  }
}

inline Tensor4 tensor4(Tensor& tensor) {
  auto s = tensor.strides();
  return {tensor.mutable_data_ptr(), {s[0], s[1], s[2], s[3]}};
}

inline ConstTensor4 tensor4(const Tensor& tensor) {
  auto s = tensor.strides();
  return {tensor.const_data_ptr(), {s[0], s[1], s[2], s[3]}};
}

}  // namespace cvfast
