// All layers and directions of a recurrent network as a function of Python's, without torch's dispatcher; see recurrent_step.h.
#pragma once
#include <vector>

#include "recurrent_step.h"

namespace cvfast {

// The operands of a call: weights of layer 0 forwards, layer 0 backwards, layer 1 forwards ..., each w_ih, w_hh and, with
// biases, b_ih and b_hh.
struct LayersOperands {
  DenseView input, h_0, c_0, packed;
  std::vector<DenseView> weights;
  int64_t directions = 1;
  bool lstm = false, biases = false, has_packed = false;

  // given: input, h_0, c_0, weights, biases, directions, packed.
  bool shows(RecurrentCell cell, PyObject* const* given) {
    lstm = cell == RecurrentCell::lstm, biases = given[4] == Py_True, has_packed = given[6] != Py_None;
    directions = PyLong_AsLong(given[5]);
    if (!(input.shows_rows(given[0]) && h_0.shows(given[1]) && (lstm ? c_0.shows(given[2]) : given[2] == Py_None)) ||
        !PyList_CheckExact(given[3]) || (has_packed && !packed.shows(given[6])))
      return false;
    weights.resize(PyList_GET_SIZE(given[3]));
    for (size_t i = 0; i < weights.size(); ++i)
      if (!weights[i].shows(PyList_GET_ITEM(given[3], i))) return false;
    return fits(gates_of(cell));
  }

  int64_t steps() const { return input.view.sizes[0]; }
  int64_t batch() const { return input.view.sizes[1]; }
  int64_t count() const { return h_0.view.sizes[0]; }
  int64_t hidden() const { return h_0.view.sizes[2]; }
  int64_t inputs(int64_t layer) const { return layer < directions ? input.view.sizes[2] : directions * hidden(); }
  RecurrentWeights weights_of(int64_t layer) const {
    const DenseView* first = &weights[layer * each()];
    return {first[0].view.data, first[1].view.data, biases ? first[2].view.data : nullptr,
            biases ? first[3].view.data : nullptr, nullptr};
  }

 private:
  int64_t each() const { return biases ? 4 : 2; }
  bool fits(int64_t gates) const {
    if (input.view.dims != 3 || h_0.view.dims != 3 || !input.dtype() || (directions != 1 && directions != 2)) return false;
    auto is_state = [&](const DenseView& state) { return state.is_like(input) && state.has_sizes(count(), batch(), hidden()); };
    if (!is_state(h_0) || (lstm && !is_state(c_0)) || static_cast<int64_t>(weights.size()) != count() * each()) return false;
    const int64_t rows = gates * hidden();
    for (int64_t i = 0; i < count(); ++i) {
      const DenseView* w = &weights[i * each()];
      for (int64_t k = 0; k < each(); ++k)
        if (!w[k].is_like(input)) return false;
      if (!w[0].has_sizes(rows, inputs(i)) || !w[1].has_sizes(rows, hidden()) ||
          (biases && !(w[2].has_size(rows) && w[3].has_size(rows))))
        return false;
    }
    return true;
  }
};

// [T, B, width] of the input's dtype.
inline pybind11::object layer_output(PyObject* input, const LayersOperands& o, int64_t width, DenseView& view) {
  const pybind11::tuple sizes = pybind11::make_tuple(o.steps(), o.batch(), width);
  PyObject* args[] = {input, sizes.ptr()};
  return result(PyObject_Vectorcall(tensors.new_empty, args, 2, nullptr), view);
}

// (cell, input, h_0, c_0, weights, biases, directions, packed) -> (output, h_n, c_n), c_n None of other cells than the lstm; None
// for operands that are not tensors in the CPU's memory or do not fit. packed: what <op>_pack made of the weights, or None.
inline PyObject* recurrent_layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const std::optional<RecurrentCell> cell = count == 8 ? cell_of(args[0]) : std::nullopt;
  LayersOperands o;
  if (!cell || !tensors.api || !o.shows(*cell, args + 1)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const int64_t batch = o.batch(), hidden = o.hidden(), width = o.directions * hidden;
  const DType dtype = *o.input.dtype();
  DenseView from = o.input, to, h_n, c_n;
  pybind11::object input, output;  // of a layer
  const pybind11::object all_h = result_like(args[2], h_n);
  const pybind11::object all_c = !o.lstm ? pybind11::none() : all_h ? result_like(args[3], c_n) : pybind11::object();
  if (!all_h || !all_c) return nullptr;
  int64_t at = 0;  // in what is packed
  for (int64_t i = 0; i < o.count(); ++i) {
    const bool backwards = i % o.directions == 1;
    if (!backwards && !(output = layer_output(args[1], o, width, to))) return nullptr;
    const RecurrentShape shape = {o.inputs(i), hidden, 0};
    const int64_t state = i * batch * hidden, size = o.has_packed ? kernels().recurrent.packed_bytes({*cell, dtype, shape, o.weights_of(i)}) : 0;
    if (at + size > (o.has_packed ? o.packed.bytes() : 0)) Py_RETURN_NONE;
    const RecurrentForward call = {*cell, dtype, {o.steps(), batch, nullptr, nullptr, nullptr, false, backwards}, shape, o.weights_of(i),
                                   {from.view.data, from.view.strides[0], from.view.strides[1]}, o.h_0.from(state),
                                   o.lstm ? o.c_0.from(state) : nullptr, {to.from(backwards * hidden), batch * width, width},
                                   h_n.from(state), o.lstm ? c_n.from(state) : nullptr, nullptr,
                                   o.has_packed && o.steps() > 1 ? static_cast<char*>(o.packed.view.data) + at : nullptr};
    if (!run_forward(call)) return nullptr;
    at += size;
    if (i % o.directions == o.directions - 1) from = to, input = output;  // which keeps it
  }
  return PyTuple_Pack(3, output.ptr(), all_h.ptr(), all_c.ptr());
}

}  // namespace cvfast
