// conv2d and conv_transpose2d on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. Schemas: cvfast/ops.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/huge_pages.h"
#include "../cpu/isa.h"
#include "../cpu/poison.h"
#include "brief_result.h"
#include "conv2d_how.h"
#include "cpu_tensors.h"
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
  // Freed and asked for again at every step.
  static Tensor gradient(const Sizes4& size, const Tensor& first, const Tensor& second) {
    return brief_result(size, first, second);
  }
};

using Operators = Conv2dOperators<Kernels>;

template <class Value, std::size_t Count>
Value named(const char* what, std::string_view name, const Named<Value> (&known)[Count]) {
  const std::optional<Value> value = value_of(name, known);
  STD_TORCH_CHECK(value.has_value(), "cvfast conv2d: unknown ", what, " ", std::string(name));
  return *value;
}

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

// A number that Conv2dHow did not give may name what there is not.
void check_how(const Conv2dHow& how) {
  STD_TORCH_CHECK(how.activation <= Activation::hardsigmoid && how.pooling <= Pooling::average,
                  "cvfast conv2d: unknown activation or pooling");
}

Tensor forward_with_epilogue(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t bits,
                             const std::optional<Tensor>& packed, const std::optional<Tensor>& residual,
                             double negative_slope, bool lasting) {
  const Conv2dHow how = Conv2dHow::unpacked(bits);
  check_how(how);
  check_operands(input, weight);
  Conv2dShape shape = conv2d_shape(input.sizes(), weight.sizes(), how.stride, how.padding, how.dilation, how.groups);
  Sizes4 sizes = output_sizes(shape);
  if (how.pooling != Pooling::none) {
    STD_TORCH_CHECK(!residual.has_value(), "cvfast conv2d: no pooling with a residual");
    sizes[2] /= 2, sizes[3] /= 2;
    STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, "cvfast conv2d: the result is too small to pool 2x2 pixels");
    shape.out_height = 2 * sizes[2], shape.out_width = 2 * sizes[3];
  }
  Tensor keep, output = lasting ? empty_result(sizes, input, weight) : brief_result(sizes, input, weight);
  const Epilogue epilogue = {how.activation, negative_slope, residual_data(residual, output), how.pooling};
  Kernels::forward({shape, dtype_of(input), tensor4(input), tensor4(weight),
                    bias_data(bias, input, shape.out_channels, keep), tensor4(output), epilogue,
                    packed.has_value() ? packed->const_data_ptr() : nullptr},
                   output);
  return output;
}

// The same of no more than these arguments.
template <bool lasting>
Tensor forward_plainly(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t bits) {
  return forward_with_epilogue(input, weight, bias, bits, std::nullopt, std::nullopt, 0, lasting);
}

// From one row of `t` [*, I] to the next, where rows are evenly spaced.
std::optional<int64_t> row_stride(const Tensor& t) {
  std::optional<int64_t> step;
  int64_t rows = 1;
  for (int64_t d = t.dim() - 2; d >= 0; rows *= t.size(d), --d) {
    if (t.size(d) == 1) continue;
    if (!step) step = t.stride(d);
    if (t.stride(d) != *step * rows) return std::nullopt;
  }
  return step.value_or(t.size(t.dim() - 1));
}

// activation(input weight^T + bias + residual) for input [*, I] and weight [O, I]: a 1x1 convolution of one channels_last image
// whose pixels are the rows. The result is contiguous.
Tensor linear(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias, int64_t bits,
              const std::optional<Tensor>& packed, double negative_slope, const std::optional<Tensor>& residual,
              bool lasting) {
  const Conv2dHow how = Conv2dHow::unpacked(bits);
  check_how(how);
  const int64_t dims = given.dim();
  STD_TORCH_CHECK(dims >= 1 && weight.dim() == 2 && given.size(dims - 1) == weight.size(1) && given.numel() > 0 &&
                      weight.size(0) > 0 && given.scalar_type() == weight.scalar_type() && given.device() == weight.device(),
                  "cvfast linear: input and weight do not fit");
  const std::optional<int64_t> step = row_stride(given);
  const Tensor input = step ? given : torch::stable::contiguous(given);
  const int64_t in = weight.size(1), out = weight.size(0), rows = input.numel() / in;
  const int64_t input_step = step.value_or(in), input_one = step ? given.stride(dims - 1) : 1;
  Ints size = sizes_of(given), strides(dims);
  size[dims - 1] = out;
  for (int64_t d = dims - 1, next = 1; d >= 0; next *= size[d], --d) strides[d] = next;
  Tensor keep,
      output = lasting ? empty_contiguous(size, dtype_code(given))
                       : brief_tensor(dims, size.data(), strides.data(), dtype_code(given), rows * out * given.element_size());
  STD_TORCH_CHECK(!residual.has_value() || (sizes_of(*residual) == size && residual->is_contiguous() &&
                                            residual->scalar_type() == given.scalar_type()),
                  "cvfast linear: the residual must be contiguous, of the result's sizes and dtype");
  const Conv2dShape shape = {.batch = 1, .in_channels = in, .in_height = rows, .in_width = 1, .out_channels = out,
                             .out_height = rows, .out_width = 1, .kernel_height = 1, .kernel_width = 1, .stride_h = 1,
                             .stride_w = 1, .padding_h = 0, .padding_w = 0, .dilation_h = 1, .dilation_w = 1, .groups = 1};
  Kernels::forward({shape, dtype_of(input),
                    {input.const_data_ptr(), {rows * input_step, input_one, input_step, input_step}},
                    {weight.const_data_ptr(), {weight.stride(0), weight.stride(1), 1, 1}},
                    bias_data(bias, input, out, keep),
                    {output.mutable_data_ptr(), {rows * out, 1, out, out}},
                    {how.activation, negative_slope, residual.has_value() ? residual->const_data_ptr() : nullptr,
                     Pooling::none},
                    packed.has_value() ? packed->const_data_ptr() : nullptr},
                   output);
  return output;
}

Tensor bias_gradient(const Conv2dShape& shape, const Tensor& grad_output) {
  check_grad_output(grad_output, shape);
  const Tensor result = empty_contiguous({shape.out_channels}, dtype_code(grad_output));
  kernels().conv2d_bias_grad({shape.batch, shape.out_channels, shape.out_height, shape.out_width, dtype_of(grad_output),
                              tensor4(grad_output), result.mutable_data_ptr()},
                             thread_pool());
  return result;
}

// The gradients to input, weight and bias, those that are needed, of the result of a call without an epilogue.
std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> gradients(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, int64_t bits, bool needs_input, bool needs_weight,
    bool needs_bias) {
  const Conv2dHow how = Conv2dHow::unpacked(bits);
  check_operands(input, weight);
  const Conv2dShape shape =
      conv2d_shape(input.sizes(), weight.sizes(), how.stride, how.padding, how.dilation, how.groups);
  std::optional<Tensor> grad_input, grad_weight, grad_bias;
  if (needs_input) grad_input = Operators::input_grad(shape, grad_output, weight);
  if (needs_weight) grad_weight = Operators::weight_grad(shape, grad_output, input);
  if (needs_bias) grad_bias = bias_gradient(shape, grad_output);
  return {grad_input, grad_weight, grad_bias};
}

Tensor transpose_with_epilogue(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& residual, const std::string& activation, double negative_slope,
                               const Ints& stride, const Ints& padding, const Ints& output_padding, int64_t groups,
                               const Ints& dilation, const std::optional<Tensor>& packed) {
  check_operands(input, weight);
  const Conv2dShape shape =
      transposed_shape(input.sizes(), weight.sizes(), stride, padding, output_padding, groups, dilation);
  Tensor keep, output = brief_result({shape.batch, shape.in_channels, shape.in_height, shape.in_width}, input, weight);
  const Epilogue epilogue = {named("activation", activation, activations), negative_slope, residual_data(residual, output),
                             Pooling::none};
  Kernels::input_grad({shape, dtype_of(input), tensor4(input), tensor4(weight),
                       bias_data(bias, input, shape.in_channels, keep), tensor4(output), epilogue,
                       packed.has_value() ? packed->const_data_ptr() : nullptr},
                      output);
  return output;
}

// A call of which only the options, the weight and the result's format count.
Conv2dForward call_to_pack_for(const Tensor& input, const Tensor& weight, int64_t bits) {
  check_operands(input, weight);
  const Conv2dHow how = Conv2dHow::unpacked(bits);
  const Conv2dShape shape =
      conv2d_shape(input.sizes(), weight.sizes(), how.stride, how.padding, how.dilation, how.groups);
  Tensor output = empty_result(output_sizes(shape), input, weight);
  return {shape, dtype_of(input), tensor4(input), tensor4(weight), nullptr, tensor4(output)};
}

// Which form of packed weights the call takes; 0: none that pays.
int64_t packed_form(const Tensor& input, const Tensor& weight, int64_t how) {
  return kernels().conv2d_packing(call_to_pack_for(input, weight, how)).form;
}

// Room for the weight in a form; opaque.
Tensor packed_tensor(int64_t bytes) { return empty_contiguous({bytes}, aoti_torch_dtype_uint8()); }

// The weight in that form.
Tensor pack(const Tensor& input, const Tensor& weight, int64_t how) {
  const Conv2dForward call = call_to_pack_for(input, weight, how);
  const int64_t bytes = kernels().conv2d_packing(call).bytes;
  const Tensor packed = packed_tensor(bytes);
  if (bytes > 0) kernels().conv2d_pack(call, packed.mutable_data_ptr(), thread_pool());
  return packed;
}

// The same three of transposed convolutions.
Conv2dInputGrad transposed_call_to_pack_for(const Tensor& input, const Tensor& weight, const Ints& stride,
                                            const Ints& padding, const Ints& output_padding, int64_t groups,
                                            const Ints& dilation) {
  check_operands(input, weight);
  const Conv2dShape shape =
      transposed_shape(input.sizes(), weight.sizes(), stride, padding, output_padding, groups, dilation);
  Tensor output = empty_result({shape.batch, shape.in_channels, shape.in_height, shape.in_width}, input, weight);
  return {shape, dtype_of(input), tensor4(input), tensor4(weight), nullptr, tensor4(output)};
}

// Negative: the same weight may be conv2d's, too.
int64_t transposed_packed_form(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                               const Ints& output_padding, int64_t groups, const Ints& dilation) {
  return -kernels()
              .conv2d_input_grad_packing(
                  transposed_call_to_pack_for(input, weight, stride, padding, output_padding, groups, dilation))
              .form;
}

Tensor transposed_pack(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                       const Ints& output_padding, int64_t groups, const Ints& dilation) {
  const Conv2dInputGrad call =
      transposed_call_to_pack_for(input, weight, stride, padding, output_padding, groups, dilation);
  const int64_t bytes = kernels().conv2d_input_grad_packing(call).bytes;
  const Tensor packed = packed_tensor(bytes);
  if (bytes > 0) kernels().conv2d_input_grad_pack(call, packed.mutable_data_ptr(), thread_pool());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { implement_conv2d<Operators>(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  implement_conv2d<Operators>(m);
  m.impl("conv2d_epilogue", TORCH_BOX(&forward_with_epilogue));
  m.impl("conv2d_epilogue.plain", TORCH_BOX(&forward_plainly<false>));
  m.impl("conv2d_epilogue.lasting", TORCH_BOX(&forward_plainly<true>));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("conv2d_gradients", TORCH_BOX(&gradients));
  m.impl("conv2d_packed_form", TORCH_BOX(&packed_form));
  m.impl("conv2d_pack", TORCH_BOX(&pack));
  m.impl("conv_transpose2d_epilogue", TORCH_BOX(&transpose_with_epilogue));
  m.impl("conv_transpose2d_packed_form", TORCH_BOX(&transposed_packed_form));
  m.impl("conv_transpose2d_pack", TORCH_BOX(&transposed_pack));
}
