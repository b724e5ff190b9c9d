// Recurrent layers on the CPU: torch's tensors and threads -> the kernels of csrc/cpu. The schemas are in
// cvfast/ops/recurrent.py.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "../cpu/caller_threads.h"
#include "../cpu/isa.h"
#include "../cpu/sequence_order.h"
#include "brief_result.h"
#include "cpu_tensors.h"
#include "recurrent_gates.h"
#include "thread_pool.h"

namespace {

using namespace cvfast;
using MaybeTensor = std::optional<Tensor>;

void check_size(const char* what, const Tensor& tensor, const Ints& expected) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(expected.size()), "cvfast recurrent: ", what, " must be ",
                  expected.size(), "-dimensional");
  for (size_t i = 0; i < expected.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == expected[i], "cvfast recurrent: ", what, " has size ", tensor.size(i),
                    " at dimension ", i, ", expected ", expected[i]);
}

// A tensor [T, B, width], (packed) [N, width] or (one step) [B, width], its rows contiguous; `keep` owns it.
struct RowTensor {
  Tensor keep;
  explicit RowTensor(const Tensor& tensor)
      : keep(tensor.stride(-1) == 1 ? tensor : torch::stable::contiguous(tensor)) {}
  int64_t stride(int64_t from_last) const {
    const int64_t dim = keep.dim() - 1 - from_last;
    return dim < 0 ? 0 : keep.stride(dim);
  }
  operator ConstRows() const { return {keep.const_data_ptr(), stride(2), stride(1)}; }
  operator cvfast::Rows() const { return {keep.mutable_data_ptr(), stride(2), stride(1)}; }
};

// Whether the input is a sequence, or one step [B, I].
enum class Form { sequence, step };

// The operands of forward and backward, checked; owns what had to be made contiguous. `place`: which of the states in h_0
// and c_0, where they have a dimension of several.
class Operands {
 public:
  Operands(Form form, RecurrentCell cell, const Tensor& input, const MaybeTensor& lengths, const MaybeTensor& batch_sizes,
           const Tensor& h_0, const MaybeTensor& c_0, const Tensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih,
           const MaybeTensor& b_hh, const MaybeTensor& w_hr, std::optional<int64_t> place = {})
      : cell(cell), input(input) {
    const int64_t outer = place ? 1 : 0;  // dimensions of the states before the samples'
    STD_TORCH_CHECK(h_0.dim() == outer + 2 && w_ih.dim() == 2 && w_hh.dim() == 2,
                    "cvfast recurrent: states and weights must be 2-dimensional");
    STD_TORCH_CHECK(c_0.has_value() == (cell == RecurrentCell::lstm), "cvfast recurrent: c_0 is the lstm's");
    STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "cvfast recurrent: both biases or none");
    STD_TORCH_CHECK(!w_hr.has_value() || cell == RecurrentCell::lstm, "cvfast recurrent: w_hr is the lstm's");
    batch = h_0.size(outer), outputs = h_0.size(outer + 1);
    const int64_t rows = w_ih.size(0);
    STD_TORCH_CHECK(rows % gates_of(cell) == 0, "cvfast recurrent: the weights' rows are not divisible by ", gates_of(cell));
    shape = {w_ih.size(1), rows / gates_of(cell), w_hr.has_value() ? outputs : 0};
    weights = {take("w_ih", w_ih, {rows, shape.input}), take("w_hh", w_hh, {rows, outputs}), take("b_ih", b_ih, {rows}),
               take("b_hh", b_hh, {rows}), take("w_hr", w_hr, {outputs, shape.hidden})};
    STD_TORCH_CHECK(w_hr.has_value() || outputs == shape.hidden, "cvfast recurrent: h_0 has size ", outputs,
                    " at dimension 1, expected ", shape.hidden);
    auto state = [&](const char* what, const MaybeTensor& states, int64_t width) -> const void* {
      if (!place || !states.has_value()) return take(what, states, {batch, width});
      const int64_t offset = *place * batch * width * static_cast<int64_t>(input.element_size());
      return static_cast<const char*>(take(what, states, {h_0.size(0), batch, width})) + offset;
    };
    this->h_0 = state("h_0", h_0, outputs);
    this->c_0 = state("c_0", c_0, shape.hidden);
    if (form == Form::step) {
      steps = 1;
      check_size("input", input, {batch, shape.input});
      order = SequenceOrder::uniform(1, batch);
    } else {
      set_order(lengths, batch_sizes);
    }
  }

  const void* take(const char* what, const MaybeTensor& tensor, const Ints& sizes) {
    if (!tensor.has_value()) return nullptr;
    check_size(what, *tensor, sizes);
    STD_TORCH_CHECK(tensor->scalar_type() == input.keep.scalar_type(), "cvfast recurrent: ", what,
                    " must have the input's dtype");
    if (tensor->is_contiguous()) return tensor->const_data_ptr();
    kept.push_back(torch::stable::contiguous(*tensor));
    return kept.back().const_data_ptr();
  }

  Ints row_sizes(int64_t width) const {
    return input.keep.dim() == 2 ? Ints{input.keep.size(0), width} : Ints{steps, batch, width};
  }
  Ints saved_sizes() const {
    return {input.keep.dim() == 2 ? input.keep.size(0) : steps * batch, saved_per_unit(cell) * shape.hidden};
  }

  RecurrentCell cell;
  RowTensor input;
  int64_t batch = 0, steps = 0, outputs = 0;
  RecurrentShape shape = {};
  RecurrentWeights weights = {};
  const void *h_0 = nullptr, *c_0 = nullptr;
  SequenceOrder order;

 private:
  void set_order(const MaybeTensor& lengths, const MaybeTensor& batch_sizes) {
    if (batch_sizes.has_value()) {
      STD_TORCH_CHECK(!lengths.has_value(), "cvfast recurrent: lengths and batch_sizes exclude each other");
      steps = batch_sizes->numel();
      const int64_t* sizes = integers("batch_sizes", *batch_sizes, steps);
      int64_t rows = 0;
      for (int64_t i = 0; i < steps; rows += sizes[i++])
        STD_TORCH_CHECK(sizes[i] >= 0 && sizes[i] <= (i ? sizes[i - 1] : batch),
                        "cvfast recurrent: batch_sizes must not increase, nor be beyond the batch of ", batch);
      check_size("input", input.keep, {rows, shape.input});
      order = SequenceOrder::packed(sizes, steps, batch);
      return;
    }
    STD_TORCH_CHECK(input.keep.dim() == 3, "cvfast recurrent: input must be 3-dimensional");
    steps = input.keep.size(0);
    check_size("input", input.keep, {steps, batch, shape.input});
    if (!lengths.has_value()) {
      order = SequenceOrder::uniform(steps, batch);
      return;
    }
    const int64_t* values = integers("lengths", *lengths, batch);
    for (int64_t i = 0; i < batch; ++i)
      STD_TORCH_CHECK(values[i] >= 0 && values[i] <= steps, "cvfast recurrent: lengths must be from 0 to ", steps, ", got ",
                      values[i]);
    order = SequenceOrder::padded(values, batch, steps);
  }

  const int64_t* integers(const char* what, const Tensor& tensor, int64_t count) {
    check_size(what, tensor, {count});
    STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Long, "cvfast recurrent: ", what,
                    " must be int64");
    kept.push_back(torch::stable::contiguous(tensor));
    return static_cast<const int64_t*>(kept.back().const_data_ptr());
  }

  std::vector<Tensor> kept;
};

void run(const Operands& o, bool reverse, cvfast::Rows output, void* h_n, void* c_n, void* saved, const void* packed) {
  RecurrentForward args = {o.cell, dtype_of(o.input.keep), o.order.sequence(reverse), o.shape, o.weights, o.input, o.h_0,
                           o.c_0, output, h_n, c_n, saved, packed};
  kernels().recurrent.forward(args, thread_pool());
}

template <RecurrentCell cell>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const MaybeTensor& lengths, const MaybeTensor& batch_sizes, const Tensor& h_0,
    const MaybeTensor& c_0, const Tensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh,
    const MaybeTensor& w_hr, bool reverse, bool save) {
  const Operands o(Form::sequence, cell, input, lengths, batch_sizes, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr);
  const int32_t dtype = dtype_code(input);
  const RowTensor output(empty_contiguous(o.row_sizes(o.outputs), dtype));
  const Tensor h_n = empty_contiguous({o.batch, o.outputs}, dtype);
  const Tensor c_n = empty_contiguous(c_0.has_value() ? Ints{o.batch, o.shape.hidden} : Ints{0}, dtype);
  const int32_t compute = compute_code(input);
  const Tensor saved = brief_contiguous(save ? o.saved_sizes() : Ints{0}, compute, compute == aoti_torch_dtype_float64() ? 8 : 4);
  if (save && lengths.has_value()) {  // what is saved ends before the tensor does
    const int64_t used = o.order.rows() * saved.size(1) * saved.element_size();
    std::memset(static_cast<char*>(saved.mutable_data_ptr()) + used, 0, saved.numel() * saved.element_size() - used);
  }
  run(o, reverse, output, h_n.mutable_data_ptr(), c_n.mutable_data_ptr(), save ? saved.mutable_data_ptr() : nullptr, nullptr);
  return {output.keep, h_n, c_n, saved};
}

// The weights of `count` layers and directions: those of layer 0 forwards, layer 0 backwards, layer 1 forwards ..., each
// w_ih, w_hh, b_ih and b_hh with biases, w_hr with a projection.
class StackWeights {
 public:
  StackWeights(RecurrentCell cell, const std::vector<Tensor>& weights, bool biases, int64_t count)
      : weights(weights), biases(biases), each(count > 0 ? static_cast<int64_t>(weights.size()) / count : 0) {
    const int64_t plain = biases ? 4 : 2;
    STD_TORCH_CHECK(each * count == static_cast<int64_t>(weights.size()) && count > 0 &&
                        (each == plain || (cell == RecurrentCell::lstm && each == plain + 1)),
                    "cvfast recurrent: ", weights.size(), " weights for ", count, " layers and directions");
  }
  const Tensor& w_ih(int64_t i) const { return weights[i * each]; }
  const Tensor& w_hh(int64_t i) const { return weights[i * each + 1]; }
  MaybeTensor b_ih(int64_t i) const { return biases ? MaybeTensor(weights[i * each + 2]) : MaybeTensor(); }
  MaybeTensor b_hh(int64_t i) const { return biases ? MaybeTensor(weights[i * each + 3]) : MaybeTensor(); }
  MaybeTensor w_hr(int64_t i) const {
    return each % 2 ? MaybeTensor(weights[i * each + each - 1]) : MaybeTensor();
  }

 private:
  const std::vector<Tensor>& weights;
  const bool biases;
  const int64_t each;
};

int64_t packed_bytes_of(const Operands& o) {
  return kernels().recurrent.packed_bytes({o.cell, dtype_of(o.input.keep), o.shape, o.weights});
}

// All layers and directions, without derivatives: weights as StackWeights has them; `packed` what pack() made of them; h_0
// and c_0 [layers * directions, B, ...].
template <RecurrentCell cell>
std::tuple<Tensor, Tensor, Tensor> stack(const Tensor& input, const MaybeTensor& lengths, const MaybeTensor& batch_sizes,
                                         const Tensor& h_0, const MaybeTensor& c_0, std::vector<Tensor> tensors,
                                         bool biases, int64_t directions, const MaybeTensor& packed) {
  STD_TORCH_CHECK(h_0.dim() == 3, "cvfast recurrent: h_0 must be 3-dimensional");
  const int64_t count = h_0.size(0), batch = h_0.size(1);
  const StackWeights weights(cell, tensors, biases, count);
  const int32_t dtype = dtype_code(input);
  auto bytes = [&](int64_t elements) { return elements * static_cast<int64_t>(input.element_size()); };
  const Tensor h_n = empty_contiguous(sizes_of(h_0), dtype);
  const Tensor c_n = empty_contiguous(c_0.has_value() ? sizes_of(*c_0) : Ints{0}, dtype);
  char *h_end = static_cast<char*>(h_n.mutable_data_ptr()), *c_end = static_cast<char*>(c_n.mutable_data_ptr());
  const char* from_packed = packed.has_value() ? static_cast<const char*>(packed->const_data_ptr()) : nullptr;
  const char* packed_end = from_packed ? from_packed + packed->numel() : nullptr;
  Tensor from = input, output = input;
  for (int64_t i = 0; i < count; ++i) {
    const Operands o(Form::sequence, cell, from, lengths, batch_sizes, h_0, c_0, weights.w_ih(i), weights.w_hh(i),
                     weights.b_ih(i), weights.b_hh(i), weights.w_hr(i), i);
    if (i % directions == 0) output = empty_contiguous(o.row_sizes(directions * o.outputs), dtype);
    cvfast::Rows rows = RowTensor(output);
    rows.data = static_cast<char*>(rows.data) + bytes(i % directions * o.outputs);
    const int64_t size = from_packed ? packed_bytes_of(o) : 0;
    STD_TORCH_CHECK(packed_end - from_packed >= size, "cvfast recurrent: packed weights are those of another stack");
    run(o, i % directions == 1, rows, h_end + bytes(i * batch * o.outputs),
        c_0.has_value() ? c_end + bytes(i * batch * o.shape.hidden) : nullptr, nullptr,
        o.steps > 1 ? from_packed : nullptr);  // one step reads each weight once
    if (from_packed) from_packed += size;
    if (i % directions == directions - 1) from = output;
  }
  return {output, h_n, c_n};
}

// The weights of a stack as the kernels read them, those of each layer and direction behind a stamp that tells what they were
// made of. Opaque.
template <RecurrentCell cell>
Tensor pack(std::vector<Tensor> tensors, bool biases, int64_t count) {
  const StackWeights weights(cell, tensors, biases, count);
  auto operands = [&](int64_t i) {
    auto zeros = [&](int64_t width) { return torch::stable::new_zeros(weights.w_ih(i), {0, width}); };
    const int64_t outputs = weights.w_hh(i).size(1), hidden = weights.w_ih(i).size(0) / gates_of(cell);
    const MaybeTensor c_0 = cell == RecurrentCell::lstm ? MaybeTensor(zeros(hidden)) : MaybeTensor();
    return Operands(Form::step, cell, zeros(weights.w_ih(i).size(1)), {}, {}, zeros(outputs), c_0, weights.w_ih(i),
                    weights.w_hh(i), weights.b_ih(i), weights.b_hh(i), weights.w_hr(i));
  };
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += packed_bytes_of(operands(i));
  const Tensor packed = empty_contiguous({bytes}, aoti_torch_dtype_uint8());
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    const Operands o = operands(i);
    kernels().recurrent.pack({o.cell, dtype_of(o.input.keep), o.shape, o.weights}, to, thread_pool());
    to += packed_bytes_of(o);
  }
  return packed;
}

// h and c ([0] without) after one step; saved as forward() has it.
template <RecurrentCell cell>
std::tuple<Tensor, Tensor, Tensor> step(const Tensor& input, const Tensor& h, const MaybeTensor& c, const Tensor& w_ih,
                                        const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh, bool save) {
  const Operands o(Form::step, cell, input, {}, {}, h, c, w_ih, w_hh, b_ih, b_hh, {});
  const int32_t dtype = dtype_code(o.input.keep);
  const RowTensor new_h(empty_contiguous({o.batch, o.outputs}, dtype));
  const Tensor new_c = empty_contiguous(cell == RecurrentCell::lstm ? Ints{o.batch, o.outputs} : Ints{0}, dtype);
  const Tensor saved = empty_contiguous(save ? o.saved_sizes() : Ints{0}, compute_code(input));
  run(o, false, new_h, new_h.keep.mutable_data_ptr(), new_c.mutable_data_ptr(), save ? saved.mutable_data_ptr() : nullptr, nullptr);
  return {new_h.keep, new_c, saved};
}

template <RecurrentCell cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& output, const Tensor& saved, const MaybeTensor& grad_output, const MaybeTensor& grad_h_n,
    const MaybeTensor& grad_c_n, const Tensor& input, const MaybeTensor& lengths, const MaybeTensor& batch_sizes,
    const Tensor& h_0, const MaybeTensor& c_0, const Tensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih,
    const MaybeTensor& b_hh, const MaybeTensor& w_hr, bool reverse, bool input_grad, bool weight_grads) {
  Operands o(Form::sequence, cell, input, lengths, batch_sizes, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr);
  const int32_t dtype = dtype_code(input);
  check_size("output", output, o.row_sizes(o.outputs));
  check_size("saved", saved, o.saved_sizes());
  STD_TORCH_CHECK(dtype_code(output) == dtype && dtype_code(saved) == compute_code(input),
                  "cvfast recurrent: output or saved has another dtype than the forward pass gave it");
  const RowTensor rows(output);
  const Tensor kept = torch::stable::contiguous(saved);
  std::optional<RowTensor> grad_rows;
  if (grad_output.has_value()) {
    check_size("grad_output", *grad_output, o.row_sizes(o.outputs));
    STD_TORCH_CHECK(dtype_code(*grad_output) == dtype, "cvfast recurrent: grad_output must have the input's dtype");
    grad_rows.emplace(*grad_output);
  }
  const int64_t gates = w_ih.size(0), element_size = input.element_size();
  auto empty = [&](const Ints& sizes) { return brief_contiguous(sizes, dtype, element_size); };
  const RowTensor grad_input(empty(input_grad ? o.row_sizes(o.shape.input) : Ints{0, 0, 0}));
  const Tensor grad_h_0 = empty({o.batch, o.outputs});
  const Tensor grad_c_0 = empty(c_0.has_value() ? Ints{o.batch, o.shape.hidden} : Ints{0});
  const bool biases = weight_grads && b_ih.has_value(), projection = weight_grads && w_hr.has_value();
  const Tensor grad_w_ih = empty(weight_grads ? Ints{gates, o.shape.input} : Ints{0});
  const Tensor grad_w_hh = empty(weight_grads ? Ints{gates, o.outputs} : Ints{0});
  const Tensor grad_b_ih = empty(biases ? Ints{gates} : Ints{0});
  const Tensor grad_b_hh = empty(biases ? Ints{gates} : Ints{0});
  const Tensor grad_w_hr = empty(projection ? Ints{o.outputs, o.shape.hidden} : Ints{0});
  auto pointer = [](bool wanted, const Tensor& tensor) { return wanted ? tensor.mutable_data_ptr() : nullptr; };
  RecurrentBackward args = {};
  args.cell = cell, args.dtype = dtype_of(input), args.sequence = o.order.sequence(reverse), args.shape = o.shape;
  args.weights = o.weights, args.input = o.input, args.h_0 = o.h_0, args.c_0 = o.c_0;
  args.output = rows, args.saved = kept.const_data_ptr();
  if (grad_rows) args.grad_output = *grad_rows;
  args.grad_h_n = o.take("grad_h_n", grad_h_n, {o.batch, o.outputs});
  args.grad_c_n = o.take("grad_c_n", grad_c_n, {o.batch, o.shape.hidden});
  args.wants_input = input_grad, args.wants_weights = weight_grads;
  if (input_grad) args.grad_input = grad_input;
  args.grad_h_0 = grad_h_0.mutable_data_ptr(), args.grad_c_0 = grad_c_0.mutable_data_ptr();
  args.grad_weights = {pointer(weight_grads, grad_w_ih), pointer(weight_grads, grad_w_hh), pointer(biases, grad_b_ih),
                       pointer(biases, grad_b_hh), pointer(projection, grad_w_hr)};
  kernels().recurrent.backward(args, thread_pool());
  return {grad_input.keep, grad_h_0, grad_c_0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_w_hr};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("lstm", TORCH_BOX(&forward<RecurrentCell::lstm>));
  m.impl("gru", TORCH_BOX(&forward<RecurrentCell::gru>));
  m.impl("rnn_tanh", TORCH_BOX(&forward<RecurrentCell::rnn_tanh>));
  m.impl("rnn_relu", TORCH_BOX(&forward<RecurrentCell::rnn_relu>));
  m.impl("lstm_cell", TORCH_BOX(&step<RecurrentCell::lstm>));
  m.impl("gru_cell", TORCH_BOX(&step<RecurrentCell::gru>));
  m.impl("rnn_tanh_cell", TORCH_BOX(&step<RecurrentCell::rnn_tanh>));
  m.impl("rnn_relu_cell", TORCH_BOX(&step<RecurrentCell::rnn_relu>));
  m.impl("lstm_backward", TORCH_BOX(&backward<RecurrentCell::lstm>));
  m.impl("gru_backward", TORCH_BOX(&backward<RecurrentCell::gru>));
  m.impl("rnn_tanh_backward", TORCH_BOX(&backward<RecurrentCell::rnn_tanh>));
  m.impl("rnn_relu_backward", TORCH_BOX(&backward<RecurrentCell::rnn_relu>));
}

// For what reaches the kernels without torch (recurrent_step.h).
[[maybe_unused]] const bool has_set_caller_threads = (set_caller_threads(thread_pool), true);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(cvfast_kernels, CPU, m) {
  implement(m);
  m.impl("lstm_stack", TORCH_BOX(&stack<RecurrentCell::lstm>));
  m.impl("gru_stack", TORCH_BOX(&stack<RecurrentCell::gru>));
  m.impl("rnn_tanh_stack", TORCH_BOX(&stack<RecurrentCell::rnn_tanh>));
  m.impl("rnn_relu_stack", TORCH_BOX(&stack<RecurrentCell::rnn_relu>));
  m.impl("lstm_pack", TORCH_BOX(&pack<RecurrentCell::lstm>));
  m.impl("gru_pack", TORCH_BOX(&pack<RecurrentCell::gru>));
  m.impl("rnn_tanh_pack", TORCH_BOX(&pack<RecurrentCell::rnn_tanh>));
  m.impl("rnn_relu_pack", TORCH_BOX(&pack<RecurrentCell::rnn_relu>));
}
