// Self-attention with its projections on the CPU, as one call of several kernels. The schema is in cvfast/ops/self_attention.py.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../cpu/isa.h"
#include "brief_tensor.h"
#include "conv2d_common.h"
#include "cpu_tensors.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using MaybeTensor = std::optional<Tensor>;

Tensor brief_contiguous(int64_t batch, int64_t length, int64_t features, const Tensor& like) {
  const int64_t sizes[] = {batch, length, features}, strides[] = {length * features, features, 1};
  return prepared(brief_tensor(3, sizes, strides, dtype_code(like), batch * length * features * like.element_size()));
}

// [N, L, O] from contiguous rows [N, L, I], weight [O, I] and bias [O]: a 1x1 convolution of one image whose pixels are the rows.
Tensor projected(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed) {
  const int64_t in = weight.size(1), out = weight.size(0), rows = input.size(0) * input.size(1);
  const Ints one = {1, 1}, none = {0, 0};
  const Conv2dShape shape = conv2d_shape(Ints{1, in, rows, 1}, Ints{out, in, 1, 1}, one, none, one, 1);
  const Tensor result = brief_contiguous(input.size(0), input.size(1), out, input);
  Tensor keep;
  kernels().conv2d_forward({shape, dtype_of(input), {input.const_data_ptr(), {rows * in, 1, in, in}},
                            {weight.const_data_ptr(), {weight.stride(0), weight.stride(1), 1, 1}},
                            bias_data(bias, input, out, keep), {result.mutable_data_ptr(), {rows * out, 1, out, out}}, {},
                            packed.has_value() ? packed->const_data_ptr() : nullptr},
                           thread_pool());
  return result;
}

// [N, L, E] from query, key and value side by side [N, L, 3 E].
Tensor attended(const Tensor& projections, int64_t heads) {
  const int64_t batch = projections.size(0), length = projections.size(1), width = projections.size(2), features = width / 3,
                size = features / heads;
  auto operand = [&](int64_t which) -> ConstTensor4 {
    const char* data = static_cast<const char*>(projections.const_data_ptr());
    return {data + which * features * projections.element_size(), {length * width, size, width, 1}};
  };
  AttentionProblem p = {};
  p.shape = {batch, heads, heads, length, length, size, size};
  p.dtype = dtype_of(projections);
  p.query = operand(0), p.key = operand(1), p.value = operand(2);
  p.scale = 1 / std::sqrt(static_cast<double>(size));
  p.visible.left = p.visible.right = length;
  const Tensor result = brief_contiguous(batch, length, features, projections);
  const Tensor log_sum = empty_contiguous({batch, heads, length}, compute_code(projections));
  kernels().attention.forward({p, {result.mutable_data_ptr(), {length * features, size, features, 1}},
                               log_sum.mutable_data_ptr()},
                              thread_pool());
  return result;
}

Tensor self_attention(const Tensor& input, const Tensor& in_weight, const MaybeTensor& in_bias, const Tensor& out_weight,
                      const MaybeTensor& out_bias, int64_t heads, const MaybeTensor& packed_in, const MaybeTensor& packed_out) {
  STD_TORCH_CHECK(input.dim() == 3 && in_weight.dim() == 2 && out_weight.dim() == 2 && input.is_contiguous(),
                  "cvfast self_attention: input must be [N, L, E], contiguous, and weights 2-dimensional");
  const int64_t features = out_weight.size(1);
  STD_TORCH_CHECK(in_weight.size(1) == input.size(2) && in_weight.size(0) == 3 * features && heads > 0 && features > 0 &&
                      features % heads == 0,
                  "cvfast self_attention: sizes of input, weights and heads do not fit");
  for (const Tensor* weight : {&in_weight, &out_weight})
    STD_TORCH_CHECK(weight->scalar_type() == input.scalar_type() && weight->device() == input.device(),
                    "cvfast self_attention: weights must have the input's dtype and device");
  return projected(attended(projected(input, in_weight, in_bias, packed_in), heads), out_weight, out_bias, packed_out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) { m.impl("self_attention", TORCH_BOX(&self_attention)); }
