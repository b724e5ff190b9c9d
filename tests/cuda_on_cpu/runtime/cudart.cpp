// The parts of the CUDA runtime that nvcc's host code calls (so that the real launchers run, <<<>>> included), over
// the simulated machine, and the C interface that simulator.py uses. Linked with the translated kernels and the object
// file of the .cu file.
#include <map>
#include <vector>

#include "machine.h"

namespace {

using sim::machine;

enum CudaError { kSuccess = 0, kInvalidDeviceFunction = 98, kLaunchFailure = 719 };

CudaError last_error = kSuccess;

// Filled while libraries are loaded, before other static objects can be relied on.
std::map<const void*, const char*>& device_names() {
  static std::map<const void*, const char*> names;
  return names;
}

struct Call {
  const sim::Kernel* kernel;
  sim::Config config;
  void* stream;
};
std::vector<Call> pushed;    // between <<<>>> and the launch; the kernel is not known yet
std::vector<Call> launched;  // by host code

const sim::Kernel* find_kernel(const std::string& name) {
  const sim::Kernel* end = sim::kernels + sim::kernel_count;
  const sim::Kernel* found =
      std::find_if(sim::kernels, end, [&](const sim::Kernel& kernel) { return name == kernel.name; });
  return found == end ? nullptr : found;
}

CudaError launch(const sim::Kernel& kernel, const sim::Config& config, const char* parameters) {
  try {
    machine.launch(kernel, config, parameters);
    return kSuccess;
  } catch (const sim::Error& e) {
    machine.error = e.what();
    return kLaunchFailure;
  }
}

}  // namespace

extern "C" {

// ---- the CUDA runtime, as seen by host code that nvcc compiled ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host_function, char*, const char* device_name, int, void*, void*, void*,
                            void*, int*) {
  device_names()[host_function] = device_name;
}

unsigned __cudaPushCallConfiguration(sim::Dim3 grid, sim::Dim3 block, size_t shared, void* stream) {
  pushed.push_back({nullptr, {grid, block, shared}, stream});
  return 0;
}

int __cudaPopCallConfiguration(sim::Dim3* grid, sim::Dim3* block, size_t* shared, void** stream) {
  const Call call = pushed.back();
  pushed.pop_back();
  *grid = call.config.grid;
  *block = call.config.block;
  *shared = call.config.dynamic_shared;
  *stream = call.stream;
  return kSuccess;
}

int __cudaGetKernel(const void** kernel, const void* host_function) {
  *kernel = find_kernel(device_names().at(host_function));
  return *kernel ? kSuccess : kInvalidDeviceFunction;
}

int __cudaLaunchKernel(const sim::Kernel* kernel, sim::Dim3 grid, sim::Dim3 block, void** arguments, size_t shared,
                       void* stream) {
  launched.push_back({kernel, {grid, block, shared}, stream});
  std::vector<char> parameters(kernel->parameter_bytes);
  for (size_t i = 0; i < kernel->parameter_count; ++i) {
    const auto [offset, bytes] = kernel->parameters[i];
    std::memcpy(parameters.data() + offset, arguments[i], bytes);
  }
  return last_error = launch(*kernel, {grid, block, shared}, parameters.data());
}

int cudaGetLastError() {
  const CudaError error = last_error;
  last_error = kSuccess;
  return error;
}

// ---- for simulator.py ----

void sim_configure(uint64_t seed, bool check_races) {
  machine.seed = seed;
  machine.check_races = check_races;
  machine.regions.clear();
  launched.clear();
  machine.error.clear();
}

void sim_add_buffer(const char* name, uint64_t address, uint64_t bytes, bool writable) {
  machine.regions.emplace_back(name, address, bytes, writable, false);
}

// Returns a CUDA error code; sim_error() says more.
int sim_launch(const char* kernel_name, sim::Dim3 grid, sim::Dim3 block, uint64_t shared, const char* parameters,
               uint64_t bytes) {
  const sim::Kernel* kernel = find_kernel(kernel_name);
  if (!kernel || bytes != kernel->parameter_bytes) return kInvalidDeviceFunction;
  return launch(*kernel, {grid, block, shared}, parameters);
}

const char* sim_error() { return machine.error.c_str(); }

size_t sim_launch_count() { return launched.size(); }
const char* sim_launched_kernel(size_t i) { return launched[i].kernel->name; }
sim::Dim3 sim_launched_grid(size_t i) { return launched[i].config.grid; }
sim::Dim3 sim_launched_block(size_t i) { return launched[i].config.block; }
void* sim_launched_stream(size_t i) { return launched[i].stream; }

}  // extern "C"
