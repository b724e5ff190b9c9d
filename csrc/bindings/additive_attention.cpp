// Additive attention on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. The schemas are in
// cvfast/ops/additive_attention.py.
#include "cvfast/additive_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/isa.h"
#include "cpu_tensors.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using torch::headeronly::ScalarType;

// The operands, made contiguous, and the problem that points to them.
struct Operands {
  Tensor query, key, weight;
  AdditiveProblem problem = {};

  Operands(const Tensor& q, const Tensor& k, const Tensor& w, const std::optional<Tensor>& mask)
      : query(torch::stable::contiguous(q)), key(torch::stable::contiguous(k)), weight(torch::stable::contiguous(w)) {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && w.dim() == 1,
                    "cvfast additive_weights: query and key must be 3-dimensional, weight 1-dimensional");
    STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(2) == k.size(2) && q.size(2) == w.size(0),
                    "cvfast additive_weights: sizes of query, key and weight do not fit");
    STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == w.scalar_type(),
                    "cvfast additive_weights: query, key and weight must have the same dtype");
    problem.shape = {q.size(0), q.size(1), k.size(1), q.size(2)};
    problem.dtype = dtype_of(q);
    problem.query = query.const_data_ptr(), problem.key = key.const_data_ptr(), problem.weight = weight.const_data_ptr();
    if (!mask.has_value()) return;
    const int64_t full[] = {q.size(0), q.size(1), k.size(1)};
    STD_TORCH_CHECK(mask->dim() == 3 && mask->scalar_type() == ScalarType::Bool,
                    "cvfast additive_weights: mask must be bool and 3-dimensional");
    for (int i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(mask->size(i) == full[i] || mask->size(i) == 1, "cvfast additive_weights: mask has size ",
                      mask->size(i), " at dimension ", i, ", expected ", full[i], " or 1");
      problem.mask_stride[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
    }
    problem.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
  }
};

Tensor weights(const Tensor& query, const Tensor& key, const Tensor& weight, const std::optional<Tensor>& mask) {
  const Operands operands(query, key, weight, mask);
  const AdditiveShape& s = operands.problem.shape;
  const Tensor result = empty_contiguous({s.batch, s.queries, s.keys}, compute_code(query));
  kernels().additive_attention.weights({operands.problem, result.mutable_data_ptr(), nullptr, 0, nullptr, 0}, thread_pool());
  return result;
}

std::tuple<Tensor, Tensor, Tensor> weights_backward(const Tensor& grad, const Tensor& result, const Tensor& query,
                                                    const Tensor& key, const Tensor& weight,
                                                    const std::optional<Tensor>& mask) {
  const Operands operands(query, key, weight, mask);
  const AdditiveShape& s = operands.problem.shape;
  for (const Tensor* tensor : {&grad, &result})
    STD_TORCH_CHECK(tensor->dim() == 3 && tensor->size(0) == s.batch && tensor->size(1) == s.queries &&
                        tensor->size(2) == s.keys && dtype_code(*tensor) == compute_code(query),
                    "cvfast additive_weights: grad_weights and weights must be [B, T, S] of the compute type");
  const Tensor grads = torch::stable::contiguous(grad), results = torch::stable::contiguous(result);
  const Tensor grad_query = empty_contiguous({s.batch, s.queries, s.size}, dtype_code(query));
  const Tensor grad_key = empty_contiguous({s.batch, s.keys, s.size}, dtype_code(query));
  const Tensor grad_weight = empty_contiguous({s.batch, s.size}, compute_code(query));
  kernels().additive_attention.weights_backward(
      {operands.problem, grads.const_data_ptr(), results.const_data_ptr(), grad_query.mutable_data_ptr(),
       grad_key.mutable_data_ptr(), grad_weight.mutable_data_ptr(), false},
      thread_pool());
  return {grad_query, grad_key, grad_weight};
}

template <class Library>
void implement(Library& m) {
  m.impl("additive_weights", TORCH_BOX(&weights));
  m.impl("additive_weights_backward", TORCH_BOX(&weights_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) { implement(m); }
