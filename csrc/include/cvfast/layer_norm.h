// Layer normalisation, as torch.nn.functional.layer_norm defines it over the last dimension, with weight and bias. f32.
#pragma once
#include "common.h"

namespace cvfast {

// output[i, j] = (input[i, j] - mean[i]) / sqrt(variance[i] + epsilon) * weight[j] + bias[j]; all contiguous.
struct LayerNormForward {
  int64_t rows, size;
  double epsilon;
  const float *input, *weight, *bias;
  float* output;
};

}  // namespace cvfast
