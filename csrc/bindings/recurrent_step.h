// A recurrent cell's step as a function of Python's, without torch's dispatcher, which takes longer than the step of a small cell.
// Needs no torch: DLPack's functions show the tensors.
#pragma once
#include <pybind11/pybind11.h>

#include <exception>
#include <optional>

#include "../cpu/caller_threads.h"
#include "../cpu/fresh_result.h"
#include "../cpu/isa.h"
#include "dlpack.h"
#include "recurrent_gates.h"
#include "unchanged.h"

namespace cvfast {

// torch's, as set_tensors got them.
struct TensorFunctions {
  const dlpack::ExchangeApi* api;
  PyObject *tensor, *parameter;  // the classes
  PyObject *is_neg, *empty_like, *new_empty;
  PyObject* cell_weights[4];  // their names in a module
};
inline TensorFunctions tensors = {};

inline bool set_tensors(const pybind11::capsule& api, const pybind11::type& tensor, const pybind11::type& parameter,
                        const pybind11::function& is_neg, const pybind11::function& empty_like,
                        const pybind11::object& new_empty) {
  const auto* functions = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), dlpack::ExchangeApi::capsule));
  if (!functions) throw pybind11::error_already_set();
  if (functions->version != dlpack::ExchangeApi::known_version || !functions->view) return false;
  tensors = {functions, Py_NewRef(tensor.ptr()), Py_NewRef(parameter.ptr()), Py_NewRef(is_neg.ptr()), Py_NewRef(empty_like.ptr()),
             Py_NewRef(new_empty.ptr()),
             {PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
              PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")}};
  return true;
}

// A tensor in the CPU's memory.
struct DenseView {
  dlpack::View view = {};

  // Whether `object` is one of up to three dimensions, dense, and none that only torch's dispatcher understands.
  bool shows(PyObject* object) { return shows_rows(object) && is_dense(); }
  // The same, of which the rows alone have to be dense.
  bool shows_rows(PyObject* object) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensors.tensor && type != tensors.parameter) return false;
    PyObject* const negated = PyObject_CallOneArg(tensors.is_neg, object);
    Py_XDECREF(negated);
    return negated == Py_False && tensors.api->view(object, &view) == 0 && view.device.type == dlpack::cpu && has_rows();
  }
  std::optional<DType> dtype() const {
    const auto [code, bits, lanes] = view.element;
    if (code == dlpack::Code::bfloat) return DType::bf16;
    if (code != dlpack::Code::floating || lanes != 1) return {};
    if (bits == 16) return DType::f16;
    return bits == 32 ? std::optional(DType::f32) : bits == 64 ? std::optional(DType::f64) : std::nullopt;
  }
  bool is_like(const DenseView& other) const {
    return view.element.code == other.view.element.code && view.element.bits == other.view.element.bits;
  }
  bool has_sizes(int64_t rows, int64_t cols) const { return view.dims == 2 && view.sizes[0] == rows && view.sizes[1] == cols; }
  bool has_size(int64_t size) const { return view.dims == 1 && view.sizes[0] == size; }
  bool has_sizes(int64_t layers, int64_t rows, int64_t cols) const {
    return view.dims == 3 && view.sizes[0] == layers && view.sizes[1] == rows && view.sizes[2] == cols;
  }
  int64_t bytes() const {
    int64_t bytes = view.element.bits / 8;
    for (int32_t i = 0; i < view.dims; ++i) bytes *= view.sizes[i];
    return bytes;
  }
  // From element number `index` on.
  void* from(int64_t index) const { return static_cast<char*>(view.data) + index * (view.element.bits / 8); }

 private:
  bool has_rows() const {
    if (view.dims < 1 || view.dims > 3 || view.byte_offset != 0 || !view.strides) return false;
    for (int32_t i = 0; i < view.dims; ++i)
      if (view.sizes[i] == 0) return false;
    return view.sizes[view.dims - 1] == 1 || view.strides[view.dims - 1] == 1;
  }
  bool is_dense() const {
    int64_t stride = 1;
    for (int32_t i = view.dims; i-- > 0; stride *= view.sizes[i])
      if (view.sizes[i] > 1 && view.strides[i] != stride) return false;
    return true;
  }
};

// The operands of a step; those that are None stay empty.
struct StepOperands {
  DenseView input, h, c, w_ih, w_hh, b_ih, b_hh;
  bool biases = false;

  bool shows(RecurrentCell cell, PyObject* const* given) {
    const bool lstm = cell == RecurrentCell::lstm;
    biases = given[5] != Py_None;
    return input.shows(given[0]) && h.shows(given[1]) && (lstm ? c.shows(given[2]) : given[2] == Py_None) &&
           w_ih.shows(given[3]) && w_hh.shows(given[4]) &&
           (biases ? b_ih.shows(given[5]) && b_hh.shows(given[6]) : given[6] == Py_None) && fits(lstm, gates_of(cell));
  }

 private:
  bool fits(bool lstm, int64_t gates) const {
    if (input.view.dims != 2 || h.view.dims != 2) return false;
    const int64_t batch = h.view.sizes[0], hidden = h.view.sizes[1], inputs = input.view.sizes[1], rows = gates * hidden;
    auto all_alike = [&](auto&... others) { return (others.is_like(input) && ...); };
    return input.dtype() && all_alike(h, w_ih, w_hh) && input.has_sizes(batch, inputs) && w_ih.has_sizes(rows, inputs) &&
           w_hh.has_sizes(rows, hidden) && (!lstm || (c.is_like(input) && c.has_sizes(batch, hidden))) &&
           (!biases || (all_alike(b_ih, b_hh) && b_ih.has_size(rows) && b_hh.has_size(rows)));
  }
};

inline bool holds(PyObject* unchanged) {
  const pybind11::handle handle(unchanged);
  return pybind11::isinstance<Unchanged>(handle) && pybind11::cast<Unchanged&>(handle).holds();
}

// `made`, a tensor without values that nobody else has, or nothing, with an exception.
inline pybind11::object result(PyObject* made, DenseView& view) {
  auto owned = pybind11::reinterpret_steal<pybind11::object>(made);
  if (!owned || tensors.api->view(made, &view.view) != 0) return {};
  prepare_result(view.view.data, view.bytes());
  return owned;
}
inline pybind11::object result_like(PyObject* dense, DenseView& view) {
  return result(PyObject_CallOneArg(tensors.empty_like, dense), view);
}

// Runs the kernel; false with an exception.
inline bool run_forward(const RecurrentForward& call) {
  try {
    const pybind11::gil_scoped_release release;
    kernels().recurrent.forward(call, caller_threads());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return false;
  }
  return true;
}

// (input, h, c, w_ih, w_hh, b_ih, b_hh) -> (h, c), or, of other cells than the lstm, h; None for operands that are not dense
// tensors in the CPU's memory or do not fit.
inline PyObject* take_step(RecurrentCell cell, PyObject* const* given) {
  StepOperands o;
  if (!tensors.api || !o.shows(cell, given)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const bool lstm = cell == RecurrentCell::lstm;
  DenseView h, c;
  const pybind11::object new_h = result_like(given[1], h), new_c = new_h && lstm ? result_like(given[2], c) : pybind11::object();
  if (!new_h || (lstm && !new_c)) return nullptr;
  const int64_t inputs = o.input.view.sizes[1], hidden = o.h.view.sizes[1];
  const RecurrentForward call = {cell, *o.input.dtype(), {1, o.h.view.sizes[0], nullptr, nullptr, nullptr, false, false},
                                 {inputs, hidden, 0},
                                 {o.w_ih.view.data, o.w_hh.view.data, o.b_ih.view.data, o.b_hh.view.data, nullptr},
                                 {o.input.view.data, 0, inputs}, o.h.view.data, o.c.view.data, {h.view.data, 0, hidden},
                                 h.view.data, c.view.data, nullptr, nullptr};
  if (!run_forward(call)) return nullptr;
  return lstm ? PyTuple_Pack(2, new_h.ptr(), new_c.ptr()) : Py_NewRef(new_h.ptr());
}

inline std::optional<RecurrentCell> cell_of(PyObject* number) {
  const long value = PyLong_AsLong(number);
  if (value < 0 || value > static_cast<long>(RecurrentCell::rnn_relu)) return PyErr_Clear(), std::nullopt;
  return static_cast<RecurrentCell>(value);
}

// (unseen, cell, input, h, c, w_ih, w_hh, b_ih, b_hh), `unseen` an Unchanged: take_step, or None if that does not hold.
inline PyObject* recurrent_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const std::optional<RecurrentCell> cell = count == 9 ? cell_of(args[1]) : std::nullopt;
  if (!cell || !holds(args[0])) Py_RETURN_NONE;
  return take_step(*cell, args + 2);
}

// (unseen, cell, parameters, input, hx): the same with a module's parameters, and the states as a module takes and gives them.
inline PyObject* recurrent_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const std::optional<RecurrentCell> cell = count == 5 ? cell_of(args[1]) : std::nullopt;
  if (!cell || !tensors.api || !holds(args[0]) || !PyDict_CheckExact(args[2])) Py_RETURN_NONE;
  PyObject* given[7] = {args[3], args[4], Py_None};
  if (*cell == RecurrentCell::lstm) {
    if (!PyTuple_CheckExact(args[4]) || PyTuple_GET_SIZE(args[4]) != 2) Py_RETURN_NONE;
    given[1] = PyTuple_GET_ITEM(args[4], 0), given[2] = PyTuple_GET_ITEM(args[4], 1);
  }
  for (int i = 0; i < 4; ++i) {
    given[3 + i] = PyDict_GetItemWithError(args[2], tensors.cell_weights[i]);
    if (!given[3 + i]) {  // a parametrized weight, say
      PyErr_Clear();
      Py_RETURN_NONE;
    }
  }
  return take_step(*cell, given);
}

}  // namespace cvfast
