// The kernels of one instruction set. Plain function pointers: included by files that are compiled several times.
#pragma once
#include "cvfast/conv2d.h"

namespace cvfast {

// What kernels/conv2d.cpp exports, once per instruction set, as cvfast::<instruction set>::conv2d.
struct Conv2dKernels {
  void (*forward)(const Conv2dForward&, const ThreadPool&);
  void (*input_grad)(const Conv2dInputGrad&, const ThreadPool&);
  void (*weight_grad)(const Conv2dWeightGrad&, const ThreadPool&);
};

struct KernelTable {
  const char* isa;
  int vector_bytes;
  void (*conv2d_forward)(const Conv2dForward&, const ThreadPool&);
  void (*conv2d_input_grad)(const Conv2dInputGrad&, const ThreadPool&);
  void (*conv2d_weight_grad)(const Conv2dWeightGrad&, const ThreadPool&);
};

}  // namespace cvfast
