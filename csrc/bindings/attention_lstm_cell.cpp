// One decode step of a captioner on the CPU, as one call of several kernels. The schema is in cvfast/ops/attention_lstm_cell.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "../cpu/isa.h"
#include "../cpu/sequence_order.h"
#include "cpu_tensors.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using MaybeTensor = std::optional<Tensor>;

// Checked and contiguous; `keep` owns it.
struct Operand {
  Tensor keep;
  Operand(const char* what, const Tensor& tensor, const Tensor& like, const Ints& sizes) {
    STD_TORCH_CHECK(sizes_of(tensor) == sizes, "cvfast attention_lstm_cell: size of ", what, " does not fit the others'");
    STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "cvfast attention_lstm_cell: ", what,
                    " must have the input's dtype");
    keep = torch::stable::contiguous(tensor);
  }
  const void* data() const { return keep.const_data_ptr(); }
};

struct MaybeOperand {
  std::optional<Operand> operand;
  MaybeOperand(const char* what, const MaybeTensor& tensor, const Tensor& like, const Ints& sizes) {
    if (tensor.has_value()) operand.emplace(what, *tensor, like, sizes);
  }
  const void* data() const { return operand ? operand->data() : nullptr; }
};

// [B, A] from rows [B, H] and weight [A, H].
Tensor projected(const Operand& rows, const Operand& weight) {
  const int64_t batch = rows.keep.size(0), depth = rows.keep.size(1), cols = weight.keep.size(0);
  const Tensor result = empty_contiguous({batch, cols}, dtype_code(rows.keep));
  kernels().batched_product.product({1, batch, depth, cols, dtype_of(rows.keep), {rows.data(), {0, depth, 1}},
                                     {weight.data(), {0, depth, 1}}, true, result.mutable_data_ptr()},
                                    thread_pool());
  return result;
}

// [B, I + K]
Tensor joined(const Tensor& left, const Tensor& right) {
  const int64_t batch = left.size(0), size = left.element_size();
  const int64_t left_bytes = left.size(1) * size, right_bytes = right.size(1) * size;
  const Tensor result = empty_contiguous({batch, left.size(1) + right.size(1)}, dtype_code(left));
  char* to = static_cast<char*>(result.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b, to += left_bytes + right_bytes) {
    std::memcpy(to, static_cast<const char*>(left.const_data_ptr()) + b * left_bytes, left_bytes);
    std::memcpy(to + left_bytes, static_cast<const char*>(right.const_data_ptr()) + b * right_bytes, right_bytes);
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step(const Tensor& input, const Tensor& features, const Tensor& values,
                                                const Tensor& h, const Tensor& c, const MaybeTensor& mask,
                                                const Tensor& w_query, const MaybeTensor& v, const Tensor& w_ih,
                                                const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh) {
  STD_TORCH_CHECK(input.dim() == 2 && h.dim() == 2 && features.dim() == 3 && values.dim() == 3,
                  "cvfast attention_lstm_cell: input and states must be 2-dimensional, keys and values 3-dimensional");
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "cvfast attention_lstm_cell: both biases or none");
  const int64_t batch = input.size(0), hidden = h.size(1), keys = features.size(1), size = features.size(2),
                width = values.size(2), inputs = input.size(1) + width;
  const DType dtype = dtype_of(input);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64,
                  "cvfast attention_lstm_cell: there are kernels for float32 and float64");
  const Operand x("input", input, input, {batch, input.size(1)}), k("keys", features, input, {batch, keys, size}),
      e("values", values, input, {batch, keys, width}), h_0("h", h, input, {batch, hidden}),
      c_0("c", c, input, {batch, hidden}), wq("w_query", w_query, input, {size, hidden}),
      wi("w_ih", w_ih, input, {4 * hidden, inputs}), wh("w_hh", w_hh, input, {4 * hidden, hidden});
  const MaybeOperand weight("v", v, input, {size}), bi("b_ih", b_ih, input, {4 * hidden}),
      bh("b_hh", b_hh, input, {4 * hidden});

  const Tensor query = projected(h_0, wq);
  AdditiveProblem problem = {{batch, 1, keys, size}, dtype, query.const_data_ptr(), k.data(), weight.data(),
                             1 / std::sqrt(static_cast<double>(size)), nullptr, {}};
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == torch::headeronly::ScalarType::Bool && sizes_of(*mask) == (Ints{batch, keys}),
                    "cvfast attention_lstm_cell: mask must be bool [B, S]");
    problem.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
    problem.mask_stride[0] = mask->stride(0), problem.mask_stride[2] = mask->stride(1);
  }
  const int32_t code = dtype_code(input);
  const Tensor weights = empty_contiguous({batch, keys}, code), context = empty_contiguous({batch, width}, code);
  kernels().additive_attention.weights({problem, weights.mutable_data_ptr(), e.data(), width, context.mutable_data_ptr()},
                                       thread_pool());

  const Tensor row = joined(x.keep, context);
  const Tensor new_h = empty_contiguous({batch, hidden}, code), new_c = empty_contiguous({batch, hidden}, code);
  const SequenceOrder order = SequenceOrder::uniform(1, batch);
  kernels().recurrent.forward({RecurrentCell::lstm, dtype, order.sequence(false), {inputs, hidden, 0},
                               {wi.data(), wh.data(), bi.data(), bh.data(), nullptr}, {row.const_data_ptr(), 0, inputs},
                               h_0.data(), c_0.data(), {new_h.mutable_data_ptr(), 0, hidden}, new_h.mutable_data_ptr(),
                               new_c.mutable_data_ptr(), nullptr, nullptr},
                              thread_pool());
  return {new_h, new_c, context, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) { m.impl("attention_lstm_cell", TORCH_BOX(&step)); }
