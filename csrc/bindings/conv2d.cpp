// conv2d and conv_transpose2d on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. Schemas: cvfast/ops.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "../cpu/huge_pages.h"
#include "../cpu/isa.h"
#include "../cpu/poison.h"
#include "../cpu/result_memory.h"
#include "conv2d_common.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;

void prepare(const Tensor& result) {
  const int64_t bytes = result.numel() * result.element_size();
  prefer_huge_pages(result.mutable_data_ptr(), bytes);
  if (results_are_poisoned()) std::memset(result.mutable_data_ptr(), 0xff, bytes);  // NaN in every dtype
}

// An uninitialised result in memory that others have used before, where there is some; it cannot be resized.
Tensor brief_result(const Ints& size, const Tensor& first, const Tensor& second) {
  const ResultLayout r(size, first, second);
  void* data = borrow_result(r.elements() * first.element_size());
  if (!data) return empty_result(r);
  AtenTensorHandle result;
  const AOTITorchError error =
      torch_from_blob(data, 4, r.size.data(), r.strides, 0, r.dtype, r.device_type, r.device_index, &result,
                      aoti_torch_layout_strided(), nullptr, 0, [](void* memory, void*) { return_result(memory); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) return_result(data);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(result);
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

Activation activation_of(std::string_view name) {
  constexpr std::pair<std::string_view, Activation> known[] = {
      {"none", Activation::none}, {"relu", Activation::relu},       {"relu6", Activation::relu6}, {"leaky_relu", Activation::leaky_relu},
      {"silu", Activation::silu}, {"sigmoid", Activation::sigmoid}, {"tanh", Activation::tanh}};
  for (const auto& [known_name, activation] : known)
    if (name == known_name) return activation;
  STD_TORCH_CHECK(false, "cvfast conv2d: unknown activation ", std::string(name));
}

Pooling pooling_of(std::string_view name) {
  if (name == "none") return Pooling::none;
  if (name == "max") return Pooling::max;
  if (name == "average") return Pooling::average;
  STD_TORCH_CHECK(false, "cvfast conv2d: unknown pooling ", std::string(name));
}

Tensor forward_with_epilogue(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& residual, const std::string& activation, double negative_slope,
                             const std::string& pooling, const Ints& stride, const Ints& padding, const Ints& dilation,
                             int64_t groups) {
  check_operands(input, weight);
  Conv2dShape shape = conv2d_shape(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  Epilogue epilogue = {activation_of(activation), negative_slope, nullptr, pooling_of(pooling)};
  Ints sizes = output_sizes(shape);
  if (epilogue.pooling != Pooling::none) {
    sizes[2] /= 2, sizes[3] /= 2;
    STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, "cvfast conv2d: the result is too small to pool 2x2 pixels");
    shape.out_height = 2 * sizes[2], shape.out_width = 2 * sizes[3];
  }
  Tensor keep, output = brief_result(sizes, input, weight);
  if (residual.has_value()) {
    STD_TORCH_CHECK(epilogue.pooling == Pooling::none, "cvfast conv2d: no pooling with a residual");
    check_operands(*residual, input);
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(residual->size(i) == output.size(i) &&
                          (residual->stride(i) == output.stride(i) || output.size(i) == 1 || output.numel() == 0),
                      "cvfast conv2d: the residual must have the result's sizes and strides");
    epilogue.residual = residual->const_data_ptr();
  }
  prepare(output);
  kernels().conv2d_forward({shape, dtype_of(input), tensor4(input), tensor4(weight),
                            bias_data(bias, input, shape.out_channels, keep), tensor4(output), epilogue},
                           thread_pool());
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { implement_conv2d<Operators>(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  implement_conv2d<Operators>(m);
  m.impl("conv2d_epilogue", TORCH_BOX(&forward_with_epilogue));
}
