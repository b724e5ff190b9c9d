// cvfast._C: what was built, which instruction sets there are, and the choice of one (for tests and CVFAST_ISA).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/chosen_algorithm.h"
#include "../cpu/isa.h"
#include "../cpu/poison.h"
#include "../cpu/precision.h"

namespace py = pybind11;

namespace {

int64_t multiply_adds(const std::string& isa, bool float64, int64_t steps) {
  const cvfast::PeakKernels& peak = cvfast::kernels(isa).peak;
  (float64 ? peak.multiply_adds_f64 : peak.multiply_adds_f32)(steps, 0.5);
  return 2 * steps * peak.bytes_per_step / (float64 ? 8 : 4);
}

void read_buffer(const std::string& isa, const py::buffer& data, int64_t passes) {
  const py::buffer_info info = data.request();
  const auto* bytes = static_cast<const char*>(info.ptr);
  const py::gil_scoped_release release;
  cvfast::kernels(isa).peak.read(bytes, info.size * info.itemsize, passes);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and instruction sets of cvfast's CPU kernels; needs no torch.";
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
  m.def("read", &read_buffer, py::arg("isa"), py::arg("data"), py::arg("passes"),
        "Reads the buffer `data`, whole multiples of 512 bytes of it, `passes` times with loads of `isa`.");
  m.def("poison_results", &cvfast::poison_results, py::arg("on"),
        "For tests: results of CPU operators start as NaN instead of uninitialised memory.");
}
