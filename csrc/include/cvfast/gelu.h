// gelu, x Phi(x), and its derivative, element by element. f32.
#pragma once
#include "common.h"

namespace cvfast {

struct GeluForward {
  int64_t count;
  const float* input;
  float* output;
};

struct GeluBackward {
  int64_t count;
  const float *grad, *input;
  float* grad_input;
};

}  // namespace cvfast
