// torch's current CUDA stream and device for a kernel launch, without linking against libtorch_cuda: the library must
// load under CPU builds of torch too.
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace cvfast::cuda {

// While this lives, the current device is the one of `tensor`. (torch::stable::accelerator::Stream gives the native
// handle only from torch 2.13 on, so it is asked of libtorch_cuda, which a process with CUDA tensors has loaded.)
class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {}

  cudaStream_t get() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(getter()(device_, &stream) == 0, "cvfast: torch gave no current stream of CUDA device ", device_);
    return static_cast<cudaStream_t>(stream);
  }

 private:
  using Getter = int32_t (*)(int32_t device_index, void** stream);  // AOTITorchError; 0: success

  static Getter getter() {
    static const Getter found = find();
    return found;
  }

  static Getter find() {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    STD_TORCH_CHECK(symbol != nullptr, "cvfast: aoti_torch_get_current_cuda_stream is not in this process: ",
                    library ? "libtorch_cuda.so lacks it" : "libtorch_cuda.so is not loaded");
    return reinterpret_cast<Getter>(symbol);
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "cvfast ", what, ": ", cudaGetErrorString(error));
}

}  // namespace cvfast::cuda
