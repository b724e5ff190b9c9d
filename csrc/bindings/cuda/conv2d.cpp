// conv2d and conv_transpose2d on CUDA devices: torch's tensors, device and stream -> the launchers of csrc/cuda. The
// schemas are in cvfast/ops.
#include "../../cuda/conv2d.h"

#include <torch/csrc/stable/library.h>

#include "../conv2d_common.h"
#include "stream.h"

namespace {

using namespace cvfast;

// Calls `launcher` on the device and current stream of `tensor`.
template <class Conv>
void launch(cudaError_t (*launcher)(const Conv&, cudaStream_t), const Conv& conv, const Tensor& tensor) {
  STD_TORCH_CHECK(conv.dtype == DType::f32 || conv.dtype == DType::f64,
                  "cvfast conv2d: on CUDA devices dtype must be float32 or float64");
  const cuda::CurrentStream stream(tensor);
  cuda::check_launch(launcher(conv, stream.get()), "conv2d");
}

struct Kernels {
  static void forward(const Conv2dForward& conv, const Tensor& t) { launch(cuda::conv2d_forward, conv, t); }
  static void input_grad(const Conv2dInputGrad& conv, const Tensor& t) { launch(cuda::conv2d_input_grad, conv, t); }
  static void weight_grad(const Conv2dWeightGrad& conv, const Tensor& t) { launch(cuda::conv2d_weight_grad, conv, t); }
  static Tensor empty_weight_grad(const Sizes4& size, const Tensor& first, const Tensor& second) {
    return empty_result(size, first, second);
  }
};

using Operators = Conv2dOperators<Kernels>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CUDA, m) { implement_conv2d<Operators>(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CUDA, m) { implement_conv2d<Operators>(m); }
