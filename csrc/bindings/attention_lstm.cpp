// A captioner's decoder on the CPU, attention by h and an LSTM cell on [input, context], step after step: one call of many
// kernels, and its derivative another. The schemas are in cvfast/ops/attention_lstm.py.
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

// Checked and contiguous.
Tensor operand(const char* what, const Tensor& tensor, const Tensor& like, const Ints& sizes) {
  STD_TORCH_CHECK(sizes_of(tensor) == sizes, "cvfast attention_lstm: size of ", what, " does not fit the others'");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "cvfast attention_lstm: ", what, " must have the input's dtype");
  return torch::stable::contiguous(tensor);
}

MaybeTensor operand(const char* what, const MaybeTensor& tensor, const Tensor& like, const Ints& sizes) {
  return tensor.has_value() ? MaybeTensor(operand(what, *tensor, like, sizes)) : tensor;
}

const void* data_of(const MaybeTensor& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }

// Where step t begins in a contiguous tensor [T, ...].
char* at_step(const Tensor& tensor, int64_t t) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + t * tensor.stride(0) * tensor.element_size();
}

struct Operands {
  Tensor input, keys, values, h, c;  // [T, B, I] or one step's [B, I], [B, S, A], [B, S, K], [B, H], [B, H]
  MaybeTensor mask;                  // [B, S]
  Tensor w_query;                    // [A, H]
  MaybeTensor v;                     // [A]
  Tensor w_ih, w_hh;                 // [4 H, I + K], [4 H, H]
  MaybeTensor b_ih, b_hh;            // [4 H]
  int64_t steps, batch, inputs, hidden, places, size, width;  // T, B, I, H, S, A, K
  int64_t row, element;              // I + K; bytes of an element
  DType dtype;

  Operands(const Tensor& input, const Tensor& keys, const Tensor& values, const Tensor& h, const Tensor& c,
           const MaybeTensor& mask, const Tensor& w_query, const MaybeTensor& v, const Tensor& w_ih, const Tensor& w_hh,
           const MaybeTensor& b_ih, const MaybeTensor& b_hh)
      : input(torch::stable::contiguous(input)), mask(mask) {
    STD_TORCH_CHECK((input.dim() == 2 || input.dim() == 3) && h.dim() == 2 && keys.dim() == 3 && values.dim() == 3,
                    "cvfast attention_lstm: states must be 2-dimensional, keys and values 3-dimensional");
    STD_TORCH_CHECK(input.size(0) > 0 || input.dim() == 2, "cvfast attention_lstm: there must be a step");
    STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "cvfast attention_lstm: both biases or none");
    const int64_t last = input.dim() - 1;
    steps = last == 2 ? input.size(0) : 1, batch = input.size(last - 1), inputs = input.size(last), hidden = h.size(1);
    places = keys.size(1), size = keys.size(2), width = values.size(2);
    row = inputs + width, element = input.element_size(), dtype = dtype_of(input);
    STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "cvfast attention_lstm: there are kernels for float32 and float64");
    this->keys = operand("keys", keys, input, {batch, places, size});
    this->values = operand("values", values, input, {batch, places, width});
    this->h = operand("h", h, input, {batch, hidden});
    this->c = operand("c", c, input, {batch, hidden});
    this->w_query = operand("w_query", w_query, input, {size, hidden});
    this->v = operand("v", v, input, {size});
    this->w_ih = operand("w_ih", w_ih, input, {4 * hidden, row});
    this->w_hh = operand("w_hh", w_hh, input, {4 * hidden, hidden});
    this->b_ih = operand("b_ih", b_ih, input, {4 * hidden});
    this->b_hh = operand("b_hh", b_hh, input, {4 * hidden});
    if (mask.has_value())
      STD_TORCH_CHECK(mask->scalar_type() == torch::headeronly::ScalarType::Bool && sizes_of(*mask) == (Ints{batch, places}),
                      "cvfast attention_lstm: mask must be bool [B, S]");
  }

  Tensor empty(const Ints& sizes) const { return empty_contiguous(sizes, dtype_code(input)); }
  RecurrentShape cell_shape() const { return {row, hidden, 0}; }
  RecurrentWeights cell_weights() const {
    return {w_ih.const_data_ptr(), w_hh.const_data_ptr(), data_of(b_ih), data_of(b_hh), nullptr};
  }
  AdditiveProblem attention(const void* query) const {
    AdditiveProblem problem = {{batch, 1, places, size}, dtype, query, keys.const_data_ptr(), data_of(v),
                               1 / std::sqrt(static_cast<double>(size)), nullptr, {}};
    if (!mask.has_value()) return problem;
    problem.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
    problem.mask_stride[0] = mask->stride(0), problem.mask_stride[2] = mask->stride(1);
    return problem;
  }
};

void multiply(const BatchedProduct& product) { kernels().batched_product.product(product, thread_pool()); }

// One matrix [*, cols] of contiguous rows, `stride` apart, or its transpose.
BatchedMatrices matrix(const void* data, int64_t stride) { return {data, {0, stride, 1}}; }
BatchedMatrices matrix(const Tensor& rows) { return matrix(rows.const_data_ptr(), rows.size(rows.dim() - 1)); }
BatchedMatrices transposed(const BatchedMatrices& m) { return {m.data, {m.stride[0], m.stride[2], m.stride[1]}}; }

// Copies rows of `bytes`.
void copy_rows(int64_t rows, int64_t bytes, const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_stride, static_cast<const char*>(from) + i * from_stride, bytes);
}

// What a step reads and writes. row [B, I + K]: the cell's input; the context is written behind what is there already.
struct Step {
  const void *h, *c;
  void *query, *weights, *row, *next_h, *next_c, *saved;
  const void* packed;
};

void take(const Operands& o, const Step& s) {
  multiply({1, o.batch, o.hidden, o.size, o.dtype, matrix(s.h, o.hidden), matrix(o.w_query), true, s.query, false});
  kernels().additive_attention.weights({o.attention(s.query), s.weights, o.values.const_data_ptr(), o.width,
                                        static_cast<char*>(s.row) + o.inputs * o.element, o.row},
                                       thread_pool());
  const SequenceOrder order = SequenceOrder::uniform(1, o.batch);
  kernels().recurrent.forward({RecurrentCell::lstm, o.dtype, order.sequence(false), o.cell_shape(), o.cell_weights(),
                               {s.row, 0, o.row}, s.h, s.c, {s.next_h, 0, o.hidden}, s.next_h, s.next_c, s.saved, s.packed},
                              thread_pool());
}

// Makes, by step: states [T + 1, B, H], the first of them h; rows [T, B, I + K], input and context; weights [T, B, S]; queries
// [T, B, A]; saved [T, B, 5 H] ([0] unless wanted), as recurrent layers keep it. And c [B, H] at the end.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const Tensor& keys, const Tensor& values, const Tensor& h, const Tensor& c, const MaybeTensor& mask,
    const Tensor& w_query, const MaybeTensor& v, const Tensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih,
    const MaybeTensor& b_hh, bool save) {
  const Operands o(input, keys, values, h, c, mask, w_query, v, w_ih, w_hh, b_ih, b_hh);
  const Tensor states = o.empty({o.steps + 1, o.batch, o.hidden}), rows = o.empty({o.steps, o.batch, o.row}),
               weights = o.empty({o.steps, o.batch, o.places}), queries = o.empty({o.steps, o.batch, o.size}),
               saved = o.empty(save ? Ints{o.steps, o.batch, 5 * o.hidden} : Ints{0});
  std::memcpy(states.mutable_data_ptr(), o.h.const_data_ptr(), o.batch * o.hidden * o.element);
  copy_rows(o.steps * o.batch, o.inputs * o.element, o.input.const_data_ptr(), o.inputs * o.element, rows.mutable_data_ptr(),
            o.row * o.element);
  const RecurrentPack pack = {RecurrentCell::lstm, o.dtype, o.cell_shape(), o.cell_weights()};
  const Tensor packed = empty_contiguous({kernels().recurrent.packed_bytes(pack)}, aoti_torch_dtype_uint8());
  kernels().recurrent.pack(pack, packed.mutable_data_ptr(), thread_pool());
  Tensor last_c = o.c, next_c = o.empty({o.batch, o.hidden}), spare = o.empty({o.batch, o.hidden});
  for (int64_t t = 0; t < o.steps; ++t) {
    take(o, {at_step(states, t), last_c.const_data_ptr(), at_step(queries, t), at_step(weights, t), at_step(rows, t),
             at_step(states, t + 1), next_c.mutable_data_ptr(), save ? at_step(saved, t) : nullptr, packed.const_data_ptr()});
    last_c = next_c, next_c = spare, spare = last_c;
  }
  return {states, last_c, rows, weights, queries, saved};
}

// One step: h, c, context [B, K], weights [B, S] from input [B, I]. It reads each weight once: packing would take longer.
std::tuple<Tensor, Tensor, Tensor, Tensor> step(const Tensor& input, const Tensor& keys, const Tensor& values, const Tensor& h,
                                                const Tensor& c, const MaybeTensor& mask, const Tensor& w_query,
                                                const MaybeTensor& v, const Tensor& w_ih, const Tensor& w_hh,
                                                const MaybeTensor& b_ih, const MaybeTensor& b_hh) {
  const Operands o(input, keys, values, h, c, mask, w_query, v, w_ih, w_hh, b_ih, b_hh);
  const Tensor row = o.empty({o.batch, o.row}), query = o.empty({o.batch, o.size}), weights = o.empty({o.batch, o.places}),
               context = o.empty({o.batch, o.width}), next_h = o.empty({o.batch, o.hidden}), next_c = o.empty({o.batch, o.hidden});
  char* const rows = static_cast<char*>(row.mutable_data_ptr());
  const int64_t stride = o.row * o.element, input_bytes = o.inputs * o.element;
  copy_rows(o.batch, input_bytes, o.input.const_data_ptr(), input_bytes, rows, stride);
  take(o, {o.h.const_data_ptr(), o.c.const_data_ptr(), query.mutable_data_ptr(), weights.mutable_data_ptr(), rows,
           next_h.mutable_data_ptr(), next_c.mutable_data_ptr(), nullptr, nullptr});
  copy_rows(o.batch, o.width * o.element, rows + input_bytes, stride, context.mutable_data_ptr(), o.width * o.element);
  return {next_h, next_c, context, weights};
}

// Gradients of rows, keys, values, states, c, w_query, v (by sample, [B, A]), w_ih, w_hh and either bias, [4 H, 1], from those of
// states, rows and weights, as forward() made them, and of the last c. Additive scores only.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_states, const Tensor& grad_c, const Tensor& grad_rows, const Tensor& grad_weights,
                   const Tensor& input, const Tensor& keys, const Tensor& values, const Tensor& h, const Tensor& c,
                   const MaybeTensor& mask, const Tensor& w_query, const Tensor& v, const Tensor& w_ih, const Tensor& w_hh,
                   const MaybeTensor& b_ih, const MaybeTensor& b_hh, const Tensor& states, const Tensor& rows,
                   const Tensor& weights, const Tensor& queries, const Tensor& saved) {
  const Operands o(input, keys, values, h, c, mask, w_query, v, w_ih, w_hh, b_ih, b_hh);
  const int64_t T = o.steps, B = o.batch, H = o.hidden, A = o.size, S = o.places, K = o.width, X = o.row, gates = 4 * H;
  // Gradients of what a step makes are complete when those behind it have added theirs.
  auto copied = [&](const char* what, const Tensor& tensor, const Tensor& like) {
    return torch::stable::clone(operand(what, tensor, like, sizes_of(like)));
  };
  const Tensor dh = copied("grad_states", grad_states, states), dc = copied("grad_c", grad_c, o.c),
               dx = copied("grad_rows", grad_rows, rows), dw = copied("grad_weights", grad_weights, weights);
  const Tensor dk = torch::stable::new_zeros(o.keys, sizes_of(o.keys)), dv = torch::stable::new_zeros(o.keys, {B, A}),
               dq = o.empty({T, B, A});
  // A cache line more than the gates: rows at a multiple of 16 lines would share a few sets of the first-level cache.
  const int64_t slots = gates + 64 / o.element;
  const Tensor dg = o.empty({T, B, slots});
  for (int64_t t = T; t-- > 0;) {
    const void* const previous_c = t > 0 ? at_step(saved, t - 1) + 4 * H * o.element : o.c.const_data_ptr();
    kernels().recurrent.lstm_cell_backward({o.dtype, B, H, at_step(saved, t), previous_c, t > 0 ? 5 * H : H, at_step(dh, t + 1),
                                            dc.mutable_data_ptr(), at_step(dg, t), slots},
                                           thread_pool());
    multiply({1, B, gates, H, o.dtype, matrix(at_step(dg, t), slots), matrix(o.w_hh), false, at_step(dh, t), true});
    multiply({1, B, gates, X, o.dtype, matrix(at_step(dg, t), slots), matrix(o.w_ih), false, at_step(dx, t), true});
    multiply({B, 1, K, S, o.dtype, {at_step(dx, t) + o.inputs * o.element, {X, 0, 1}}, {o.values.const_data_ptr(), {S * K, K, 1}},
              true, at_step(dw, t), true});
    kernels().additive_attention.weights_backward({o.attention(at_step(queries, t)), at_step(dw, t), at_step(weights, t),
                                                   at_step(dq, t), dk.mutable_data_ptr(), dv.mutable_data_ptr(), true},
                                                  thread_pool());
    multiply({1, B, A, H, o.dtype, matrix(at_step(dq, t), A), matrix(o.w_query), false, at_step(dh, t), true});
  }
  // What needs no order of the steps: one product over all of them.
  auto over_all = [&](const BatchedMatrices& left, int64_t rows, const Tensor& right, int64_t cols) {
    const Tensor result = o.empty({rows, cols});
    multiply({1, rows, T * B, cols, o.dtype, transposed(left), matrix(right), false, result.mutable_data_ptr(), false});
    return result;
  };
  const Tensor ones = torch::stable::fill_(o.empty({T * B, 1}), 1), de = o.empty({B, S, K});
  multiply({B, S, T, K, o.dtype, {weights.const_data_ptr(), {S, 1, B * S}},
            {at_step(dx, 0) + o.inputs * o.element, {X, B * X, 1}}, false, de.mutable_data_ptr(), false});
  const BatchedMatrices of_gates = matrix(dg.const_data_ptr(), slots);
  return {dx, dk, de, dh, dc, over_all(matrix(dq), A, states, H), dv, over_all(of_gates, gates, rows, X),
          over_all(of_gates, gates, states, H), over_all(of_gates, gates, ones, 1)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  m.impl("attention_lstm_cell", TORCH_BOX(&step));
  m.impl("attention_lstm", TORCH_BOX(&forward));
  m.impl("attention_lstm_backward", TORCH_BOX(&backward));
}
