// gelu in training on the CPU. The schemas are in cvfast/ops/gelu.py.
#include "cvfast/gelu.h"

#include <torch/csrc/stable/library.h>

#include "../cpu/isa.h"
#include "brief_result.h"
#include "cpu_tensors.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;

const float* elements(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_contiguous(),
                  "cvfast gelu: tensors must be float32 and contiguous");
  return static_cast<const float*>(t.const_data_ptr());
}

Tensor forward(const Tensor& input) {
  const float* from = elements(input);
  const Tensor output = dense_like(input);
  kernels().gelu.forward({input.numel(), from, static_cast<float*>(output.mutable_data_ptr())}, thread_pool());
  return output;
}

Tensor backward(const Tensor& grad, const Tensor& input) {
  const float *given = elements(grad), *from = elements(input);
  STD_TORCH_CHECK(grad.numel() == input.numel(), "cvfast gelu: a gradient has ", grad.numel(), " elements, expected ",
                  input.numel());
  const Ints sizes = sizes_of(input), strides(input.strides().begin(), input.strides().end());
  const Tensor result = prepared(
      brief_tensor(input.dim(), sizes.data(), strides.data(), dtype_code(input), input.numel() * input.element_size()));
  kernels().gelu.backward({input.numel(), given, from, static_cast<float*>(result.mutable_data_ptr())}, thread_pool());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  m.impl("gelu", TORCH_BOX(&forward));
  m.impl("gelu_backward", TORCH_BOX(&backward));
}
