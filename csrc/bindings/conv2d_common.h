// What the CPU's and the GPU's bindings of conv2d share: checks, shapes, allocation. No loops over elements.
#pragma once
#include <array>
#include <iterator>

#include "cvfast/conv2d.h"
#include "tensor_common.h"

namespace cvfast {

// The twin of is_channels_last in cvfast/ops/conv2d.py: where both formats fit, the strides say which is meant.
inline bool is_channels_last(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  auto strides = tensor.strides();
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (sizes[dim] == 1) continue;
    if (strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  if (!tensor.is_contiguous()) return true;
  return sizes[1] * sizes[2] * sizes[3] > 1 && strides[1] == 1 && strides[3] == sizes[1];
}

using Sizes4 = std::array<int64_t, 4>;

// How a result [N, C, H, W] of first's dtype and device lies in memory, in the format that the operands ask for.
struct ResultLayout {
  Sizes4 size;
  int64_t strides[4];
  int32_t dtype, device_type, device_index;

  ResultLayout(const Sizes4& sizes, const Tensor& first, const Tensor& second) : size(sizes) {
    const int64_t c = size[1], h = size[2], w = size[3];
    auto at_least_1 = [](int64_t extent) { return extent > 0 ? extent : 1; };
    const int64_t width = at_least_1(w), plane = at_least_1(h) * width;
    if (is_channels_last(first) || is_channels_last(second))
      strides[0] = h * w * c, strides[1] = 1, strides[2] = w * c, strides[3] = c;
    else
      strides[0] = at_least_1(c) * plane, strides[1] = plane, strides[2] = width, strides[3] = 1;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(first.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(first.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(first.get(), &device_index));
  }

  int64_t elements() const { return size[0] * size[1] * size[2] * size[3]; }
};

// An uninitialised result. The C function is called directly because torch::stable::empty costs more than the rest of the
// binding.
inline Tensor empty_result(const ResultLayout& r) {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, r.size.data(), r.strides, r.dtype, r.device_type, r.device_index, &result));
  return Tensor(result);
}
inline Tensor empty_result(const Sizes4& size, const Tensor& first, const Tensor& second) {
  return empty_result(ResultLayout(size, first, second));
}

// The operators can be called without cvfast.functional, so what would make a kernel leave its memory is checked here.
inline void check_operands(const Tensor& first, const Tensor& second) {
  STD_TORCH_CHECK(first.dim() == 4 && second.dim() == 4, "cvfast conv2d: operands must be 4-dimensional");
  STD_TORCH_CHECK(first.scalar_type() == second.scalar_type(), "cvfast conv2d: operands must have the same dtype");
  STD_TORCH_CHECK(first.device() == second.device(), "cvfast conv2d: operands must be on the same device");
}

inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(kernel >= 1 && span >= 0, "cvfast conv2d: the kernel is empty or larger than the padded input");
  return span / stride + 1;
}

// `Pair`: anything indexable that knows its size.
template <class Pair>
void check_options(const Pair& stride, const Pair& padding, const Pair& dilation) {
  STD_TORCH_CHECK(std::size(stride) == 2 && std::size(padding) == 2 && std::size(dilation) == 2,
                  "cvfast conv2d: stride, padding and dilation must have 2 numbers each");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                    "cvfast conv2d: stride and dilation must be positive, padding must not be negative");
}

// From the sizes [N, C, H, W] of the input and [K, C/groups, R, S] of the weight.
template <class InputSizes, class WeightSizes, class Pair>
Conv2dShape conv2d_shape(const InputSizes& input, const WeightSizes& weight, const Pair& stride, const Pair& padding,
                         const Pair& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.size() == 4 && weight.size() == 4, "cvfast conv2d: sizes must have 4 numbers");
  check_options(stride, padding, dilation);
  STD_TORCH_CHECK(groups >= 1 && weight[0] % groups == 0 && input[1] == weight[1] * groups,
                  "cvfast conv2d: groups and channels do not fit");
  return {
      .batch = input[0],
      .in_channels = input[1], .in_height = input[2], .in_width = input[3],
      .out_channels = weight[0],
      .out_height = output_size(input[2], weight[2], stride[0], padding[0], dilation[0]),
      .out_width = output_size(input[3], weight[3], stride[1], padding[1], dilation[1]),
      .kernel_height = weight[2], .kernel_width = weight[3],
      .stride_h = stride[0], .stride_w = stride[1],
      .padding_h = padding[0], .padding_w = padding[1],
      .dilation_h = dilation[0], .dilation_w = dilation[1],
      .groups = groups,
  };
}

// The convolution whose gradient to the input the transposed convolution is: of its output [N, K, H, W], K = weight[1] *
// groups, to its input [N, C, P, Q]. Where output_padding reaches over a stride, that input ends before the convolution's
// output does.
template <class Sizes>
Conv2dShape transposed_shape(const Sizes& input, const Sizes& weight, const Ints& stride, const Ints& padding,
                             const Ints& output_padding, int64_t groups, const Ints& dilation) {
  check_options(stride, padding, dilation);
  STD_TORCH_CHECK(output_padding.size() == 2 && output_padding[0] >= 0 && output_padding[1] >= 0,
                  "cvfast conv_transpose2d: output_padding must have 2 numbers, not negative");
  STD_TORCH_CHECK(input[1] == weight[0] && input[2] >= 1 && input[3] >= 1,
                  "cvfast conv_transpose2d: the input has no pixels, or not the channels of the weight");
  Ints output = {input[0], weight[1] * groups, 0, 0};
  for (int i = 0; i < 2; ++i)
    output[i + 2] = (input[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight[i + 2] - 1) + output_padding[i] + 1;
  STD_TORCH_CHECK(output[2] >= 1 && output[3] >= 1, "cvfast conv_transpose2d: the padding leaves no output");
  Conv2dShape shape = conv2d_shape(output, weight, stride, padding, dilation, groups);
  shape.out_height = input[2], shape.out_width = input[3];
  return shape;
}

inline Sizes4 output_sizes(const Conv2dShape& shape) {
  return {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
}

inline void check_grad_output(const Tensor& grad_output, const Conv2dShape& shape) {
  const Sizes4 expected = output_sizes(shape);
  auto sizes = grad_output.sizes();
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(sizes[i] == expected[i], "cvfast conv2d: grad_output has size ", sizes[i], " at dimension ", i,
                    ", expected ", expected[i]);
}

// bias [K] as a contiguous array of first's dtype, or nullptr; `keep` owns it where it is a copy.
inline const void* bias_data(const std::optional<Tensor>& bias, const Tensor& first, int64_t channels, Tensor& keep) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, "cvfast conv2d: bias must have ", channels, " elements");
  STD_TORCH_CHECK(bias->scalar_type() == first.scalar_type() && bias->device() == first.device(),
                  "cvfast conv2d: bias must have the input's dtype and device");
  if (bias->is_contiguous()) return bias->const_data_ptr();
  keep = torch::stable::contiguous(*bias);
  return keep.const_data_ptr();
}

// The operators on one device. `Kernels` gives `static void forward(const Conv2dForward&, const Tensor& result)`,
// input_grad and weight_grad (the result says on which device to run), and `static Tensor gradient(const Sizes4& size, const
// Tensor& first, const Tensor& second)`, an uninitialised one.
template <class Kernels>
struct Conv2dOperators {
  static Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                        const Ints& padding, const Ints& dilation, int64_t groups) {
    check_operands(input, weight);
    Conv2dShape shape = conv2d_shape(input.sizes(), weight.sizes(), stride, padding, dilation, groups);
    Tensor keep, output = empty_result(output_sizes(shape), input, weight);
    const void* bias_pointer = bias_data(bias, input, shape.out_channels, keep);
    Kernels::forward({shape, dtype_of(input), tensor4(input), tensor4(weight), bias_pointer, tensor4(output)}, output);
    return output;
  }

  static Tensor input_gradient(const Tensor& grad_output, const Tensor& weight, const Ints& input_size, const Ints& stride,
                               const Ints& padding, const Ints& dilation, int64_t groups) {
    return input_grad(conv2d_shape(input_size, weight.sizes(), stride, padding, dilation, groups), grad_output, weight);
  }
  static Tensor input_grad(const Conv2dShape& shape, const Tensor& grad_output, const Tensor& weight) {
    check_operands(grad_output, weight);
    check_grad_output(grad_output, shape);
    Tensor grad_input =
        Kernels::gradient({shape.batch, shape.in_channels, shape.in_height, shape.in_width}, grad_output, weight);
    Kernels::input_grad({shape, dtype_of(weight), tensor4(grad_output), tensor4(weight), nullptr, tensor4(grad_input)},
                        grad_input);
    return grad_input;
  }

  static Tensor transpose(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                          const Ints& padding, const Ints& output_padding, int64_t groups, const Ints& dilation) {
    check_operands(input, weight);
    Conv2dShape shape =
        transposed_shape(input.sizes(), weight.sizes(), stride, padding, output_padding, groups, dilation);
    Tensor keep, output = empty_result({shape.batch, shape.in_channels, shape.in_height, shape.in_width}, input, weight);
    const void* bias_pointer = bias_data(bias, input, shape.in_channels, keep);
    Kernels::input_grad({shape, dtype_of(input), tensor4(input), tensor4(weight), bias_pointer, tensor4(output)}, output);
    return output;
  }

  static Tensor weight_gradient(const Tensor& grad_output, const Tensor& input, const Ints& weight_size, const Ints& stride,
                                const Ints& padding, const Ints& dilation, int64_t groups) {
    return weight_grad(conv2d_shape(input.sizes(), weight_size, stride, padding, dilation, groups), grad_output, input);
  }
  static Tensor weight_grad(const Conv2dShape& shape, const Tensor& grad_output, const Tensor& input) {
    check_operands(grad_output, input);
    check_grad_output(grad_output, shape);
    Tensor grad_weight = Kernels::gradient(
        {shape.out_channels, shape.in_channels / shape.groups, shape.kernel_height, shape.kernel_width}, grad_output, input);
    Kernels::weight_grad({shape, dtype_of(input), tensor4(grad_output), tensor4(input), tensor4(grad_weight)}, grad_weight);
    return grad_weight;
  }
};

// Registers the operators in a namespace; both cvfast and its twin without derivatives have them (cvfast/ops/card.py).
template <class Operators, class Library>
void implement_conv2d(Library& m) {
  m.impl("conv2d", TORCH_BOX(&Operators::forward));
  m.impl("conv2d_input_grad", TORCH_BOX(&Operators::input_gradient));
  m.impl("conv2d_weight_grad", TORCH_BOX(&Operators::weight_gradient));
  m.impl("conv_transpose2d", TORCH_BOX(&Operators::transpose));
}

}  // namespace cvfast
