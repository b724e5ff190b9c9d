// attention on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. The schemas are in cvfast/ops/attention.py.
#include "cvfast/attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../cpu/isa.h"
#include "brief_result.h"
#include "cpu_tensors.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t no_limit = std::numeric_limits<int64_t>::max();  // of a window's side

void check_size(const char* what, const Tensor& tensor, const Ints& expected) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(expected.size()), "cvfast attention: ", what, " must be ",
                  expected.size(), "-dimensional");
  for (size_t i = 0; i < expected.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == expected[i], "cvfast attention: ", what, " has size ", tensor.size(i), " at dimension ",
                    i, ", expected ", expected[i]);
}

// A mask or bias [B or 1, H or 1, L or 1, S or 1]: stride 0 where it is broadcast.
ConstTensor4 broadcast4(const char* what, const Tensor& tensor, const Ints& full) {
  STD_TORCH_CHECK(tensor.dim() == 4, "cvfast attention: ", what, " must be 4-dimensional");
  ConstTensor4 result = {tensor.const_data_ptr(), {}};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(tensor.size(i) == full[i] || tensor.size(i) == 1, "cvfast attention: ", what, " has size ",
                    tensor.size(i), " at dimension ", i, ", expected ", full[i], " or 1");
    result.stride[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
  }
  return result;
}

// The arguments that forward and backward share; `keep` owns what had to be made contiguous.
struct Arguments {
  const Tensor &query, &key, &value;
  const MaybeTensor &bias, &mask, &key_lengths, &seed;
  double dropout_p;
  std::optional<double> scale;
  int64_t left, right;

  AttentionProblem problem(Tensor& keep) const {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "cvfast attention: query, key and value must be 4-dimensional");
    AttentionProblem p = {};
    p.shape = {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)};
    const AttentionShape& s = p.shape;
    check_size("key", key, {s.batch, s.key_heads, s.keys, s.size});
    check_size("value", value, {s.batch, s.key_heads, s.keys, s.value_size});
    STD_TORCH_CHECK(s.key_heads > 0 ? s.heads % s.key_heads == 0 : s.heads == 0, "cvfast attention: ", s.heads,
                    " heads of queries do not divide among ", s.key_heads, " of keys");
    STD_TORCH_CHECK(query.scalar_type() == key.scalar_type() && query.scalar_type() == value.scalar_type(),
                    "cvfast attention: query, key and value must have the same dtype");
    STD_TORCH_CHECK(left >= 0 && right >= 0, "cvfast attention: left and right must not be negative");
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1 && (dropout_p == 0 || seed.has_value()),
                    "cvfast attention: dropout_p must be from 0 to 1, with a seed where it isn't 0");
    p.dtype = dtype_of(query);
    p.query = tensor4(query), p.key = tensor4(key), p.value = tensor4(value);
    p.scale = scale.value_or(1 / std::sqrt(static_cast<double>(std::max<int64_t>(s.size, 1))));
    const Ints full = {s.batch, s.heads, s.queries, s.keys};
    if (bias.has_value()) p.bias = broadcast4("bias", *bias, full), p.bias_dtype = dtype_of(*bias);
    const int64_t most = std::max(s.queries, s.keys);  // a window this wide hides nothing
    p.visible.left = std::min(left, most), p.visible.right = std::min(right, most);
    if (mask.has_value()) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "cvfast attention: mask must be bool");
      p.visible.mask = broadcast4("mask", *mask, full);
    }
    if (key_lengths.has_value()) {
      check_size("key_lengths", *key_lengths, {s.batch});
      STD_TORCH_CHECK(key_lengths->scalar_type() == ScalarType::Long, "cvfast attention: key_lengths must be int64");
      keep = torch::stable::contiguous(*key_lengths);
      p.visible.key_lengths = static_cast<const int64_t*>(keep.const_data_ptr());
    }
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "cvfast attention: seed must be one int64");
      p.dropout = {dropout_p, static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()))};
    }
    return p;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& bias,
                                   const MaybeTensor& mask, const MaybeTensor& key_lengths, const MaybeTensor& seed,
                                   double dropout_p, std::optional<double> scale, int64_t left, int64_t right) {
  Tensor keep;
  const AttentionProblem p =
      Arguments{query, key, value, bias, mask, key_lengths, seed, dropout_p, scale, left, right}.problem(keep);
  const AttentionShape& s = p.shape;
  Tensor output = s.value_size == s.size
                      ? dense_like(query)
                      : empty_contiguous({s.batch, s.heads, s.queries, s.value_size}, dtype_code(query));
  const Tensor log_sum = empty_contiguous({s.batch, s.heads, s.queries}, compute_code(query));
  kernels().attention.forward({p, tensor4(output), log_sum.mutable_data_ptr()}, thread_pool());
  return {output, log_sum};
}

// Of queries, keys and values of one size, for results without derivatives.
Tensor plainly(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<double> scale, int64_t right) {
  Tensor keep;
  const MaybeTensor none;
  const AttentionProblem p = Arguments{query, key, value, none, none, none, none, 0, scale, no_limit, right}.problem(keep);
  STD_TORCH_CHECK(p.shape.size == p.shape.value_size, "cvfast attention: values must be as long as queries");
  Tensor output = query.is_contiguous() ? brief_contiguous(sizes_of(query), query) : dense_like(query);
  kernels().attention.forward({p, tensor4(output), nullptr}, thread_pool());
  return output;
}

// Checks a tensor [B, H, L] of the compute type; `keep` owns a contiguous one.
const void* row_data(const char* what, const Tensor& rows, const AttentionShape& s, int32_t dtype, Tensor& keep) {
  check_size(what, rows, {s.batch, s.heads, s.queries});
  STD_TORCH_CHECK(dtype_code(rows) == dtype, "cvfast attention: ", what, " must be of the compute type");
  keep = torch::stable::contiguous(rows);
  return keep.const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const MaybeTensor& grad_log_sum, const Tensor& output, const Tensor& log_sum,
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& bias, const MaybeTensor& mask,
    const MaybeTensor& key_lengths, const MaybeTensor& seed, double dropout_p, std::optional<double> scale, int64_t left, int64_t right,
    bool bias_grad) {
  Tensor keep, keep_sum, keep_grad_sum;
  const AttentionProblem p =
      Arguments{query, key, value, bias, mask, key_lengths, seed, dropout_p, scale, left, right}.problem(keep);
  const AttentionShape& s = p.shape;
  for (const Tensor* tensor : {&grad_output, &output}) {
    check_size("output", *tensor, {s.batch, s.heads, s.queries, s.value_size});
    STD_TORCH_CHECK(tensor->scalar_type() == query.scalar_type(), "cvfast attention: output must have the query's dtype");
  }
  STD_TORCH_CHECK(!bias_grad || bias.has_value(), "cvfast attention: there is no bias to differentiate by");
  Tensor grads[] = {dense_like(query), dense_like(key), dense_like(value)};
  const Ints bias_size = bias_grad ? sizes_of(*bias) : Ints{0, 0, 0, 0};
  const Tensor grad_bias = empty_contiguous(bias_size, compute_code(query));
  AttentionBackward args = {
      .problem = p,
      .output = tensor4(output),
      .log_sum = row_data("log_sum", log_sum, s, compute_code(query), keep_sum),
      .grad_output = tensor4(grad_output),
      .grad_log_sum = grad_log_sum.has_value()
                          ? row_data("grad_log_sum", *grad_log_sum, s, compute_code(query), keep_grad_sum)
                          : nullptr,
      .grad_query = tensor4(grads[0]), .grad_key = tensor4(grads[1]), .grad_value = tensor4(grads[2]),
      .grad_bias = bias_grad ? grad_bias.mutable_data_ptr() : nullptr,
      .grad_bias_size = {bias_size[0], bias_size[1], bias_size[2], bias_size[3]},
  };
  kernels().attention.backward(args, thread_pool());
  return {grads[0], grads[1], grads[2], grad_bias};
}

template <class Library>
void implement(Library& m) {
  m.impl("attention", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  implement(m);
  m.impl("attention.plain", TORCH_BOX(&plainly));
}
