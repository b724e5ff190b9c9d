// Batched products on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. The schema is in
// cvfast/ops/batched_product.py.
#include "cvfast/batched_product.h"

#include <torch/csrc/stable/library.h>

#include "../cpu/isa.h"
#include "cpu_tensors.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using torch::headeronly::ScalarType;

Tensor with_unit_columns(const Tensor& t) { return t.stride(2) == 1 || t.size(2) == 1 ? t : torch::stable::contiguous(t); }

BatchedMatrices matrices(const Tensor& t) { return {t.const_data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}}; }

Tensor product(const Tensor& left, const Tensor& right, bool transposed) {
  STD_TORCH_CHECK(left.dim() == 3 && right.dim() == 3 && left.size(0) == right.size(0) &&
                      left.size(2) == right.size(transposed ? 2 : 1),
                  "cvfast batched_product: sizes of left and right do not fit");
  STD_TORCH_CHECK(left.scalar_type() == right.scalar_type() &&
                      (left.scalar_type() == ScalarType::Float || left.scalar_type() == ScalarType::Double),
                  "cvfast batched_product: left and right must both be float32 or float64");
  const int64_t cols = right.size(transposed ? 1 : 2);
  const Tensor a = transposed ? with_unit_columns(left) : left, b = with_unit_columns(right);
  const Tensor result = empty_contiguous({left.size(0), left.size(1), cols}, dtype_code(left));
  kernels().batched_product.product({left.size(0), left.size(1), left.size(2), cols, dtype_of(left), matrices(a), matrices(b),
                                     transposed, result.mutable_data_ptr(), false},
                                    thread_pool());
  return result;
}

template <class Library>
void implement(Library& m) {
  m.impl("batched_product", TORCH_BOX(&product));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) { implement(m); }
