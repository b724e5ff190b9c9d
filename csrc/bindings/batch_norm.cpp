// Batch normalisation in training on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. The schemas are in
// cvfast/ops/batch_norm.py.
#include "cvfast/batch_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/isa.h"
#include "brief_result.h"
#include "cpu_tensors.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using torch::headeronly::ScalarType;

Sizes4 sizes4(const Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }

// The data of a dense f32 image of these sizes in this format.
const float* image(const Tensor& t, const Sizes4& sizes, bool channels_last) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float, "cvfast batch_norm: images must be float32 [N, C, H, W]");
  const auto strides = t.strides();
  int64_t expected = 1;
  for (int i = 0; i < 4; ++i) {
    const int dim = channels_last ? (i == 0 ? 1 : i == 3 ? 0 : 4 - i) : 3 - i;
    STD_TORCH_CHECK(t.size(dim) == sizes[dim], "cvfast batch_norm: an image has size ", t.size(dim), " at dimension ", dim,
                    ", expected ", sizes[dim]);
    STD_TORCH_CHECK(sizes[dim] == 1 || strides[dim] == expected, "cvfast batch_norm: images must lie densely, all in one format");
    expected *= sizes[dim];
  }
  return static_cast<const float*>(t.const_data_ptr());
}

const float* numbers(const std::optional<Tensor>& t, int64_t count) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == count && t->scalar_type() == ScalarType::Float && t->is_contiguous(),
                  "cvfast batch_norm: weight and bias must be float32 of the size of the channels");
  return static_cast<const float*>(t->const_data_ptr());
}

BatchNormProblem problem(const Tensor& input, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, double negative_slope, bool pooled) {
  STD_TORCH_CHECK(input.dim() == 4 && input.numel() > 0, "cvfast batch_norm: the input must be [N, C, H, W] and not empty");
  const Sizes4 sizes = sizes4(input);
  const bool channels_last = is_channels_last(input);
  STD_TORCH_CHECK(!pooled || (!residual.has_value() && sizes[2] % 2 == 0 && sizes[3] % 2 == 0),
                  "cvfast batch_norm: pooled are images of even sizes, without a residual");
  return {.batch = sizes[0], .channels = sizes[1], .height = sizes[2], .width = sizes[3],
          .channels_last = channels_last, .pooled = pooled,
          .input = image(input, sizes, channels_last),
          .residual = residual.has_value() ? image(*residual, sizes, channels_last) : nullptr,
          .weight = numbers(weight, sizes[1]), .bias = numbers(bias, sizes[1]),
          .negative_slope = static_cast<float>(negative_slope)};
}

Sizes4 output_sizes(const BatchNormProblem& p) {
  const int64_t step = p.pooled ? 2 : 1;
  return {p.batch, p.channels, p.height / step, p.width / step};
}

float* data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> forward(const Tensor& input, const std::optional<Tensor>& residual,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                   double negative_slope, bool pooled) {
  const BatchNormProblem p = problem(input, residual, weight, bias, negative_slope, pooled);
  const Tensor output = prepared(empty_result(output_sizes(p), input, input));
  const Tensor statistics = empty_contiguous({3, p.channels}, aoti_torch_dtype_float32());
  kernels().batch_norm.forward({p, eps, data(output), data(statistics)}, thread_pool());
  return {output, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input,
                                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& output, const Tensor& statistics,
                                                    double negative_slope, bool pooled) {
  const BatchNormProblem p = problem(input, output, weight, bias, negative_slope, pooled);
  STD_TORCH_CHECK(statistics.numel() == 3 * p.channels && statistics.is_contiguous() &&
                      statistics.scalar_type() == ScalarType::Float,
                  "cvfast batch_norm: statistics must be float32 [3, C]");
  const Tensor grad_input = prepared(brief_result(sizes4(input), input, input));
  const bool added = output.has_value();
  const Tensor grad_residual = added ? prepared(brief_result(sizes4(input), input, input))
                                     : empty_contiguous({0}, aoti_torch_dtype_float32());
  const Tensor grad_weight = empty_contiguous({p.channels}, aoti_torch_dtype_float32());
  const Tensor grad_bias = empty_contiguous({p.channels}, aoti_torch_dtype_float32());
  kernels().batch_norm.backward(
      {p, static_cast<const float*>(statistics.const_data_ptr()), image(grad, output_sizes(p), p.channels_last),
       data(grad_input), added ? data(grad_residual) : nullptr, data(grad_weight), data(grad_bias)},
      thread_pool());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&forward));
  m.impl("batch_norm_backward", TORCH_BOX(&backward));
}
