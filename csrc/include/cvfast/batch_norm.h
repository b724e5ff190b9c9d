// Batch normalisation by the batch's own statistics, with what follows it: y = activation(norm(x) + residual), and the
// maximum of 2x2 pixels of y if asked for. f32.
#pragma once
#include "common.h"

namespace cvfast {

// Images [N, C, H, W] that lie densely, contiguous or channels_last. Every size is 1 or more; pooled: H and W are even.
struct BatchNormProblem {
  int64_t batch, channels, height, width;
  bool channels_last, pooled;
  const float *input, *residual;  // residual: as the input, or nullptr; always nullptr where pooled
  const float *weight, *bias;     // [C] each, or nullptr: 1 and 0
  float negative_slope;           // the activation is y > 0 ? y : negative_slope * y; from 0 (relu) to 1 (none)
};

// Results are fully written, and the same bits for any number of threads and for both formats: a channel's sums are 16
// chains each, over 1024 places and more until a line ends, added up pairwise; these are added in order in float64.
struct BatchNormForward {
  BatchNormProblem problem;
  double eps;
  float* output;      // [N, C, H, W], pooled [N, C, H / 2, W / 2], in the input's format
  float* statistics;  // [3, C]: mean, 1 / sqrt(variance + eps), variance over N H W - 1 (NaN where that is 0)
};

struct BatchNormBackward {
  BatchNormProblem problem;        // where a residual was added, the output takes its place
  const float* statistics;         // as forward gave them
  const float* grad;               // of the output, in its format
  float* grad_input;               // as the input
  float* grad_residual;            // as the residual; nullptr where there was none
  float *grad_weight, *grad_bias;  // [C]
};

}  // namespace cvfast
