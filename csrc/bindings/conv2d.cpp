// conv2d and conv_transpose2d on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. Schemas: cvfast/ops.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../cpu/huge_pages.h"
#include "../cpu/isa.h"
#include "../cpu/poison.h"
#include "conv2d_common.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;

void prepare(const Tensor& result) {
  const int64_t bytes = result.numel() * result.element_size();
  prefer_huge_pages(result.mutable_data_ptr(), bytes);
  if (results_are_poisoned()) std::memset(result.mutable_data_ptr(), 0xff, bytes);  // NaN in every dtype
}

struct Kernels {
  static void forward(const Conv2dForward& args, const Tensor& result) {
    prepare(result);
    kernels().conv2d_forward(args, thread_pool());
  }
  static void input_grad(const Conv2dInputGrad& args, const Tensor& result) {
    prepare(result);
    kernels().conv2d_input_grad(args, thread_pool());
  }
  static void weight_grad(const Conv2dWeightGrad& args, const Tensor& result) {
    prepare(result);
    kernels().conv2d_weight_grad(args, thread_pool());
  }
};

using Operators = Conv2dOperators<Kernels>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { implement_conv2d<Operators>(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) { implement_conv2d<Operators>(m); }
