// 2-D convolution on CUDA devices: the launchers. Contracts: cvfast/conv2d.h; all pointers are device memory.
#pragma once
#include <cuda_runtime_api.h>

#include "cvfast/conv2d.h"

namespace cvfast::cuda {

// Each enqueues its kernel on `stream` of the current device and returns what the launch said; a dtype other than
// f32 and f64 is cudaErrorInvalidValue. Results are the same bits on every run.
cudaError_t conv2d_forward(const Conv2dForward& conv, cudaStream_t stream);
cudaError_t conv2d_input_grad(const Conv2dInputGrad& conv, cudaStream_t stream);
cudaError_t conv2d_weight_grad(const Conv2dWeightGrad& conv, cudaStream_t stream);

}  // namespace cvfast::cuda
