// The kernels of one instruction set. Plain function pointers: included by files that are compiled several times.
#pragma once
#include "cvfast/additive_attention.h"
#include "cvfast/attention.h"
#include "cvfast/batch_norm.h"
#include "cvfast/batched_product.h"
#include "cvfast/conv2d.h"
#include "cvfast/gelu.h"
#include "cvfast/layer_norm.h"
#include "cvfast/pooling.h"
#include "cvfast/recurrent.h"

namespace cvfast {

// What kernels/conv2d.cpp exports, once per instruction set, as cvfast::<instruction set>::conv2d.
struct Conv2dKernels {
  void (*forward)(const Conv2dForward&, const ThreadPool&);
  void (*input_grad)(const Conv2dInputGrad&, const ThreadPool&);
  void (*weight_grad)(const Conv2dWeightGrad&, const ThreadPool&);
  void (*bias_grad)(const Conv2dBiasGrad&, const ThreadPool&);
  Conv2dPacking (*packing)(const Conv2dForward&);
  void (*pack)(const Conv2dForward&, void* to, const ThreadPool&);  // to: packing().bytes > 0 of them, aligned to 64 bytes
  Conv2dPacking (*input_grad_packing)(const Conv2dInputGrad&);
  void (*input_grad_pack)(const Conv2dInputGrad&, void* to, const ThreadPool&);
};

// Likewise kernels/recurrent.cpp.
struct RecurrentKernels {
  void (*forward)(const RecurrentForward&, const ThreadPool&);
  void (*backward)(const RecurrentBackward&, const ThreadPool&);
  void (*lstm_cell_backward)(const LstmCellBackward&, const ThreadPool&);
  int64_t (*packed_bytes)(const RecurrentPack&);
  void (*pack)(const RecurrentPack&, void* to, const ThreadPool&);  // to: aligned to 64 bytes
};

// Likewise kernels/attention.cpp.
struct AttentionKernels {
  void (*forward)(const AttentionForward&, const ThreadPool&);
  void (*backward)(const AttentionBackward&, const ThreadPool&);
};

// Likewise kernels/additive_attention.cpp.
struct AdditiveAttentionKernels {
  void (*weights)(const AdditiveWeights&, const ThreadPool&);
  void (*weights_backward)(const AdditiveWeightsBackward&, const ThreadPool&);
};

// Likewise kernels/batched_product.cpp.
struct BatchedProductKernel {
  void (*product)(const BatchedProduct&, const ThreadPool&);
};

// Likewise kernels/batch_norm.cpp.
struct BatchNormKernels {
  void (*forward)(const BatchNormForward&, const ThreadPool&);
  void (*backward)(const BatchNormBackward&, const ThreadPool&);
};

// Likewise kernels/gelu.cpp.
struct GeluKernels {
  void (*forward)(const GeluForward&, const ThreadPool&);
  void (*backward)(const GeluBackward&, const ThreadPool&);
};

// Likewise kernels/layer_norm.cpp.
struct LayerNormKernel {
  void (*forward)(const LayerNormForward&, const ThreadPool&);
};

// Likewise kernels/pooling.cpp.
struct PoolingKernels {
  void (*max)(const MaxPooling&, const ThreadPool&);
  void (*average)(const PixelAverage&, const ThreadPool&);
};

// What kernels/peak.cpp exports: work at a core's limits, for a clock outside. Results only keep the work alive.
struct PeakKernels {
  int64_t bytes_per_step;  // of the sums s = s * x + x that one step forms; they stay normal for 0.1 < x < 0.9
  double (*multiply_adds_f32)(int64_t steps, double x);
  double (*multiply_adds_f64)(int64_t steps, double x);
  double (*exponentials)(int64_t steps, double x);  // as many float32 ones as there are sums in bytes_per_step, 0 < x < 1
  uint32_t (*read)(const char* data, int64_t bytes, int64_t passes);  // bytes: a multiple of 512
};

struct KernelTable {
  const char* isa;
  int vector_bytes;
  void (*conv2d_forward)(const Conv2dForward&, const ThreadPool&);
  void (*conv2d_input_grad)(const Conv2dInputGrad&, const ThreadPool&);
  void (*conv2d_weight_grad)(const Conv2dWeightGrad&, const ThreadPool&);
  void (*conv2d_bias_grad)(const Conv2dBiasGrad&, const ThreadPool&);
  Conv2dPacking (*conv2d_packing)(const Conv2dForward&);
  void (*conv2d_pack)(const Conv2dForward&, void* to, const ThreadPool&);
  Conv2dPacking (*conv2d_input_grad_packing)(const Conv2dInputGrad&);
  void (*conv2d_input_grad_pack)(const Conv2dInputGrad&, void* to, const ThreadPool&);
  RecurrentKernels recurrent;
  AttentionKernels attention;
  AdditiveAttentionKernels additive_attention;
  BatchedProductKernel batched_product;
  BatchNormKernels batch_norm;
  GeluKernels gelu;
  LayerNormKernel layer_norm;
  PoolingKernels pooling;
  PeakKernels peak;
};

}  // namespace cvfast
