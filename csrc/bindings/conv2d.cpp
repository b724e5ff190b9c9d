// conv2d and conv_transpose2d on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. Schemas: cvfast/ops.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "../cpu/huge_pages.h"
#include "../cpu/isa.h"
#include "../cpu/poison.h"
#include "brief_tensor.h"
#include "conv2d_common.h"
#include "cpu_tensors.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;

void prepare(const Tensor& result) {
  const int64_t bytes = result.numel() * result.element_size();
  prefer_huge_pages(result.mutable_data_ptr(), bytes);
  if (results_are_poisoned()) std::memset(result.mutable_data_ptr(), 0xff, bytes);  // NaN in every dtype
}

Tensor brief_result(const Ints& size, const Tensor& first, const Tensor& second) {
  const ResultLayout r(size, first, second);
  return brief_tensor(4, r.size.data(), r.strides, r.dtype, r.elements() * first.element_size());
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
  // Freed and asked for again at every step.
  static Tensor gradient(const Ints& size, const Tensor& first, const Tensor& second) {
    return brief_result(size, first, second);
  }
};

using Operators = Conv2dOperators<Kernels>;

// The value of the named one among `known`.
template <class Value, std::size_t Count>
Value named(const char* what, std::string_view name, const std::pair<std::string_view, Value> (&known)[Count]) {
  for (const auto& [known_name, value] : known)
    if (name == known_name) return value;
  STD_TORCH_CHECK(false, "cvfast conv2d: unknown ", what, " ", std::string(name));
}

constexpr std::pair<std::string_view, Activation> activations[] = {
    {"none", Activation::none}, {"relu", Activation::relu}, {"relu6", Activation::relu6},
    {"leaky_relu", Activation::leaky_relu}, {"silu", Activation::silu}, {"sigmoid", Activation::sigmoid},
    {"tanh", Activation::tanh}, {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh},
    {"hardswish", Activation::hardswish}, {"hardsigmoid", Activation::hardsigmoid}};
constexpr std::pair<std::string_view, Pooling> poolings[] = {
    {"none", Pooling::none}, {"max", Pooling::max}, {"average", Pooling::average}};

// The residual's elements, or nullptr.
const void* residual_data(const std::optional<Tensor>& residual, const Tensor& output) {
  if (!residual.has_value()) return nullptr;
  check_operands(*residual, output);
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(residual->size(i) == output.size(i) &&
                        (residual->stride(i) == output.stride(i) || output.size(i) == 1 || output.numel() == 0),
                    "cvfast conv2d: the residual must have the result's sizes and strides");
  return residual->const_data_ptr();
}

Tensor forward_with_epilogue(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& residual, const std::string& activation, double negative_slope,
                             const std::string& pooling, const Ints& stride, const Ints& padding, const Ints& dilation,
                             int64_t groups, const std::optional<Tensor>& packed) {
  check_operands(input, weight);
  Conv2dShape shape = conv2d_shape(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  const Pooling pools = named("pooling", pooling, poolings);
  Ints sizes = output_sizes(shape);
  if (pools != Pooling::none) {
    STD_TORCH_CHECK(!residual.has_value(), "cvfast conv2d: no pooling with a residual");
    sizes[2] /= 2, sizes[3] /= 2;
    STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, "cvfast conv2d: the result is too small to pool 2x2 pixels");
    shape.out_height = 2 * sizes[2], shape.out_width = 2 * sizes[3];
  }
  Tensor keep, output = brief_result(sizes, input, weight);
  const Epilogue epilogue = {named("activation", activation, activations), negative_slope, residual_data(residual, output),
                             pools};
  Kernels::forward({shape, dtype_of(input), tensor4(input), tensor4(weight),
                    bias_data(bias, input, shape.out_channels, keep), tensor4(output), epilogue,
                    packed.has_value() ? packed->const_data_ptr() : nullptr},
                   output);
  return output;
}

Tensor transpose_with_epilogue(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& residual, const std::string& activation, double negative_slope,
                               const Ints& stride, const Ints& padding, const Ints& output_padding, int64_t groups,
                               const Ints& dilation) {
  check_operands(input, weight);
  const Conv2dShape shape =
      transposed_shape(input.sizes(), weight.sizes(), stride, padding, output_padding, groups, dilation);
  Tensor keep, output = brief_result({shape.batch, shape.in_channels, shape.in_height, shape.in_width}, input, weight);
  const Epilogue epilogue = {named("activation", activation, activations), negative_slope, residual_data(residual, output),
                             Pooling::none};
  Kernels::input_grad({shape, dtype_of(input), tensor4(input), tensor4(weight),
                       bias_data(bias, input, shape.in_channels, keep), tensor4(output), epilogue},
                      output);
  return output;
}

// A call of which only the options, the weight and the result's format count.
Conv2dForward call_to_pack_for(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                               const Ints& dilation, int64_t groups) {
  check_operands(input, weight);
  const Conv2dShape shape = conv2d_shape(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  Tensor output = empty_result(output_sizes(shape), input, weight);
  return {shape, dtype_of(input), tensor4(input), tensor4(weight), nullptr, tensor4(output)};
}

// Which form of packed weights the call takes; 0: none that pays.
int64_t packed_form(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
                    int64_t groups) {
  return kernels().conv2d_packing(call_to_pack_for(input, weight, stride, padding, dilation, groups)).form;
}

// The weight in that form; opaque.
Tensor pack(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
            int64_t groups) {
  const Conv2dForward call = call_to_pack_for(input, weight, stride, padding, dilation, groups);
  const int64_t bytes = kernels().conv2d_packing(call).bytes;
  const Tensor packed = empty_contiguous({bytes}, aoti_torch_dtype_uint8());
  if (bytes > 0) kernels().conv2d_pack(call, packed.mutable_data_ptr(), thread_pool());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { implement_conv2d<Operators>(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  implement_conv2d<Operators>(m);
  m.impl("conv2d_epilogue", TORCH_BOX(&forward_with_epilogue));
  m.impl("conv2d_packed_form", TORCH_BOX(&packed_form));
  m.impl("conv2d_pack", TORCH_BOX(&pack));
  m.impl("conv_transpose2d_epilogue", TORCH_BOX(&transpose_with_epilogue));
}
