// cvfast._C: what was built, which instruction sets there are, and the choice of one (for tests and CVFAST_ISA); comparisons
// of Python objects; calls of kernels that take less time than torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/chosen_algorithm.h"
#include "../cpu/isa.h"
#include "../cpu/poison.h"
#include "../cpu/precision.h"
#include "conv2d_how.h"
#include "recurrent_layers.h"
#include "recurrent_step.h"
#include "unchanged.h"

namespace py = pybind11;

namespace {

int64_t multiply_adds(const std::string& isa, bool float64, int64_t steps) {
  const cvfast::PeakKernels& peak = cvfast::kernels(isa).peak;
  (float64 ? peak.multiply_adds_f64 : peak.multiply_adds_f32)(steps, 0.5);
  return 2 * steps * peak.bytes_per_step / (float64 ? 8 : 4);
}

int64_t exponentials(const std::string& isa, int64_t steps) {
  const cvfast::PeakKernels& peak = cvfast::kernels(isa).peak;
  peak.exponentials(steps, 0.5);
  return steps * peak.bytes_per_step / 4;
}

void read_buffer(const std::string& isa, const py::buffer& data, int64_t passes) {
  const py::buffer_info info = data.request();
  const auto* bytes = static_cast<const char*>(info.ptr);
  const py::gil_scoped_release release;
  cvfast::kernels(isa).peak.read(bytes, info.size * info.itemsize, passes);
}

// (height, width) from an int or a pair of ints, exactly of these types; false for anything else.
bool read_pair(PyObject* value, int64_t (&pair)[2]) {
  const bool both = PyTuple_CheckExact(value);
  if (both && PyTuple_GET_SIZE(value) != 2) return false;
  for (int i = 0; i < 2; ++i) {
    PyObject* number = both ? PyTuple_GET_ITEM(value, i) : value;
    if (!PyLong_CheckExact(number)) return false;
    int overflow;
    pair[i] = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow) return false;
  }
  return true;
}

template <class Value, std::size_t Count>
bool read_name(PyObject* name, const cvfast::Named<Value> (&known)[Count], Value& value) {
  Py_ssize_t length;
  const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &length) : nullptr;
  if (!text) return PyErr_Clear(), false;
  const std::optional<Value> found = cvfast::value_of({text, static_cast<std::size_t>(length)}, known);
  if (found) value = *found;
  return found.has_value();
}

// Not by pybind11, which takes as long as a small convolution.
PyObject* conv2d_how(PyObject*, PyObject* const* args, Py_ssize_t count) {
  cvfast::Conv2dHow how = {};
  int64_t groups[2];
  const bool fits = (count == 4 || count == 6) && read_pair(args[0], how.stride) && read_pair(args[1], how.padding) &&
                    read_pair(args[2], how.dilation) && PyLong_CheckExact(args[3]) && read_pair(args[3], groups) &&
                    (count == 4 || (read_name(args[4], cvfast::activations, how.activation) &&
                                    read_name(args[5], cvfast::poolings, how.pooling)));
  if (!fits) Py_RETURN_NONE;
  how.groups = groups[0];
  const std::optional<int64_t> packed = how.packed();
  if (!packed) Py_RETURN_NONE;
  return PyLong_FromLongLong(*packed);
}

PyMethodDef plain_functions[] = {
    {"conv2d_how", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(conv2d_how)), METH_FASTCALL,
     "(stride, padding, dilation, groups[, activation, pooling]) as the number that cvfast_kernels::conv2d_epilogue takes;\n"
     "None for what is too large for it or no int, pair of ints or known name."},
    {"recurrent_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cvfast::recurrent_step)), METH_FASTCALL,
     "(unseen, cell, input, h, c, w_ih, w_hh, b_ih, b_hh) as (h, c) after the step, h of cells without c, where the Unchanged\n"
     "`unseen` holds; None elsewhere, and for operands that are not dense tensors in the CPU's memory, or do not fit."},
    {"recurrent_layers", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cvfast::recurrent_layers)), METH_FASTCALL,
     "(cell, input, h_0, c_0, weights, biases, directions, packed) as (output, h_n, c_n), as cvfast_kernels::<op>_stack has them, c_n\n"
     "None of cells without it; None for operands that are not tensors in the CPU's memory, or do not fit."},
    {"recurrent_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cvfast::recurrent_cell)), METH_FASTCALL,
     "(unseen, cell, parameters, input, hx) as recurrent_step, with a module's parameters; hx is (h, c) or h."},
    {}};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and instruction sets of cvfast's CPU kernels; needs no torch.";
  if (PyModule_AddFunctions(m.ptr(), plain_functions) != 0) throw py::error_already_set();
  cvfast::add_unchanged(m);
  m.attr("build_info") = py::dict(
      py::arg("compiler") = CVFAST_COMPILER, py::arg("torch") = CVFAST_BUILT_WITH_TORCH, py::arg("cuda") = CVFAST_CUDA_BUILD);
  m.attr("made_by_intel") = cvfast::made_by_intel();
  m.attr("halves_avx512") = cvfast::halves_avx512();
  m.def("compiled_isas", &cvfast::compiled_isas, "Instruction sets the kernels were compiled for.");
  m.def("available_isas", &cvfast::available_isas, "Those of them that this machine runs.");
  m.def("best_isa", &cvfast::best_isa, "The one taken by default.");
  m.def("active_isa", &cvfast::active_isa, "The one the kernels use now.");
  m.def("set_isa", &cvfast::set_isa, py::arg("name"),
        "Makes the kernels of the whole process use instruction set `name`; ValueError if this machine cannot run it.");
  m.def("strict_precision", &cvfast::strict_precision, "Whether only exact algorithms are taken.");
  m.def("set_strict_precision", &cvfast::set_strict_precision, py::arg("strict"),
        "Keeps CPU kernels to algorithms that form the sums of the definition itself: no Winograd.");
  m.def("chosen_algorithm", &cvfast::chosen_algorithm,
        "The algorithm that the last convolution called by this thread took; \"\" before the first.");
  m.def("multiply_adds", &multiply_adds, py::arg("isa"), py::arg("float64"), py::arg("steps"),
        py::call_guard<py::gil_scoped_release>(),
        "Multiplies and adds in registers of instruction set `isa` as fast as a core can, `steps` times some vectors; "
        "returns the number of floating-point operations. ValueError if this machine cannot run it.");
  m.def("exponentials", &exponentials, py::arg("isa"), py::arg("steps"), py::call_guard<py::gil_scoped_release>(),
        "Computes float32 exponentials in registers of instruction set `isa`, `steps` times some vectors; returns their "
        "number. ValueError if this machine cannot run it.");
  m.def("read", &read_buffer, py::arg("isa"), py::arg("data"), py::arg("passes"),
        "Reads the buffer `data`, whole multiples of 512 bytes of it, `passes` times with loads of `isa`.");
  m.def("set_tensors", &cvfast::set_tensors, py::arg("api"), py::arg("tensor"), py::arg("parameter"), py::arg("is_neg"),
        py::arg("empty_like"), py::arg("new_empty"), "Torch's classes and functions, by which tensors are read here; False where they do not fit.");
  m.def("poison_results", &cvfast::poison_results, py::arg("on"),
        "For tests: results of CPU operators start as NaN instead of uninitialised memory.");
}
